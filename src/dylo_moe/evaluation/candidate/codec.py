"""Encodes values that travel between processes that do not trust each other, as JSON of exact built-in types.

A value is encoded by its exact type, never by what its methods return: a subclass of ``str``, an object that claims
to be equal to everything, or one with a hostile ``__repr__`` or ``__reduce__`` becomes ``Opaque``, which is equal to
nothing. Decoding builds plain values and runs no code that came with them. A value whose text would be longer than
``MAX_TEXT`` travels as a digest instead; digests are equal where the values are, ``1 == 1.0`` included.
"""

import collections
import hashlib
import itertools
import json
import marshal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_TEXT = 1 << 18
"""Characters, approximately, of the longest value that travels whole."""

UNLIMITED = 1 << 40
"""More characters than any value has: the limit for what must not become a digest."""

MAX_ITERATOR_ITEMS = 100_000
"""Maximum number of items that are taken from an iterator; a longer one counts as opaque."""

_CHUNK = 10_000
_SEQUENCES: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    collections.deque: "deque",
    type({}.keys()): "keys",
    type({}.values()): "values",
}
_MAPPINGS: dict[type, str] = {
    dict: "dict",
    collections.OrderedDict: "OrderedDict",
    collections.Counter: "Counter",
    collections.defaultdict: "defaultdict",
}
_ITERATORS: tuple[type, ...] = (
    map,
    filter,
    zip,
    enumerate,
    reversed,
    type(iter([])),
    type(iter(())),
    type(_ for _ in ()),
)
_BUILD: dict[str, Callable[[list[object]], object]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
    "iterator": iter,
}
_BUILD_MAPPING: dict[str, Callable[[list[tuple[object, Any]]], object]] = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": lambda pairs: collections.Counter(dict(pairs)),
    "defaultdict": lambda pairs: collections.defaultdict(None, pairs),
}
_NUMPY = {"bool", "bool_", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))} | {
    "float16",
    "float32",
    "float64",
}


class _TooLargeError(Exception):
    pass


@dataclass(frozen=True, eq=False)
class Opaque:
    """Placeholder for an object that is not a plain value; equal to itself only."""

    type_name: str


@dataclass(frozen=True)
class Digest:
    """Placeholder for a value that is too large to travel."""

    hexdigest: str

    @classmethod
    def of(cls, value: object) -> "Digest":
        """Return the digest of a value: the same for equal values of plain types, unique for any other object."""
        state = hashlib.sha256()
        _update_digest(state.update, value)
        return cls(state.hexdigest())


def encode(value: object, names: Mapping[str, object] | None = None, max_text: int = MAX_TEXT) -> str:
    """Return a value as one line of JSON.

    Args:
        value: Any object.
        names: Objects that both sides know by a name, for those that are not plain values.
        max_text: Characters, approximately, beyond which the value becomes a digest.
    """
    try:
        return json.dumps(_to_json(value, [max_text], names or {}))
    except _TooLargeError:
        return json.dumps(["digest", Digest.of(value).hexdigest])


def decode(text: str | bytes, names: Mapping[str, object] | None = None) -> Any:
    """Return the value of a line that ``encode`` could have written.

    Raises:
        ValueError: ``encode`` cannot have written it.
    """
    try:
        return _checked_value(json.loads(text), names)
    except RecursionError as error:
        raise ValueError("not an encoded value: too deep") from error


def decode_line(line: bytes, names: Mapping[str, object] | None = None) -> tuple[str, object]:
    """Return the word and the content of a line from an answer's process: ``("ok", value)`` or another word and a text.

    Raises:
        ValueError: That process would not have written it.
    """
    try:
        word, *rest = json.loads(line)
    except (TypeError, RecursionError) as error:
        raise ValueError("not a line of an answer's process") from error
    if word == "ok" and len(rest) == 2:
        return "ok", _checked_value(rest[0], names)
    if word in ("failed", "raised") and len(rest) == 1 and isinstance(rest[0], str):
        return word, rest[0]
    if word == "ready" and not rest:
        return word, ""
    raise ValueError("not a line of an answer's process")


def _checked_value(tagged: object, names: Mapping[str, object] | None) -> object:
    try:
        return _from_json(tagged, names or {})
    except (LookupError, TypeError, AttributeError, RecursionError, OverflowError, ImportError) as error:
        raise ValueError(f"not an encoded value: {type(error).__name__}") from error


