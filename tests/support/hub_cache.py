"""Put repositories into a Hub cache with the layout of ``huggingface_hub``, and record requests to the network."""

import shutil
import socket
from pathlib import Path

import pytest


def put_in_cache(cache: Path, repo: str, folder: Path, *, commit: str, refs: tuple[str, ...] = ()) -> Path:
    """Copy a folder into the cache as a commit of a repository; ``refs`` are branches or tags of that commit."""
    root = cache / f"models--{repo.replace('/', '--')}"
    for ref in refs:
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return Path(shutil.copytree(folder, root / "snapshots" / commit))


def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process use another Hub cache; it stays offline, as in every test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def record_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put this process online, on a network without answers; return the list that records the requested hosts."""
    hosts: list[str] = []

    def refuse(host: object, *rest: object, **options: object) -> None:
        hosts.append(str(host))
        raise socket.gaierror("there is no network here")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return hosts
