"""The documentation matches the code, and every figure in it comes from a committed result."""

import re
from pathlib import Path

from dylo_moe.config.commands import AcquireConfig, BenchmarkArgs, GenerateArgs, TrainConfig
from dylo_moe.config.parser import parse
from dylo_moe.data.registry import REGISTRY
from tools import write_flags, write_tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands(program: str) -> list[list[str]]:
    """Return the arguments of each README command that runs a program."""
    lines = re.findall(rf"^(?:python {program}\.py|dylora-moe {program}) (.*)$", README, flags=re.MULTILINE)
    return [re.findall(r'"[^"]*"|\S+', line) for line in lines]


def test_the_flags_page_matches_the_code() -> None:
    written = write_flags.page()
    assert (ROOT / "docs" / "flags.md").read_text() == written, "run `make docs`"


def test_every_command_of_the_readme_parses() -> None:
    assert len(commands("train")) >= 5 and len(commands("generate")) >= 2 and len(commands("benchmark")) >= 4
    assert len(commands("acquire")) >= 2
    every = {
        "train": TrainConfig,
        "generate": GenerateArgs,
        "benchmark": BenchmarkArgs,
        "acquire": AcquireConfig,
    }
    for program, groups in every.items():
        for arguments in commands(program):
            assert parse(groups, program, "", [argument.strip('"') for argument in arguments])


def test_the_tables_match_the_committed_results() -> None:
    used = [name for path in write_tables.PAGES for name in re.findall("<!-- table: (.*?) -->", path.read_text())]
    assert sorted(used) == sorted(write_tables.TABLES), "each table is on one page"
    for path in write_tables.PAGES:
        assert path.read_text() == write_tables.page(path), f"{path.name}: run `make docs`"


def test_the_readme_names_every_dataset_and_its_license() -> None:
    section = README.partition("## Datasets")[2].partition("## ")[0]
    for name, spec in REGISTRY.items():
        (row,) = re.findall(rf"^\| `{name}` \| .* \|$", section, flags=re.MULTILINE)
        assert spec.license in row
        assert not isinstance(spec.source, str) or spec.source in row


def test_relative_links_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
