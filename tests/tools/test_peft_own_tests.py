"""The report that is computed from a run of PEFT's own tests; PEFT's tests are not run here."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from torch import nn

from tools import peft_own_tests as own
from tools import peft_stand_ins
from tools.peft_own_tests import Difference, KnownDifference
from tools.peft_routing_plugin import ModelRouter, fingerprint, may_build_lora, refusal_reason, summarize

TOOLS = Path(own.__file__).parent


def record(outcome: str, error: str = "", **notes: Any) -> dict[str, Any]:
    return {"outcome": outcome, "error": error, **notes}


def report(when: str, outcome: str = "passed", longrepr: object = None) -> Any:
    notes = [("lora", ["lora.layer.Linear"]), ("lora", ["adalora.layer.SVDLinear"])]
    return SimpleNamespace(
        nodeid="t::a", when=when, outcome=outcome, longrepr=longrepr, duration=0.5, user_properties=notes
    )


def item(**parameters: object) -> Any:
    return SimpleNamespace(callspec=SimpleNamespace(params=parameters))


def small(**options: Any) -> Any:
    return get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0"], **options))


def test_a_difference_is_another_outcome_or_exception() -> None:
    plain = {
        "same": record("passed"),
        "broken": record("passed"),
        "fixed": record("failed", "KeyError: 'a'"),
        "numbers": record("failed", "AssertionError: 1.0"),
        "bare": record("failed", "assert 1 == 2"),
        "other": record("failed", "KeyError: 'a'"),
        "only plain": record("passed"),
    }
    routed = {
        "same": record("passed"),
        "broken": record("failed", "TypeError: no"),
        "fixed": record("passed"),
        "numbers": record("failed", "AssertionError: 1.5"),
        "bare": record("failed", "AssertionError: 1 == 3"),
        "other": record("failed", "TypeError: no"),
        "new": record("passed"),
    }
    assert own.compare(plain, routed) == [
        Difference("broken", "passed", "failed", "TypeError: no"),
        Difference("fixed", "failed", "passed", "KeyError: 'a'"),
        Difference("other", "failed", "failed", "TypeError: no"),
        Difference("new", "not run", "passed", ""),
    ]


def test_a_known_difference_matches_by_id_prefix_and_error() -> None:
    known = [KnownDifference(("a.py::one", "a.py::two"), "TypeError", "first"), KnownDifference(("a.py",), "", "any")]
    found = [
        Difference(f"{test}[x]", "passed", "failed", "TypeError: no") for test in ("a.py::two", "a.py::six", "b.py")
    ]
    assert [entry["reason"] for entry in own.explain(found, known)] == ["first", "any", None]
    other_error = Difference("a.py::one", "passed", "failed", "KeyError")
    assert own.explain([other_error], known)[0]["reason"] == "any"


def test_outdated_known_differences_are_named() -> None:
    known = [KnownDifference(("a.py::one",), "", "a"), KnownDifference(("b.py", "c.py"), "", "b")]
    ran = ["a.py::one[x]", "c.py::two"]
    assert own.outdated([Difference("a.py::one[x]", "passed", "failed", "")], known, ran) == ["b"]
    assert own.outdated([], known, ["d.py::three"]) == []


def test_every_committed_known_difference_has_a_reason() -> None:
    for entry in own.read_known(TOOLS / "peft_differences.json"):
        assert entry.tests and all(test.startswith("tests/test_") for test in entry.tests)
        assert entry.reason.endswith(".")


def test_the_last_record_of_a_test_counts() -> None:
    lines = [{"id": "a", "outcome": "failed"}, {"id": "b", "outcome": "passed"}, {"id": "a", "outcome": "passed"}]
    found = own.read_records("\n".join(map(json.dumps, lines)))
    assert {test: entry["outcome"] for test, entry in found.items()} == {"a": "passed", "b": "passed"}


def test_outcomes_and_models_are_counted() -> None:
    records = [
        record("passed", routed=[["Linear"], ["Linear", "SVDLinear"]]),
        record("failed", "E", refused=["conv", "conv"], changed_by_refusal=["conv"]),
        record("not collected: skipped"),
    ]
    assert own.counts(records) == {"passed": 1, "failed": 1, "skipped": 0, "not run": 0, "not collected": 1}
    assert own.count_models(records) == {
        "routed": {"Linear": 2, "SVDLinear": 1},
        "refused": {"conv": 2},
        "changed_by_refusal": {"conv": 1},
    }
    assert own.errors_of_failed(records) == {"E": 1}


def test_the_table_names_unexplained_differences() -> None:
    row = dict.fromkeys(own.OUTCOMES, 3)
    result = {
        "versions": {"peft": "1"},
        "tests": {"collected": 9, "left_out": 6, "run": 3},
        "plain": row,
        "plain_with_lora": row,
        "routed": row,
        "models": {"routed": {"Linear": 7}},
        "differences": [{"id": "t", "plain": "passed", "routed": "failed", "error": "E", "reason": None}],
        "unsteady": [],
        "outdated": ["old"],
    }
    text = own.table(result)
    assert "1: NOT EXPLAINED\n  t: passed -> failed: E" in text and "      7  Linear" in text
    assert "No longer differs: old" in text


def test_a_record_keeps_the_worst_phase_and_all_notes() -> None:
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message="TypeError: no\nand more"))
    found = summarize([report("setup"), report("call", "failed", crash), report("teardown")])
    assert found == {
        "id": "t::a",
        "outcome": "failed",
        "error": "TypeError: no",
        "seconds": 1.5,
        "lora": [["lora.layer.Linear"], ["adalora.layer.SVDLinear"]],
    }
    skipped = summarize([report("setup", "skipped", ("file", 3, "Skipped: no GPU")), report("teardown")])
    assert (skipped["outcome"], skipped["error"]) == ("skipped", "Skipped: no GPU")


@pytest.mark.parametrize(
    ("test", "wanted"),
    [
        (SimpleNamespace(), True),
        (item(model="MLP"), True),
        (item(config=LoraConfig), True),
        (item(config=AdaLoraConfig(total_step=1)), True),
        (item(configs=[VeraConfig(), LoraConfig()]), True),
        (item(config=VeraConfig, model="MLP"), False),
    ],
)
def test_tests_of_other_peft_methods_are_recognized(test: Any, wanted: bool) -> None:
    assert may_build_lora(test) is wanted


def test_a_refusal_reason_is_the_same_for_all_models() -> None:
    layers = ["base_model.model.lin0", "base_model.model.lin0.inner", "lin"]
    message = "base_model.model.lin0.inner uses 'a', lin and linear stay"
    assert refusal_reason(message, layers) == "LAYER uses NAME, LAYER and linear stay"


def test_a_routed_layer_counts_as_its_base_class() -> None:
    router, test = ModelRouter(enable=True), SimpleNamespace(user_properties=[])
    router.pytest_runtest_setup(test)  # type: ignore[arg-type]
    model = small()
    before = fingerprint(model)
    router.route(model)
    router.route(model)
    assert fingerprint(model) != before
    assert test.user_properties == [(key, ["lora.layer.Linear"]) for key in ("lora", "routed")] * 2


def test_a_refused_model_is_counted_and_unchanged() -> None:
    router, test = ModelRouter(enable=True), SimpleNamespace(user_properties=[])
    router.pytest_runtest_setup(test)  # type: ignore[arg-type]
    model = small(use_dora=True)
    before = fingerprint(model)
    router.route(model)
    assert [key for key, _ in test.user_properties] == ["lora", "refused"] and fingerprint(model) == before


def test_stand_ins_are_reproducible() -> None:
    name = "peft-internal-testing/tiny-random-OPTForCausalLM"
    first, second = (dict(peft_stand_ins.build_model(name).named_parameters()) for _ in range(2))
    assert all(first[key].equal(second[key]) for key in first)
    assert {base for base, _ in peft_stand_ins.ADAPTERS.values()} <= set(peft_stand_ins.MODELS)
