"""Verdicts on right answers, also on a busy machine, and on wrong ones, compared with EvalPlus's own oracle.

    python -m benchmarks.judge FOLDER          measure, write benchmarks/judge/judge.json, print the table
    python -m benchmarks.judge --show          print the table of the committed result

FOLDER contains EvalPlus's ``HumanEvalPlus.jsonl.gz`` and ``MbppPlus.jsonl.gz`` and Google's ``mbpp.jsonl``. Right
answers are the canonical solutions. Wrong ones are mutants of them; a few change nothing that any input shows, and pass
under both judges. Two kinds of tasks have no mutants: HumanEval/32, where EvalPlus 0.3.1 passes no answer, and tasks
whose canonical solution takes longer than ``SLOW`` seconds on all inputs.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.judge.mutants import mutants

RESULT = Path(__file__).with_name("judge.json")
FILES = {"HUMANEVAL_OVERRIDE_PATH": "HumanEvalPlus.jsonl.gz", "MBPP_OVERRIDE_PATH": "MbppPlus.jsonl.gz"}
SLOW = 2.0
PER_TASK = 1
BUSY = "while True: pass"


def main() -> None:
    """Read the flags, measure, write the result and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with the three files")
    parser.add_argument("--cache", type=Path, help="folder that keeps expected outputs; the user's cache by default")
    args = parse_flags(parser, RESULT)
    if not args.show:
        if args.folder is None:
            parser.error(f"name the folder with {', '.join(FILES.values())} and mbpp.jsonl")
        os.environ.update({variable: str(args.folder / name) for variable, name in FILES.items()})
        args.output.write_text(json.dumps(measure(args.folder, args.cache), indent=2) + "\n")
    sys.stdout.write(table(json.loads(args.output.read_text())) + "\n")


def measure(folder: Path, cache: Path | None) -> dict[str, Any]:
    """Measure all sections and return the result."""
    from dylo_moe.evaluation.judging.judge import Judge
    from dylo_moe.evaluation.problems import load_problems
    from dylo_moe.evaluation.sandbox.self_check import choose_sandbox

    console = Console(stderr=True)
    rows = [json.loads(line) for line in (folder / "mbpp.jsonl").read_text().splitlines()]
    choice = choose_sandbox()
    console.print(choice.describe(), highlight=False)
    own = [*load_problems("humaneval", evalplus=False), *load_problems("mbpp", evalplus=False, rows=rows)]
    plus = [*load_problems("humanevalplus"), *load_problems("mbppplus")]
    with Judge(choice.sandbox, cache=cache) as judge:
        right = [judge_canonical(judge, own, "own tests", console), judge_canonical(judge, plus, "plus tests", console)]
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0)]
        try:
            right.append(judge_canonical(judge, plus, "plus tests, every core kept busy by others", console))
        finally:
            for process in busy:
                process.kill()
                process.wait()
        wrong = judge_mutants(judge, plus, console)
    return {
        "environment": environment(),
        "evalplus": version("evalplus"),
        "sandbox": choice.sandbox.description,
        "right": right,
        "wrong": wrong,
    }


def judge_canonical(judge: Any, problems: list[Any], name: str, console: Console) -> dict[str, Any]:
    """Judge the canonical solutions; return how many pass, and the statuses of the others."""
    console.print(name, highlight=False)
    start = time.perf_counter()
    verdicts = list(judge.judge_many((problem, problem.reference) for problem in problems))
    failed = {problem.task_id: verdict.status for problem, verdict in zip(problems, verdicts, strict=True)}
    return {
        "name": name,
        "tasks": dict(Counter(problem.task_id.partition("/")[0] for problem in problems)),
        "passed": sum(verdict.passed for verdict in verdicts),
        "failed": {task: status for task, status in failed.items() if status != "passed"},
        "seconds": time.perf_counter() - start,
    }


def judge_mutants(judge: Any, problems: list[Any], console: Console) -> dict[str, Any]:
    """Judge the same mutants with both judges and compare the verdicts."""
    console.print("mutants", highlight=False)
    chosen = [
        (problem, change, code)
        for problem in problems
        if problem.entry_point != "find_zero"
        for (change, code), _ in zip(mutants(problem.reference, problem.task_id), range(PER_TASK), strict=False)
    ]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        asked = [(problem.benchmark, problem.task_id, code) for problem, _, code in chosen]
        theirs = list(pool.map(evalplus_passes, *zip(*asked, strict=True)))
    kept = [(one, verdict) for one, verdict in zip(chosen, theirs, strict=True) if verdict is not None]
    ours = list(judge.judge_many((problem, code) for (problem, _, code), _ in kept))
    pairs = [(verdict.passed, other) for verdict, (_, other) in zip(ours, kept, strict=True)]
    disagreed = [
        {"task_id": problem.task_id, "change": change, "code": code, "here": verdict.status, "evalplus": other}
        for ((problem, change, code), other), verdict in zip(kept, ours, strict=True)
        if verdict.passed != other
    ]
    return {
        "mutants": len(kept),
        "changes": dict(Counter(change for (_, change, _), _ in kept)),
        "fail under both": pairs.count((False, False)),
        "pass under both": pairs.count((True, True)),
        "pass here alone": pairs.count((True, False)),
        "pass under EvalPlus alone": pairs.count((False, True)),
        "disagreed": disagreed,
    }


def evalplus_passes(benchmark: str, task_id: str, code: str) -> bool | None:
    """Return whether EvalPlus passes the answer in both suites; None if the canonical solution is slow."""
    from evalplus.data import get_human_eval_plus, get_mbpp_plus
    from evalplus.eval import PASS, untrusted_check
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.gen.util import trusted_exec

    family = benchmark.removesuffix("plus")
    task = {"humaneval": get_human_eval_plus, "mbpp": get_mbpp_plus}[family]()[task_id]
    name, reference = task["entry_point"], task["prompt"] + task["canonical_solution"]
    for inputs in (task["base_input"], task["plus_input"] or []):
        not_none = name in MBPP_OUTPUT_NOT_NONE_TASKS
        expected, seconds = trusted_exec(reference, inputs, name, record_time=True, output_not_none=not_none)
        if sum(seconds) > SLOW:
            return None
        verdict, _ = untrusted_check(family, code, inputs, name, expected, task["atol"], seconds, fast_check=True)
        if verdict != PASS:
            return False
    return True


def table(result: dict[str, Any]) -> str:
    """Return both tables as Markdown."""
    lines = ["| canonical solutions | tasks | pass | seconds |", "| --- " * 4 + "|"]
    for found in result["right"]:
        tasks = " + ".join(str(count) for count in found["tasks"].values())
        lines.append(f"| {found['name']} | {tasks} | {found['passed']} | {found['seconds']:.0f} |")
    wrong = result["wrong"]
    kinds = ("fail under both", "pass under both", "pass here alone", "pass under EvalPlus alone")
    titles = ("fail under both", "pass under both", "pass only here", "pass only under EvalPlus")
    lines += ["", "| mutants | " + " | ".join(titles) + " |", "| --- " * (len(kinds) + 1) + "|"]
    lines.append(f"| {wrong['mutants']} | " + " | ".join(str(wrong[kind]) for kind in kinds) + " |")
    machine = result["environment"]
    lines += [
        "",
        f"EvalPlus {result['evalplus']}; {machine['processor']}, Python {machine['python']}; {result['sandbox']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
