"""How the fields of dataclasses are read: from a command line, from the file of ``--config``, or their defaults.

One field is the default, the check, the help text and the flag. A flag may be written with ``-`` or ``_``. Which
fields there are is in ``config.py``.
"""

import dataclasses
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentTypeError
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg
from typing_extensions import override

from dylo_moe.errors import ConfigError, did_you_mean


def flag(default: Any, help: str, aliases: Sequence[str] = (), **argparse_options: Any) -> Any:
    """A field that is a flag; each alias is known with ``-`` and with ``_``."""
    spellings = [
        spelling for alias in aliases for spelling in dict.fromkeys((alias, "--" + alias[2:].replace("_", "-")))
    ]
    return HfArg(default=default, help=help, aliases=spellings, metadata=argparse_options)


def hidden_flag() -> Any:
    """A field that is a flag and is not listed in the help; None where it is not given."""
    return HfArg(default=None, help=SUPPRESS)


def is_hidden(field: "dataclasses.Field[Any]") -> bool:
    """Whether a field is left out of the help."""
    return field.metadata.get("help") == SUPPRESS


def names_of(group: type[Any]) -> set[str]:
    """The names of a group's flags, aliases included, as they are written with ``_`` and without ``--``."""
    names = set()
    for field in dataclasses.fields(group):
        names.update([field.name, *(alias[2:].replace("-", "_") for alias in field.metadata.get("aliases", ()))])
    return names


def split_names(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def require(ok: bool, flag: str, wanted: str, got: object) -> None:
    """Raises ``ConfigError`` that ``--flag must be wanted, got got`` unless ``ok``."""
    if not ok:
        raise ConfigError(f"--{flag} must be {wanted}, got {got}")


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each flag, a short sign for its value, and a default only where it says something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    @override
    def _format_action(self, action: Any) -> str:
        its_opposite_is_shown = any(option.startswith("--no_") for option in action.option_strings)
        return "" if its_opposite_is_shown else super()._format_action(action)

    @override
    def _format_action_invocation(self, action: Any) -> str:
        if not action.option_strings or action.dest == "help":
            return str(super()._format_action_invocation(action))
        if action.const is True:
            return f"--[no_]{action.dest}" if action.default is True else f"--{action.dest}"
        value = {int: "N", float: "X"}.get(action.type, "TEXT")
        # a flag that is a word of Python's has an underscore behind it
        return f"--{action.dest.rstrip('_')} {self._format_args(action, value)}"

    @override
    def _get_help_string(self, action: Any) -> str | None:
        if action.default in (None, False, True, SUPPRESS):
            return str(action.help)
        text: str | None = super()._get_help_string(action)
        return text


class _Parser(HfArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: "dataclasses.Field[Any]") -> None:
        if not is_hidden(field):
            HfArgumentParser._parse_dataclass_field(parser, field)
            return
        # these have types of every kind, also such as transformers' own parser cannot read
        may_stand_alone = {bool, Any} & set(get_args(field.type))
        without_value: dict[str, Any] = {"nargs": "?", "const": True} if may_stand_alone else {}
        spellings = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
        read = _reader(field.type)
        parser.add_argument(*spellings, dest=field.name, type=read, default=None, help=SUPPRESS, **without_value)


def _reader(hint: Any) -> Callable[[str], Any]:
    return partial(_from_text, hint)


def _from_text(hint: Any, text: str) -> Any:
    try:
        return TypeAdapter(hint).validate_strings(text)
    except ValidationError as error:
        raise ArgumentTypeError(f"cannot be {text!r}: {error.errors()[0]['msg']}") from error


def parse(groups: Sequence[type[Any]], program: str, description: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Reads a command line, and the YAML file that its ``--config`` names, into one dataclass a group.

    Raises:
        ConfigError: A flag or a key is unknown, or a value is not allowed.
    """
    parser = _Parser(
        list(groups),  # type: ignore[arg-type]
        prog=program, description=description, formatter_class=_HelpFormatter, allow_abbrev=False,
        usage=f"{program} [--flag value ...]",
    )  # fmt: skip
    known = [option for action in parser._actions for option in action.option_strings]
    given, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        name = unknown[0].split("=")[0]
        raise ConfigError(f"unknown argument {name!r}{did_you_mean(name, known)}; see {program} --help")
    config_file = getattr(given, "config", None)
    if config_file is not None:
        parser.set_defaults(**_read_yaml(Path(config_file), groups))
    return tuple(parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False))


def to_yaml(groups: Sequence[Any]) -> str:
    """The resolved configuration as the text of a file that ``--config`` reads."""
    values: dict[str, Any] = {}
    for group in groups:
        fields = [field for field in dataclasses.fields(group) if field.name not in ("config", "dry_run")]
        shown = [field.name for field in fields if not is_hidden(field) or getattr(group, field.name) is not None]
        values.update({name: getattr(group, name) for name in shown})
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text


def _read_yaml(path: Path, groups: Sequence[type[Any]]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold 'flag: value' lines, got a {type(values).__name__}")
    types = {key: hint for group in groups for key, hint in get_type_hints(group).items() if key[0] != "_"}
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"--config {path} has the unknown key {key!r}{did_you_mean(str(key), types)}")
        try:
            # YAML reads 1e-3 as text and 2 as a whole number: pydantic makes them what the field wants, or refuses
            values[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ConfigError(f"--config {path}: {key} cannot be {value!r}: {reason}") from error
    return values
