"""How values travel between processes that do not trust each other: JSON made of exact built-in types, nothing else.

A value is encoded by what its type *is*, never by what its methods say: a subclass of ``str``, an object that calls
itself equal to everything, or one with a hostile ``__repr__`` or ``__reduce__`` becomes ``Opaque``, which is equal to
nothing. Decoding builds plain values and runs no code that came with them. A value whose text would be longer than
``LARGEST_TEXT`` travels as a digest instead; digests are equal where the values are, ``1 == 1.0`` included.

Imports the standard library only, because it is also loaded in the process that runs an answer.
"""

import collections
import hashlib
import itertools
import json
import marshal
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LARGEST_TEXT = 1 << 18
"""Characters, about, of the longest value that travels whole."""

WHOLE = 1 << 40
"""More characters than any value has: for what must not become a digest."""

LARGEST_ITERATOR = 100_000
"""How many items of a generator are taken before it counts as opaque."""

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
_BUILD: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
    "iterator": iter,
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
    """Stands for an object that is no plain value; equal to itself alone."""

    type_name: str


@dataclass(frozen=True)
class Digest:
    """Stands for a value that is too large to travel."""

    hexdigest: str

    @classmethod
    def of(cls, value: Any) -> "Digest":
        """The digest of a value made of plain types, the same for equal values; of anything else ``Opaque`` counts."""
        state = hashlib.sha256()
        _feed(state.update, value)
        return cls(state.hexdigest())


def encode(value: Any, names: Mapping[str, Any] | None = None, largest: int = LARGEST_TEXT) -> str:
    """One line of JSON for a value.

    Args:
        value: Anything.
        names: Objects that are known by a name on both sides, for those that are no plain values.
        largest: Characters, about, beyond which a digest is given.
    """
    try:
        return json.dumps(_tagged(value, [largest], names or {}))
    except _TooLargeError:
        return json.dumps(["digest", Digest.of(value).hexdigest])


def decode(text: str | bytes, names: Mapping[str, Any] | None = None) -> Any:
    """The value of a line that ``encode`` could have written.

    Raises:
        ValueError: ``encode`` did not write it.
    """
    try:
        return _value(json.loads(text), names)
    except RecursionError as error:
        raise ValueError("not an encoded value: too deep") from error


def _value(tagged: Any, names: Mapping[str, Any] | None) -> Any:
    try:
        return _untagged(tagged, names or {})
    except (LookupError, TypeError, AttributeError, RecursionError, OverflowError, ImportError) as error:
        raise ValueError(f"not an encoded value: {type(error).__name__}") from error


def decode_line(line: bytes, names: Mapping[str, Any] | None = None) -> tuple[str, Any]:
    """A line that the process of an answer wrote: ``("ok", value)``, or another word and a text.

    Raises:
        ValueError: That process would not have written it.
    """
    try:
        word, *rest = json.loads(line)
    except (TypeError, RecursionError) as error:
        raise ValueError("not a line of an answer's process") from error
    if word == "ok" and len(rest) == 2:
        return "ok", _value(rest[0], names)
    if word in ("failed", "raised") and len(rest) == 1 and isinstance(rest[0], str):
        return word, rest[0]
    if word == "ready" and not rest:
        return word, ""
    raise ValueError("not a line of an answer's process")


def _tagged(value: Any, room: list[int], names: Mapping[str, Any]) -> Any:
    """The value as JSON can say it; ``room`` is a counter of characters that all levels share."""
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
        return [_SEQUENCES[kind], [_tagged(item, room, names) for item in value]]
    if kind in _MAPPINGS:
        items = kind.items(value)
        return [_MAPPINGS[kind], [[_tagged(key, room, names), _tagged(item, room, names)] for key, item in items]]
    if kind in _ITERATORS:
        items = list(itertools.islice(value, LARGEST_ITERATOR + 1))
        if len(items) <= LARGEST_ITERATOR:
            return ["iterator", [_tagged(item, room, names) for item in items]]
    if kind.__module__ == "numpy" and kind.__name__ in _NUMPY and _is_numpys(kind):
        return ["numpy", kind.__name__, _tagged(value.item(), room, names)]
    for name, known in names.items():
        if known is value:
            return ["name", name]
    return ["opaque", str(kind.__name__)[:80]]


