"""Study B: one model out of adapters that were trained apart.

    python -m benchmarks.mixture.apart FOLDER --work WORK     measure what is missing, write apart.json, print
    python -m benchmarks.mixture.apart --show                 print the tables of the committed result

FOLDER holds ``superni`` and ``mbxp``, see ``tasks.py``. WORK keeps the adapters, so that an interrupted study goes on
where it stopped. Each adapter is trained alone, at the rate that is best for its task on other rows than the held-out
ones; so are the scales and densities of merges, and the rates of gates that are trained.

Parts: ``losses`` (held-out loss of every arm), ``switching`` (texts that change their task half way), ``unknown``
(a task that no adapter learned), ``answers`` (ROUGE-L of generated answers), ``merges`` (one adapter at weight 1 comes
back from each merge), ``costs`` (seconds, memory; on a quiet machine).

Said beforehand: ``compose`` within 0.5 % of the loss of each task's own adapter on the easy sets (SuperNI with the
definitions of its tasks, MBXP) and 2 % on the hard one (SuperNI without), every merge at least 20 % above ``compose``;
on a task that no adapter learned, ``compose`` at most 1 % above the base.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.mixture.answers import generated_answers
from benchmarks.mixture.apart_table import table
from benchmarks.mixture.arms import ARMS, TUNED_ARMS, Arm
from benchmarks.mixture.costs import costs
from benchmarks.mixture.hard_texts import losses_after_a_switch, losses_of_unknown_tasks
from benchmarks.mixture.merge_check import difference_of_one_adapter
from benchmarks.mixture.setting import MODEL, Results
from benchmarks.mixture.study import MERGES, SETS, Study
from benchmarks.mixture.tasks import Task
from dylo_moe.core import load_tokenizer

RESULT = Path(__file__).with_name("apart.json")
Measure = Callable[[Study, Arm, Sequence[Task]], Any]


def held_out_losses(study: Study, arm: Arm, tasks: Sequence[Task]) -> dict[str, list[list[float]]]:
    """Return what an arm does on each held-out row of each task; see ``measured_rows``."""
    return {task.name: study.found(arm, task, index) for index, task in enumerate(tasks)}


OF_EACH_ARM: dict[str, Measure] = {
    "losses": held_out_losses,
    "switching": losses_after_a_switch,
    "answers": generated_answers,
}
OF_ALL = {"unknown": losses_of_unknown_tasks, "merges": difference_of_one_adapter, "costs": costs}


def measure_arms(study: Study, part: str, number: int, seed: int, arms: Sequence[str]) -> None:
    """Measure the arms on the first tasks of the set, those that are not in the file yet."""
    tasks = study.tasks[:number]
    for name in arms:
        key = f"{study.name}/{number}/{seed}/{name}" if part == "losses" else f"{part}/{study.name}/{seed}/{name}"
        if key in study.results.content["runs"]:
            continue
        sys.stderr.write(f"{key}\n")
        arm, options = study.arm(name, study.setting(tasks, seed), tasks)
        found = {"tasks": OF_EACH_ARM[part](study, arm, tasks), "seconds": round(arm.seconds, 2), **options}
        study.results.run(key, lambda found=found: found)


def measure_all(study: Study, part: str, number: int, seed: int) -> None:
    """Measure a part that is not of one arm, unless it is in the file."""
    study.results.run(
        f"{part}/{study.name}/{number}/{seed}",
        lambda: OF_ALL[part](study, study.setting(study.tasks[:number], seed)),
    )


def main() -> None:
    """Read the flags, measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of public data")
    parser.add_argument("--work", type=Path, default=Path("results/mixture"), help="folder for adapters")
    parser.add_argument("--parts", nargs="+", default=["losses"], choices=[*OF_EACH_ARM, *OF_ALL])
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=SETS)
    parser.add_argument("--numbers", type=int, nargs="+", default=[15, 2, 5, 9], help="numbers of adapters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[*ARMS, *MERGES, "joint", *TUNED_ARMS])
    args = parse_flags(parser, RESULT)
    if not args.show:
        if args.folder is None or not (args.folder / "superni").is_dir():
            parser.error(f"FOLDER must hold superni and mbxp, got {args.folder}")
        results, tokenizer = Results(args.output, environment()), load_tokenizer(MODEL)
        studies = [Study(name, SETS[name](args.folder), results, args.work, tokenizer) for name in args.sets]
        for part in args.parts:
            for number in args.numbers:
                for study in studies:
                    size = min(number, len(study.tasks))
                    for seed in args.seeds:
                        if part in OF_EACH_ARM:
                            measure_arms(study, part, size, seed, args.arms)
                        else:
                            key = f"{part}/{study.name}/{size}/{seed}"
                            results.run(
                                key, lambda s=study, n=size, r=seed, p=part: OF_ALL[p](s, s.setting(s.tasks[:n], r))
                            )
    sys.stdout.write(table(json.loads(args.output.read_text())) + "\n")


if __name__ == "__main__":
    main()
