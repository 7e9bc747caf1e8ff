"""The versions of the lowest environment and of the lock file agree with the bounds in pyproject.toml."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def requirements() -> list[Requirement]:
    """Return the dependencies of a plain install."""
    return [
        Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]


def test_the_lowest_environment_is_exactly_the_lower_bounds() -> None:
    lines = (ROOT / "requirements-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = {
        requirement.name: Version(part.version)
        for requirement in requirements()
        for part in requirement.specifier
        if part.operator == ">="
    }
    assert {name: Version(pin) for name, pin in pins.items()} == bounds


def test_every_dependency_has_a_lower_bound() -> None:
    for requirement in requirements():
        assert ">=" in str(requirement.specifier), requirement


def test_the_locked_versions_are_allowed() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.replace("_", "-").lower().split("==") for line in lines if "==" in line)
    for requirement in requirements():
        assert requirement.specifier.contains(locked[requirement.name]), requirement