def _to_json(value: Any, room: list[int], names: Mapping[str, object]) -> object:
    """Return a value as JSON can hold it; ``room`` is one counter of characters for all levels of nesting."""
    kind = type(value)
    room[0] -= len(value) + 8 if kind is str or kind is bytes else 8
    if kind is int:
        room[0] -= value.bit_length() >> 2
    if room[0] < 0:
        raise _TooLargeError
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return ["int", hex(value)]
    if kind is float:
        return ["float", value.hex()]
    if kind is complex:
        return ["complex", value.real.hex(), value.imag.hex()]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is range:
        return ["range", hex(value.start), hex(value.stop), hex(value.step)]
    if kind in _SEQUENCES:
        return [_SEQUENCES[kind], [_to_json(item, room, names) for item in value]]
    if kind in _MAPPINGS:
        items = kind.items(value)
        return [_MAPPINGS[kind], [[_to_json(key, room, names), _to_json(item, room, names)] for key, item in items]]
    if kind in _ITERATORS:
        items = list(itertools.islice(value, MAX_ITERATOR_ITEMS + 1))
        if len(items) <= MAX_ITERATOR_ITEMS:
            return ["iterator", [_to_json(item, room, names) for item in items]]
    if _is_numpy_scalar(kind):
        return ["numpy", kind.__name__, _to_json(value.item(), room, names)]
    for name, known in names.items():
        if known is value:
            return ["name", name]
    return ["opaque", str(kind.__name__)[:80]]


def _is_numpy_scalar(kind: type) -> bool:
    if kind.__module__ != "numpy" or kind.__name__ not in _NUMPY:
        return False
    import numpy

    return getattr(numpy, kind.__name__, None) is kind


def _from_json(tagged: Any, names: Mapping[str, object]) -> object:
    if tagged is None or type(tagged) in (bool, str):
        return tagged
    tag, *rest = tagged
    if tag == "numpy":
        import numpy

        name, inner = rest[0], _from_json(rest[1], names)
        if name not in _NUMPY or type(inner) not in (bool, int, float):
            raise LookupError(name)
        return getattr(numpy, name)(inner)
    if tag == "range":
        start, stop, step = (int(text, 16) for text in rest)
        found = range(start, stop, step)
        # opaque where a list of it would not fit into memory
        return found if (stop - start) // step <= MAX_ITERATOR_ITEMS else Opaque("range")
    if tag in _BUILD_MAPPING:
        return _BUILD_MAPPING[tag]([(_from_json(key, names), _from_json(item, names)) for key, item in rest[0]])
    if tag in _BUILD:
        return _BUILD[tag]([_from_json(item, names) for item in rest[0]])
    return _LEAVES[tag](names, *rest)


_LEAVES: dict[str, Callable[..., object]] = {
    "int": lambda names, text: int(text, 16),
    "float": lambda names, text: float.fromhex(text),
    "complex": lambda names, real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
    "bytes": lambda names, text: bytes.fromhex(text),
    "digest": lambda names, text: Digest(str(text)),
    "opaque": lambda names, text: Opaque(str(text)),
    "name": lambda names, text: names[text],
}


def _update_digest(update: Callable[[bytes], object], value: Any) -> None:
    """Feed a value to a digest: the same bytes for equal values, and large uniform sequences at the speed of C."""
    kind = type(value)
    if kind is list or kind is tuple:
        update(b"[" if kind is list else b"(")
        update(str(len(value)).encode())
        for start in range(0, len(value), _CHUNK):
            chunk = list(value[start : start + _CHUNK])
            kinds = set(map(type, chunk))
            # the bytes of strings, and of tuples of strings, are equal exactly where they are
            if kinds == {str} or (kinds == {tuple} and set(map(type, itertools.chain.from_iterable(chunk))) <= {str}):
                update(marshal.dumps(chunk, 2))
            else:
                for item in chunk:
                    _update_digest(update, item)
    elif kind in _SEQUENCES or kind in _MAPPINGS or kind is range:
        ordered = kind in (collections.deque, collections.OrderedDict, range)
        items = kind.items(value) if kind in _MAPPINGS else value
        parts = (Digest.of(item).hexdigest for item in items)
        family = "set" if kind is frozenset else "dict" if kind is collections.defaultdict else kind.__name__
        update(f"{family}:{''.join(parts if ordered else sorted(parts))}".encode())
    else:
        update(marshal.dumps(_normal_form(value), 2))


def _normal_form(value: Any) -> Any:
    """Return a plain value such that ``marshal`` writes equal values as the same bytes."""
    kind = type(value)
    if kind is bool or (kind is float and value.is_integer()):
        return int(value)
    if kind is complex and value.imag == 0:
        return _normal_form(value.real)
    if kind in (int, float, complex, str, bytes, type(None)):
        return value
    if _is_numpy_scalar(kind):
        return _normal_form(value.item())
    return f"<opaque {kind.__name__} {id(value)}>"
