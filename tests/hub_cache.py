"""Repositories in a cache of the Hub, laid out as ``huggingface_hub`` does, and a machine that notes what it asks."""

import shutil
import socket
from pathlib import Path

import pytest


def put_in_cache(cache: Path, repo: str, folder: Path, *, commit: str, refs: tuple[str, ...] = ()) -> Path:
    """Copies a folder into the cache as a commit of a repository, which branches or tags may point to."""
    place = cache / f"models--{repo.replace('/', '--')}"
    for ref in refs:
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / ref).write_text(commit)
    return Path(shutil.copytree(folder, place / "snapshots" / commit))


def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process look into another cache; it is offline, as all tests are."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def note_questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes this process online, to a network that answers nothing; returns the hosts that it asks for."""
    asked: list[str] = []

    def refuse(host: object, *rest: object, **options: object) -> None:
        asked.append(str(host))
        raise socket.gaierror("there is no network here")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked
