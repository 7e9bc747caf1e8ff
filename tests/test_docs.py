"""The documentation matches the code, and every figure in it comes from a committed result."""

import re
import shlex
from pathlib import Path

from dylo_moe.config import (
    AcquireConfig,
    BenchmarkArgs,
    DatasetsArgs,
    ExpertsArgs,
    GenerateArgs,
    TrainConfig,
    parse,
)
from dylo_moe.data.registry import REGISTRY
from tools import write_flags, write_tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEXT = "\n".join([README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))])


def commands(program: str) -> list[list[str]]:
    """Return the arguments of each command of the pages that runs a program: a line of a block, or in backquotes."""
    called = rf"(?:python {program}\.py|dylora-moe {program})"
    text = TEXT.replace("\\\n", " ")
    lines = re.findall(rf"^(?: {{4}})?{called}( .*)?$", text, flags=re.MULTILINE) + re.findall(
        rf"`{called}( [^`]+)`", text
    )
    return [shlex.split(line, comments=True) for line in lines]


def test_the_flags_page_matches_the_code() -> None:
    written = write_flags.page()
    assert (ROOT / "docs" / "flags.md").read_text() == written, "run `make docs`"


def test_every_command_of_the_pages_parses() -> None:
    every = {
        "train": (TrainConfig, 6),
        "generate": (GenerateArgs, 2),
        "benchmark": (BenchmarkArgs, 9),
        "acquire": (AcquireConfig, 4),
        "experts": (ExpertsArgs, 6),
        "datasets": (DatasetsArgs, 1),
    }
    for program, (config, least) in every.items():
        found = commands(program)
        assert len(found) >= least, program
        for arguments in found:
            named = program == "experts" and arguments and not arguments[0].startswith("-")
            assert parse(config, program, "", ["--checkpoint", *arguments] if named else arguments)


def test_every_target_and_module_that_the_pages_name_exists() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"(?:^|`)make ([\w-]+)", TEXT, flags=re.MULTILINE)
    assert len(named) >= 8 and {*named} <= {*targets}
    modules = re.findall(r"python -m ((?:benchmarks|tests|tools)[\w.]*)", TEXT)
    assert len(modules) >= 6
    for module in modules:
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


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
