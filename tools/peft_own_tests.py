"""Run PEFT's own tests with and without routing, and list what differs.

    pip download --no-deps --no-binary :all: peft==0.21.2
    pip install -r requirements.lock parameterized scipy scikit-learn diffusers
    HF_HUB_OFFLINE=1 python -m tools.peft_own_tests peft-0.21.2.tar.gz --output results/peft.json

The source distribution on PyPI contains ``tests/``; the wheel does not. It must have the installed version, because the
tests are unpacked to a temporary folder and run against the installed package. The first run leaves them unchanged. The
second run applies ``dylo_moe.enable_routing`` to every model with LoRA layers (see ``peft_routing_plugin.py``). A model
without ``routing_weights`` must behave as in plain PEFT, so every test should have the same outcome. A test with a
different outcome is repeated in both runs. If it differs again, ``peft_differences.json`` must explain it, or the exit
code is 1.

Offline, stand-ins replace the models of the Hub (see ``peft_stand_ins.py``).

Not covered: tests of PEFT methods other than LoRA, which build no LoRA layer; tests that build no LoRA model in the
first run, which the second run leaves out; GPU tests; the mixture itself, which this repository tests.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
OUTCOMES = ("passed", "failed", "skipped", "not run", "not collected")
PACKAGES = ("peft", "torch", "transformers", "accelerate", "pytest")

Record = dict[str, Any]
Records = dict[str, Record]


@dataclass(frozen=True)
class Difference:
    """A test whose outcome differs between the two runs.

    Attributes:
        id: Id of the test in pytest.
        plain: Outcome without routing.
        routed: Outcome with routing.
        error: First line of the error; that of the routed run if the test failed there.
    """

    id: str
    plain: str
    routed: str
    error: str


def outcomes_table(result: Mapping[str, Any]) -> str:
    """Return a Markdown table of a result: the tests that build a LoRA model, without and with routing."""
    versions, rows = result["versions"], []
    for title, key in (("plain PEFT", "plain_with_lora"), ("`enable_routing` on every model", "routed")):
        outcomes = result[key]
        rows.append(f"| {title} | {outcomes['passed']:,} | {outcomes['failed']} | {outcomes['skipped']} |")
    note = (
        f"PEFT {versions['peft']}, torch {versions['torch']}, transformers {versions['transformers']}. "
        f"{len(result['differences'])} tests end differently."
    )
    return "\n".join(["| tests | passed | failed | skipped |", "| --- | --- | --- | --- |", *rows, "", note])


@dataclass(frozen=True)
class KnownDifference:
    """A difference with an explanation.

    Attributes:
        tests: Prefixes of the test ids that it explains.
        error: Text that the error must contain; empty for any.
        reason: Why routing causes the difference, and why that is correct or not yet fixed.
    """

    tests: tuple[str, ...]
    error: str
    reason: str

    def explains(self, difference: Difference) -> bool:
        """Return whether the difference is this known one."""
        return difference.id.startswith(self.tests) and self.error in difference.error


def main(argv: list[str] | None = None) -> int:
    """Run the tests both ways, print and write the report, and return the exit code."""
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="peft-tests-") as folder:
        suite = Suite(arguments, Path(folder))
        plan = suite.plan()
        selected = [test for test, may_build_lora in plan if may_build_lora]
        plain = suite.run_plain(selected)
        with_lora = [test for test in selected if plain.get(test, {}).get("lora")]
        routed = suite.run("enable", with_lora)
        if not any("routed" in record for record in routed.values()):
            raise RuntimeError("no test built a model that enable_routing accepts, so nothing was compared")
        suspects = compare(plain, routed)
        again = [difference.id for difference in suspects]
        repeated = compare(suite.run("observe", again), suite.run("enable", again)) if again else []
    steady = {difference.id for difference in repeated}
    differences = [difference for difference in suspects if difference.id in steady]
    known = read_known(arguments.differences)
    explained = explain(differences, known)
    result = {
        "versions": {name: version(name) for name in PACKAGES} | {"source": source_revision(arguments.source)},
        "stand_ins": arguments.stand_ins,
        "tests": {"collected": len(plan), "left_out": len(plan) - len(selected), "run": len(selected)},
        "plain": counts(plain.values()),
        "plain_with_lora": counts(plain[test] for test in with_lora),
        "routed": counts(routed[test] for test in with_lora),
        "models": count_models(routed.values()),
        "differences": explained,
        "unsteady": sorted(set(again) - steady),
        "outdated": outdated(differences, known, with_lora),
        "failed_in_both": errors_of_failed(plain.values()),
    }
    sys.stdout.write(table(result) + "\n")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(difference["reason"] is None for difference in explained))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sdist", type=Path, help="PEFT's source distribution, a .tar.gz")
    parser.add_argument("--source", type=Path, default=TOOLS.parent / "src", help="folder with the package dylo_moe")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="files below the distribution's root to run")
    parser.add_argument("--output", type=Path, help="JSON file to write the result to")
    parser.add_argument("--plain", type=Path, help="file with the plain run's records; its tests are not run again")
    parser.add_argument("--differences", type=Path, default=TOOLS / "peft_differences.json", help="known differences")
    parser.add_argument("--workers", type=int, default=1, help="processes that run tests")
    parser.add_argument(
        "--stand-ins",
        action="store_true",
        default=os.environ.get("HF_HUB_OFFLINE") == "1",
        help="replace the Hub's models with tiny random ones; default: only if HF_HUB_OFFLINE=1",
    )
    return parser.parse_args(argv)


class Suite:
    """PEFT's tests, unpacked to a temporary folder."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.folder = folder
        self.root = unpack(arguments.sdist, folder)
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(TOOLS), str(arguments.source.resolve())]),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if arguments.stand_ins:
            cache = folder / "hub"
            self.environment |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
            command = [sys.executable, str(TOOLS / "peft_stand_ins.py"), str(cache)]
            subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def plan(self) -> list[tuple[str, bool]]:
        """Return the id of each test, and whether it may build a LoRA model."""
        path = self.folder / "plan.json"
        self._pytest("observe", self.folder / "plan.jsonl", ["--collect-only", f"--plan={path}"])
        return [(test, may_build_lora) for test, may_build_lora in json.loads(path.read_text())]

    def run_plain(self, tests: list[str]) -> Records:
        """Run the tests without routing that no earlier record covers, and return all records."""
        path = self.arguments.plain
        records = read_records(path.read_text()) if path is not None and path.exists() else {}
        missing = [test for test in tests if test not in records]
        if missing:
            records |= self.run("observe", missing)
        if path is not None:
            path.write_text("".join(json.dumps(record) + "\n" for record in records.values()))
        wanted = set(tests)
        return {test: record for test, record in records.items() if test in wanted or "seconds" not in record}

    def run(self, routing: str, tests: list[str]) -> Records:
        """Run tests and return the record of each."""
        only, path = self.folder / "only.json", self.folder / f"{routing}.jsonl"
        only.write_text(json.dumps(tests))
        self._pytest(routing, path, [f"--only={only}", f"--numprocesses={self.arguments.workers}"])
        not_run = {test: {"id": test, "outcome": "not run", "error": ""} for test in tests}
        return not_run | read_records(path.read_text())

    def _pytest(self, routing: str, records: Path, flags: list[str]) -> None:
        command = [sys.executable, "-m", "pytest", *self.arguments.tests, "-p", "peft_routing_plugin"]
        command += ["--quiet", "--tb=line", "--continue-on-collection-errors", "--disable-warnings"]
        command += [f"--routing={routing}", f"--records={records}", *flags]
        command += ["--offline"] if self.arguments.stand_ins else []
        log = records.with_suffix(".log")
        with log.open("w") as file:
            code = subprocess.run(command, cwd=self.root, env=self.environment, stdout=file, stderr=file).returncode
        if code not in (0, 1):
            raise RuntimeError(f"pytest ended with {code}:\n" + log.read_text()[-4000:])


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack a source distribution, make its tests a package, and return the root."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    root = next(path for path in folder.iterdir() if path.is_dir())
    wanted, found = f"peft-{version('peft')}", root.name
    if found != wanted:
        raise ValueError(f"{sdist} contains {found}, but {wanted} is installed; the versions must be equal")
    (root / "tests" / "__init__.py").touch()
    (root / "pytest.ini").write_text("[pytest]\n")
    return root


