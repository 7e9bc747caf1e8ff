"""A pytest plugin that enables routing on the LoRA models that a test suite builds.

``peft_own_tests.py`` loads it into PEFT's own tests. After every ``PeftModel.__init__``, ``add_adapter`` and
``load_adapter`` (so after ``get_peft_model`` and ``from_pretrained`` too) it calls ``dylo_moe.enable_routing`` if the
model has LoRA layers. A model that is refused with a ``RoutingError`` stays plain, and the reason is counted. Any other
exception fails the test.

With ``--routing observe`` the plugin changes no model and only counts the models with LoRA layers.

It writes one JSON line for each test to ``--records``. Not covered: models of ``PeftMixedModel`` and
``inject_adapter_in_model``, which are not ``PeftModel`` objects.
"""

import functools
import inspect
import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, XLoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

PATCHED_METHODS = ("__init__", "add_adapter", "load_adapter")
WORST_FIRST = ("failed", "skipped", "passed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's flags to pytest."""
    group = parser.getgroup("routing")
    group.addoption("--routing", choices=("observe", "enable"), required=True, help="what to do with LoRA models")
    group.addoption("--records", type=Path, required=True, help="file for one JSON line per test")
    group.addoption("--plan", type=Path, help="file for the test ids, and whether each may build LoRA models")
    group.addoption("--only", type=Path, help="JSON list of the test ids to run; default: all")
    group.addoption("--test-seconds", type=int, default=300, help="time limit of one test")
    group.addoption(
        "--offline", action="store_true", help="never contact the Hub, not even for the first use of a model"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Patch PeftModel, and register the recorder in the process that sees all reports."""
    router = ModelRouter(enable=config.getoption("routing") == "enable")
    config.pluginmanager.register(router)
    for name in PATCHED_METHODS:
        setattr(PeftModel, name, router.after(getattr(PeftModel, name)))
    if config.getoption("offline"):
        _stay_offline()
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("records")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Write the plan if ``--plan`` is given, and deselect the tests that ``--only`` does not name."""
    plan, path = config.getoption("plan"), config.getoption("only")
    if plan is not None:
        ids = [[item.nodeid, may_build_lora(item)] for item in items]
        plan.write_text(json.dumps(ids))
    if path is not None:
        wanted = set(json.loads(path.read_text()))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
        items[:] = [item for item in items if item.nodeid in wanted]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Seed torch, and interrupt a test that exceeds its time limit."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the test exceeded its time limit")

    torch.manual_seed(0)
    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(item.config.getoption("test_seconds"))
    try:
        return (yield)
    finally:
        signal.alarm(0)


class ModelRouter:
    """Enabler of routing, which records the outcome for each model with the running test."""

    def __init__(self, *, enable: bool) -> None:
        self.enable = enable
        self.plain_classes: dict[type, type] = {}
        self.item: pytest.Item | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Remember the running test."""
        self.item = item

    def after(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that calls ``method`` and then routes its model."""

        @functools.wraps(method)
        def patched(model: PeftModel, *args: Any, **kwargs: Any) -> Any:
            result = method(model, *args, **kwargs)
            self.route(model)
            return result

        return patched

    def route(self, model: PeftModel) -> None:
        """Enable routing if the model has LoRA layers, and record the outcome."""
        if not isinstance(model, PeftModel):  # PeftMixedModel borrows PeftModel.load_adapter
            return
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        if not layers:
            return
        classes = [type(layer) for layer in layers.values()]
        names = sorted({class_name(self.plain_classes.get(cls, cls)) for cls in classes})
        self._note("lora", names)
        if not self.enable:
            return
        from dylo_moe import enable_routing
        from dylo_moe.errors import RoutingError

        before = fingerprint(model)
        try:
            enable_routing(model)
        except RoutingError as error:
            self._note("refused", refusal_reason(str(error), list(layers)))
            if fingerprint(model) != before:
                self._note("changed_by_refusal", str(error))
        else:
            self._note("routed", names)
            for layer, cls in zip(layers.values(), classes, strict=True):
                if type(layer) is not cls:  # enable_routing extended the layer's class
                    self.plain_classes[type(layer)] = cls

    def _note(self, key: str, value: object) -> None:
        if self.item is not None:
            self.item.user_properties.append((key, value))


class Recorder:
    """Writer of one JSON line for each finished test and for each file that could not be collected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.phases: dict[str, list[pytest.TestReport]] = {}
        path.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the report of a phase; write the test's record after the last phase, or when its process died."""
        phases = self.phases.setdefault(report.nodeid, [])
        phases.append(report)
        if report.when not in ("setup", "call"):
            self._write(summarize(self.phases.pop(report.nodeid)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write a record for a file that failed to import or skipped itself."""
        if report.outcome != "passed":
            self._write(
                {"id": report.nodeid, "outcome": f"not collected: {report.outcome}", "error": error_line(report)}
            )

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def may_build_lora(item: pytest.Item) -> bool:
    """Return False if the test's parameters name PEFT methods, and none of them has LoRA layers."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    methods = {method for value in parameters for method in config_classes(value)}
    return not methods or any(issubclass(method, (LoraConfig, XLoraConfig)) for method in methods)


def config_classes(value: object) -> Iterator[type[PeftConfig]]:
    """Yield the classes of the PEFT configs in a test's parameter."""
    if inspect.isclass(value) and issubclass(value, PeftConfig):
        yield value
    elif isinstance(value, PeftConfig):
        yield type(value)
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from config_classes(element)


def summarize(phases: list[pytest.TestReport]) -> dict[str, Any]:
    """Return a test's record: its worst outcome, the error of that phase, and the outcomes of its models."""
    worst = min(phases, key=lambda report: WORST_FIRST.index(report.outcome))
    notes: dict[str, list[Any]] = {}
    for key, value in phases[-1].user_properties:
        notes.setdefault(key, []).append(value)
    seconds = round(sum(report.duration for report in phases), 2)
    return {"id": worst.nodeid, "outcome": worst.outcome, "error": error_line(worst), "seconds": seconds, **notes}


def error_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the first line of a report's error, or the reason for its skip."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).strip().partition("\n")[0]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr or "") if crash is None else crash.message
    return text.strip().partition("\n")[0][:300]


def class_name(cls: type) -> str:
    """Return a layer class's module and name, without PEFT's own prefix."""
    return f"{cls.__module__.removeprefix('peft.tuners.')}.{cls.__qualname__}"


def fingerprint(model: nn.Module) -> list[tuple[str, type, int, int, tuple[str, ...]]]:
    """Return what a refusal must not change: classes, numbers of hooks, and names of attributes."""
    return [
        (name, type(module), len(module._forward_pre_hooks), len(module._forward_hooks), tuple(vars(module)))
        for name, module in model.named_modules()
    ]


def refusal_reason(message: str, layer_names: list[str]) -> str:
    """Return an error message with the model-specific names replaced."""
    for name in sorted(layer_names, key=len, reverse=True):
        message = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", "LAYER", message)
    return re.sub(r"'[^']*'", "NAME", message)


def _stay_offline() -> None:
    from tests import testing_utils

    @contextmanager
    def offline(model_id: str) -> Iterator[None]:
        yield

    testing_utils.hub_online_once = offline
