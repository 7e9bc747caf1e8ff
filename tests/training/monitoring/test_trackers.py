"""Resolving the names of trackers, and the error for one that is not installed."""

import pytest

from dylo_moe.config.commands import TRACKERS
from dylo_moe.errors import ConfigError
from dylo_moe.training.monitoring.trackers import INSTALLED, resolve_trackers


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in INSTALLED:
        monkeypatch.setitem(INSTALLED, name, lambda name=name: name in names)


def test_auto_is_tensorboard_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorboard", "wandb")
    assert resolve_trackers(["auto"]) == ["tensorboard"]
    install(monkeypatch, "wandb")
    assert resolve_trackers(["auto"]) == []


def test_several_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *TRACKERS)
    assert resolve_trackers(["wandb", "mlflow", "trackio"]) == ["wandb", "mlflow", "trackio"]
    assert resolve_trackers(["none"]) == []


def test_the_error_for_a_missing_tracker_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "wandb")
    with pytest.raises(ConfigError, match=r"`report_to` wandb,mlflow,trackio: .* pip install mlflow trackio$"):
        resolve_trackers(["wandb", "mlflow", "trackio"])


def test_every_tracker_of_the_flag_is_known_here() -> None:
    assert tuple(INSTALLED) == TRACKERS