def read_records(text: str) -> Records:
    """Return the records of JSON lines by test id; the last record of an id counts."""
    records = [json.loads(line) for line in text.splitlines()]
    return {record["id"]: record for record in records}


def read_known(path: Path) -> list[KnownDifference]:
    """Return the known differences of a JSON file."""
    entries = json.loads(path.read_text())
    return [KnownDifference(tuple(entry["tests"]), entry.get("error", ""), entry["reason"]) for entry in entries]


def compare(plain: Records, routed: Records) -> list[Difference]:
    """Return the tests of the routed run whose outcome differs from the plain run.

    A test also differs if it fails in both runs with different types of exception.
    """
    differences = []
    for test, record in routed.items():
        before = plain.get(test, {"outcome": "not run"})
        if before["outcome"] != record["outcome"] or exception_type(before) != exception_type(record):
            error = record["error"] if record["outcome"] != "passed" else before.get("error", "")
            differences.append(Difference(test, before["outcome"], record["outcome"], error))
    return differences


def exception_type(record: Record) -> str:
    """Return the type name of a failed test's exception; empty if the test did not fail."""
    if record["outcome"] != "failed":
        return ""
    name = record["error"].partition(":")[0]
    return "AssertionError" if name.startswith("assert ") else name


def explain(differences: list[Difference], known: list[KnownDifference]) -> list[Record]:
    """Return the differences, each with the reason of the first known difference that explains it, or None."""
    return [
        vars(difference) | {"reason": next((entry.reason for entry in known if entry.explains(difference)), None)}
        for difference in differences
    ]


