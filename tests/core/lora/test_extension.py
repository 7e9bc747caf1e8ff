"""Objects that move to a subclass of their own class; pickling and copies are in ``interop/test_copies.py``."""

import inspect
from typing import Any

from dylo_moe.core.lora.extension import Extension, extend, restore


class Own:
    """A class that knows nothing of the extension."""

    def greet(self, name: str = "you") -> str:
        """Greet somebody."""
        return f"hello {name}"


class Louder(Extension):
    """An extension with its own defaults, one of them for a keyword alone."""

    overrides = ("greet",)

    def greet(self: Any, *names: Any, mark: str = "!") -> str:
        """Greet louder."""
        return str(self.extended_from.greet(self, *names)) + mark


def test_an_extended_object_has_the_new_method_and_looks_like_its_own_class() -> None:
    thing, other = Own(), Own()
    extend(thing, Louder)
    assert thing.greet() == "hello you!" and thing.greet("me") == "hello me!"
    assert other.greet() == "hello you", "only this object changes"
    assert isinstance(thing, Own) and isinstance(thing, Louder) and type(thing).__name__ == "Own"
    assert inspect.signature(thing.greet) == inspect.signature(other.greet)
    assert thing.greet.__doc__ == other.greet.__doc__


def test_a_restored_object_is_what_it_was() -> None:
    thing = Own()
    extend(thing, Louder)
    extend(thing, Louder)
    restore(thing, Louder)
    assert type(thing) is Own and thing.greet() == "hello you"
