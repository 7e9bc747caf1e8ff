"""The commands of ``docs/cloud.md`` work: shells parse them, and our own programs accept their flags."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dylo_moe.cli import main
from dylo_moe.config.commands import BenchmarkArgs, TrainConfig
from dylo_moe.config.parser import parse
from tests.support.secret_scan import TOKEN

ROOT = Path(__file__).parents[2]


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


BLOCKS = blocks_of((ROOT / "docs" / "cloud.md").read_text())
README = blocks_of((ROOT / "README.md").read_text().partition("## In a cloud\n")[2].partition("\n## ")[0])
GROUPS = {"--train": TrainConfig, "--benchmark": BenchmarkArgs}


def commands(blocks: list[str]) -> Iterator[list[str]]:
    """Yield each command as words, with a value for each variable."""
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        yield shlex.split(re.sub(r"\$[A-Z]\w*", "my-value", line), comments=True)


def test_a_shell_parses_every_block() -> None:
    assert len(BLOCKS) >= 9
    for block in BLOCKS:
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_every_variable_is_set_before_it_is_used() -> None:
    known = {"HOME"}
    for line in "\n".join(BLOCKS).splitlines():
        assert set(re.findall(r"\$([A-Z]\w*)", line)) <= known, line
        known |= set(re.findall(r"\b([A-Z][A-Z_]+)=", line))


def test_our_programs_accept_the_flags() -> None:
    found = 0
    for words in commands(BLOCKS + README):
        for name, groups in GROUPS.items():
            if name in words:
                assert parse(groups, name, "", words[words.index(name) + 1 :])
                found += 1
    assert found == 6, "four to train and two to benchmark"


def test_the_job_of_the_page_is_valid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DYLO_MOE_IMAGE", "us-central1-docker.pkg.dev/my-project/dylora-moe/dylora-moe:0.1.0-cuda")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    jobs = [words[2:] for words in commands(BLOCKS + README) if words[:2] == ["python", "submit_full_training.py"]]
    assert len(jobs) == 2
    for job in jobs:
        assert main(["submit", *job, "--project", "my-project", "--region", "us-central1", "--dry_run"]) == 0
    assert TOKEN not in capsys.readouterr().out


def test_the_scripts_that_are_named_exist() -> None:
    for words in commands(BLOCKS + README):
        scripts = [word for word in words[:2] if word.endswith((".py", ".sh"))]
        assert all((ROOT / script).is_file() for script in scripts)