def outdated(differences: list[Difference], known: list[KnownDifference], ran: list[str]) -> list[str]:
    """Return the reasons of known differences whose tests ran and no longer differ."""
    return [
        entry.reason
        for entry in known
        if any(test.startswith(entry.tests) for test in ran) and not any(map(entry.explains, differences))
    ]


def counts(records: Iterable[Record]) -> dict[str, int]:
    """Return the number of tests with each outcome."""
    found = Counter(record["outcome"].partition(":")[0] for record in records)
    return {outcome: found[outcome] for outcome in OUTCOMES}


def count_models(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """Count the calls of enable_routing by layer classes, and the refused ones by reason."""
    records = list(records)
    routed = Counter(name for record in records for names in record.get("routed", ()) for name in names)
    refused = Counter(reason for record in records for reason in record.get("refused", ()))
    changed = Counter(message for record in records for message in record.get("changed_by_refusal", ()))
    return {
        "routed": dict(routed.most_common()),
        "refused": dict(refused.most_common()),
        "changed_by_refusal": dict(changed.most_common()),
    }


def errors_of_failed(records: Iterable[Record]) -> dict[str, int]:
    """Return the number of tests that failed with each error."""
    return dict(Counter(record["error"] for record in records if record["outcome"] == "failed").most_common())


def source_revision(source: Path) -> str:
    """Return the git commit of the source under test, marked if files differ from it; empty outside git."""
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def table(result: Record) -> str:
    """Return the report as text."""
    tests = result["tests"]
    lines = [
        ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        f"{tests['collected']} tests collected, {tests['left_out']} of other methods left out, {tests['run']} run",
        "",
        " " * 28 + "".join(f"{outcome:>15}" for outcome in OUTCOMES),
    ]
    titles = {"plain": "plain", "plain_with_lora": "plain, with LoRA models", "routed": "routed, the same"}
    for key, title in titles.items():
        lines.append(f"{title:28}" + "".join(f"{result[key][outcome]:15}" for outcome in OUTCOMES))
    for title, found in result["models"].items():
        lines += ["", f"Calls of enable_routing, {title.replace('_', ' ')}:"]
        lines += [f"{number:7}  {name}" for name, number in found.items()] or ["   none"]
    lines += ["", f"{len(result['differences'])} tests differ; {len(result['unsteady'])} more differed only once"]
    by_reason: dict[str, list[Record]] = {}
    for difference in result["differences"]:
        by_reason.setdefault(difference["reason"] or "NOT EXPLAINED", []).append(difference)
    for reason, differences in by_reason.items():
        lines += ["", f"{len(differences)}: {reason}"]
        lines += [f"  {found['id']}: {found['plain']} -> {found['routed']}: {found['error']}" for found in differences]
    lines += [f"No longer differs: {reason}" for reason in result["outdated"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