def _is_numpys(kind: type) -> bool:
    import numpy

    return getattr(numpy, kind.__name__, None) is kind


def _untagged(tagged: Any, names: Mapping[str, Any]) -> Any:
    if tagged is None or type(tagged) in (bool, str):
        return tagged
    tag, *rest = tagged
    if tag == "numpy":
        import numpy

        name, inner = rest[0], _untagged(rest[1], names)
        if name not in _NUMPY or type(inner) not in (bool, int, float):
            raise LookupError(name)
        return getattr(numpy, name)(inner)
    if tag in _MAPPINGS.values():
        return _BUILD[tag]([(_untagged(key, names), _untagged(item, names)) for key, item in rest[0]])
    if tag in _BUILD:
        return _BUILD[tag]([_untagged(item, names) for item in rest[0]])
    return _LEAVES[tag](names, *rest)


def _range(start: int, stop: int, step: int) -> Any:
    """A range, unless somebody who makes a list of it would run out of memory."""
    found = range(start, stop, step)
    return found if (stop - start) // step <= LARGEST_ITERATOR else Opaque("range")


_LEAVES: dict[str, Callable[..., Any]] = {
    "int": lambda names, text: int(text, 16),
    "float": lambda names, text: float.fromhex(text),
    "complex": lambda names, real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
    "bytes": lambda names, text: bytes.fromhex(text),
    "range": lambda names, *texts: _range(*(int(text, 16) for text in texts)),
    "digest": lambda names, text: Digest(str(text)),
    "opaque": lambda names, text: Opaque(str(text)),
    "name": lambda names, text: names[text],
}


def _feed(update: Callable[[bytes], object], value: Any) -> None:
    """Feeds a digest so that equal values feed the same, and large uniform sequences at the speed of C."""
    kind = type(value)
    if kind is list or kind is tuple:
        update(b"[" if kind is list else b"(")
        update(str(len(value)).encode())
        for chunk in _chunks(value):
            if _uniform(chunk):
                update(marshal.dumps(chunk, 2))
            else:
                for item in chunk:
                    _feed(update, item)
    elif kind in _SEQUENCES or kind in _MAPPINGS or kind is range:
        ordered = kind in (collections.deque, collections.OrderedDict, range)
        items = kind.items(value) if kind in _MAPPINGS else value
        parts = (Digest.of(item).hexdigest for item in items)
        family = "set" if kind is frozenset else "dict" if kind is collections.defaultdict else kind.__name__
        update(f"{family}:{''.join(parts if ordered else sorted(parts))}".encode())
    else:
        update(marshal.dumps(_leaf(value), 2))


def _chunks(items: list[Any] | tuple[Any, ...]) -> Iterator[list[Any]]:
    for start in range(0, len(items), _CHUNK):
        yield list(items[start : start + _CHUNK])


def _uniform(chunk: Iterable[Any]) -> bool:
    """Whether all are strings, or all tuples of strings: then bytes are equal exactly where values are."""
    kinds = set(map(type, chunk))
    return kinds == {str} or (kinds == {tuple} and set(map(type, itertools.chain.from_iterable(chunk))) <= {str})


def _leaf(value: Any) -> Any:
    """A plain value that marshal writes alike for equal ones."""
    kind = type(value)
    if kind is bool or (kind is float and value.is_integer()):
        return int(value)
    if kind is complex and value.imag == 0:
        return _leaf(value.real)
    if kind in (int, float, complex, str, bytes, type(None)):
        return value
    if kind.__module__ == "numpy" and kind.__name__ in _NUMPY and _is_numpys(kind):
        return _leaf(value.item())
    return f"<opaque {kind.__name__} {id(value)}>"
