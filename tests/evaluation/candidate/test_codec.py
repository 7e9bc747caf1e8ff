"""Plain values arrive unchanged, and any other object arrives as something equal to nothing."""

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy
import pytest

from dylo_moe.evaluation.candidate import codec

PLAIN = [
    None,
    True,
    -1,
    2**20000,
    0.1,
    -0.0,
    math.inf,
    1 + 2j,
    "a\ud800\n\x1b",
    b"\x00\xff",
    [1, [2.0, (3,)]],
    (),
    {1, "a"},
    frozenset({2}),
    {(1, 2): [3]},
    Counter("aab"),
    OrderedDict(b=1, a=2),
    defaultdict(None, {1: [2]}),
    deque([1, 2]),
    range(3, 10, 2),
    numpy.float32(1.5),
    numpy.int64(-7),
    numpy.bool_(True),
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_a_plain_value_arrives_with_its_exact_type(value: Any) -> None:
    arrived = codec.decode(codec.encode(value))
    assert arrived == value and type(arrived) is type(value)
    assert math.copysign(1, arrived) == -1 if isinstance(value, float) and str(value) == "-0.0" else True


class Always(str):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        raise AssertionError("no method of a value is called")

    __str__ = __reduce__ = __repr__  # type: ignore[assignment]


def test_a_subclass_is_opaque_and_equal_to_nothing() -> None:
    arrived = codec.decode(codec.encode([Always("right")]))[0]
    assert isinstance(arrived, codec.Opaque) and arrived.type_name == "Always"
    assert arrived != "right" and arrived != codec.Opaque("Always")


def test_a_name_stands_for_an_object_on_either_side() -> None:
    here, there = object(), object()
    text = codec.encode([1, here], {"root": here})
    assert codec.decode(text, {"root": there}) == [1, there]


def test_iterators_arrive_as_iterators_and_endless_ones_do_not() -> None:
    arrived = codec.decode(codec.encode(map(str, [1, 2])))
    assert arrived != ["1", "2"] and list(arrived) == ["1", "2"]
    assert isinstance(codec.decode(codec.encode(iter(range(3)).__class__)), codec.Opaque)
    assert isinstance(codec.decode(codec.encode(number for number in iter(int, 1))), codec.Opaque)
    assert isinstance(codec.decode(codec.encode(range(10**18))), codec.Opaque)


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "[]",
        '["object"]',
        '["int"]',
        '["int", 5]',
        '["int", "0x1", 2]',
        '["numpy", "load", ["int", "0x1"]]',
        '["numpy", "float64", ["list", []]]',
        '["list", 3]',
        '["dict", [[1]]]',
        '["set", [["list", []]]]',
        '["name", "absent"]',
        '["range", "0x0", "0x1", "0x0"]',
        "[" * 100_000,
        "no JSON",
        "",
    ],
)
def test_what_encode_did_not_write_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        codec.decode(text)


@pytest.mark.parametrize("line", [b"", b"3", b'["ok"]', b'["ok", 1]', b'["raised", 3]', b'["ready", 1]', b'["done"]'])
def test_a_line_of_another_form_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        codec.decode_line(line)


LARGE = [
    [float(number) for number in range(100_000)],
    "x" * 10**6,
    7**400_000,
    [("a", "b")] * 200_000,
    {number: [str(number)] for number in range(50_000)},
    {str(number) for number in range(50_000)},
]


@pytest.mark.parametrize("value", LARGE, ids=lambda value: type(value).__name__)
def test_a_large_value_travels_as_a_digest(value: Any) -> None:
    text = codec.encode(value)
    assert len(text) < 100 and json.loads(text)[0] == "digest"
    assert codec.decode(text) == codec.Digest.of(value)
    assert len(codec.encode(value, max_text=codec.UNLIMITED)) > 100_000


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2, True], [1.0, 2 + 0j, 1]),
        ({1: "a", 2: "b"}, {2: "b", 1.0: "a"}),
        ({1, 2, 3}, frozenset({3, 2.0, 1})),
        ({1: 2}, defaultdict(None, {1: 2})),
        (-0.0, 0),
        ([numpy.float64(2.0)], [2]),
    ],
)
def test_digests_are_equal_where_values_are(one: Any, other: Any) -> None:
    assert one == other
    assert codec.Digest.of(one) == codec.Digest.of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1], (1,)),
        ([-1], [-2]),  # these two have the same hash
        ([[1], [2]], [[1, 2]]),
        (["a", "b"], ["ab"]),
        ([("a",), ("b",)], [("a", "b")]),
        ({1: 2}, {2: 1}),
        ([1], ["1"]),
        ([None], [0]),
        ([object()], [object()]),
    ],
)
def test_digests_differ_where_values_do(one: Any, other: Any) -> None:
    assert one != other
    assert codec.Digest.of(one) != codec.Digest.of(other)
