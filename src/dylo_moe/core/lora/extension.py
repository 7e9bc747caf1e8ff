"""Give an existing object more methods, by moving it to a subclass of its own class.

``torch.nn.utils.parametrize`` does the same to modules. Parameters, names and ``isinstance`` do not change, and
pickling, ``copy.deepcopy`` and ``torch.save`` work.
"""

import copyreg
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, SupportsIndex


class Extension:
    """Base class of the methods that an object can gain.

    Attributes:
        overrides: Names of the methods that replace the object's own.
        extended_from: Class of the object before; ``self.extended_from.name(self, ...)`` calls its own method.
    """

    overrides: ClassVar[tuple[str, ...]] = ()
    extended_from: ClassVar[Any]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Pickle and copy the object by its own class and the extension: the class made of both cannot be imported."""
        function, arguments, *rest = self.extended_from.__reduce_ex__(self, protocol)
        if function is not vars(copyreg)["__newobj__"]:
            raise TypeError(f"{self.extended_from.__name__} has its own way of pickling and cannot be pickled here")
        extension = next(base for base in type(self).__bases__ if issubclass(base, Extension))
        return _new, (self.extended_from, extension, *arguments[1:]), *rest


def extend(thing: object, extension: type[Extension], **attributes: object) -> None:
    """Move ``thing`` to a class that also has the methods of ``extension``, and set their attributes."""
    if not isinstance(thing, extension):
        thing.__class__ = _extended_class(type(thing), extension)
    for name, value in attributes.items():
        setattr(thing, name, value)


def restore(thing: object, extension: type[Extension]) -> None:
    """Move ``thing`` back to its own class."""
    if isinstance(thing, extension):
        thing.__class__ = thing.extended_from


def _extended_class(own: type, extension: type[Extension]) -> type:
    """Return the subclass of ``own`` with the methods of ``extension``; it has the name of ``own``."""
    if (own, extension) not in _CLASSES:
        names = [name for name in (*extension.overrides, "__reduce_ex__") if hasattr(own, name)]
        namespace: dict[str, object] = {name: _override(own, name, extension) for name in names}
        namespace |= {"extended_from": own, "__module__": own.__module__, "__qualname__": own.__qualname__}
        # own class first: an object can only move to a class of the same layout
        _CLASSES[own, extension] = type(own.__name__, (own, extension), namespace)
    return _CLASSES[own, extension]


_CLASSES: dict[tuple[type, type], type] = {}


def _override(own: type, name: str, extension: type[Extension]) -> Callable[..., object]:
    """Return a copy of the extension's method with the signature and docstring of the own method."""
    method: Any = getattr(extension, name)
    # copied, not wrapped: one more frame in each layer would slow decoding
    override = FunctionType(method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    override.__kwdefaults__ = method.__kwdefaults__
    return functools.update_wrapper(override, getattr(own, name))


def _new(own: type, extension: type[Extension], *arguments: object) -> object:
    made: Any = _extended_class(own, extension)
    return made.__new__(made, *arguments)
