"""Read dataclasses of flags from a command line, from the YAML file of ``--config``, or from their defaults.

One field is the default, the limits, the help text and the flag. A flag may be written with ``-`` or ``_``. The groups
of flags themselves are in the config modules, and ``commands.py`` puts them together, one configuration for a program.
"""

import dataclasses
import re
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, ClassVar, NoReturn, TypedDict, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from typing_extensions import override

from dylo_moe.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from typing_extensions import TypeForm

GROUP = "group"
"""Key in the metadata of a configuration's field: the class of its group, where it is not the field's type."""

_FLAG = "flag"

Value = TypeVar("Value")
Config = TypeVar("Config", bound="DataclassInstance")


@dataclass(frozen=True)
class Limits:
    """The values that a flag may have.

    Attributes:
        ge: Smallest number.
        gt: Number that all values are above.
        le: Largest number.
        lt: Number that all values are below.
        choices: All texts that are allowed; any text if empty.
        pattern: Regular expression that a text has to match as a whole.
        wording: Words of the error message around those that the limits give, which replace ``{}``.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    wording: str = "{}"

    def allow(self, value: object) -> bool:
        """Return whether the limits allow ``value``; NaN is outside any bound."""
        if isinstance(value, str):
            listed = not self.choices or value in self.choices
            return listed and (self.pattern is None or re.fullmatch(self.pattern, value) is not None)
        if not isinstance(value, int | float):
            return True
        above = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        return above and (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)

    def __str__(self) -> str:
        return self.wording.format(f"one of {', '.join(self.choices)}" if self.choices else self._bounds())

    def _bounds(self) -> str:
        upper = "" if self.le is None else f"up to {self.le:g}"
        upper = upper if self.lt is None else f"up to but not including {self.lt:g}"
        if self.gt is not None:
            return f"above {self.gt:g}" + (f" and {upper}" if upper else "")
        if self.ge is None:
            return upper
        if upper:
            return f"from {self.ge:g} {upper}"
        return f"at least {self.ge:g}" if self.ge else "0 or more"


@dataclass(frozen=True)
class Flag:
    """How a field is given and checked; kept in the field's metadata.

    Attributes:
        help: Text of the help; None keeps the flag out of it.
        aliases: Other names, without ``--`` and written with ``_``.
        bare: Value of the flag without a value; None if it needs one.
        parameter: Name of the Python parameter that the flag sets, if it differs from the field's name.
        limits: Allowed values.
    """

    help: str | None = None
    aliases: tuple[str, ...] = ()
    bare: str | None = None
    parameter: str | None = None
    limits: Limits = Limits()


def flag(
    default: Value,
    help: str,
    aliases: Sequence[str] = (),
    *,
    bare: str | None = None,
    parameter: str | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] = (),
    pattern: str | None = None,
    wording: str = "{}",
) -> Value:
    """Return a dataclass field that is a flag; see ``Flag`` and ``Limits`` for the arguments."""
    limits = Limits(ge, gt, le, lt, tuple(choices), pattern, wording)
    metadata = {_FLAG: Flag(help, tuple(aliases), bare, parameter, limits)}
    return dataclasses.field(default=default, metadata=metadata)


def hidden_flag() -> object:
    """Return a dataclass field that is a flag and not in the help; its value is None unless it is given."""
    return dataclasses.field(default=None, metadata={_FLAG: Flag()})


def flag_of(field: "dataclasses.Field[object]") -> Flag:
    """Return the flag that a field of a group is."""
    found: Flag = field.metadata[_FLAG]
    return found


@dataclass
class Group:
    """Base class for dataclasses whose fields are flags.

    Attributes:
        title: Heading of the group in the help.
    """

    title: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the limits of each flag; None means that a flag is not given, and is always allowed.

        Raises:
            ConfigError: A value is outside its limits.
        """
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), flag_of(field).limits
            if not limits.allow(value):
                hint = did_you_mean(str(value), limits.choices)
                raise ConfigError(f"--{field.name} must be {limits}, got {value!r}{hint}")


def groups_of(config: "type[DataclassInstance]") -> list[type[Group]]:
    """Return the groups of a configuration: of its fields, and of configurations among its fields, in order.

    A group is a configuration too, with one group.
    """
    if issubclass(config, Group):
        return [config]
    return [group for part in _parts(config).values() for group in groups_of(part)]


def names_of(config: "type[DataclassInstance]") -> list[str]:
    """Return the names of a configuration's flags, aliases and ``no_...`` included, with ``_`` and without ``--``."""
    fields = [field for group in groups_of(config) for field in dataclasses.fields(group)]
    return [name for field in fields for name in (field.name, *flag_of(field).aliases, *_opposite(field))]


def split_names(text: str) -> list[str]:
    """Return the parts of a comma-separated list, without blanks around them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def require(ok: bool, flag: str, wanted: str, got: object) -> None:
    """Raise ``ConfigError``, ``--flag must be wanted, got got``, unless ``ok``."""
    if not ok:
        raise ConfigError(f"--{flag} must be {wanted}, got {got}")


def with_flags(message: str, configs: "Sequence[type[DataclassInstance]]") -> str:
    """Return an error message of the library in the words of the command line.

    Each word in backquotes that is the parameter of a flag becomes that flag: "rank" becomes "--lora_r". Other words,
    and commands in backquotes, stay as they are.

    Args:
        message: The message.
        configs: The configurations of the program; where two have a flag for one parameter, the first decides.
    """
    flags: dict[str, str] = {}
    for config in reversed(configs):
        fields = [field for group in groups_of(config) for field in dataclasses.fields(group)]
        flags |= {name: name for name in names_of(config)}
        flags |= {parameter: field.name for field in fields if (parameter := flag_of(field).parameter)}
        flags |= {field.name: field.name for field in fields}
    return re.sub(
        r"`(\w+)`",
        lambda found: f"--{flags[found[1]].rstrip('_')}" if found[1] in flags else found[0],
        message,
    )


def parse(config: type[Config], program: str, description: str, arguments: Sequence[str]) -> Config:
    """Read a command line, and the YAML file that its ``--config`` names.

    Args:
        config: A dataclass of groups, or one group.
        program: Name of the program in its messages and its help.
        description: Text on top of the help.
        arguments: The command line, without the program.

    Raises:
        ConfigError: A flag or a key is unknown, or a value is not allowed.
    """
    parser = _Parser(
        prog=program,
        usage=f"{program} [--flag value ...]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    for group in groups_of(config):
        section = parser.add_argument_group(group.title)
        for spellings, options in _arguments(group):
            section.add_argument(*spellings, **options)
    given, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        name = unknown[0].split("=")[0]
        known = [spelling for known_name in names_of(config) for spelling in _spellings(known_name)]
        raise ConfigError(f"unknown argument {name!r}{did_you_mean(name, known)}; see {program} --help")
    file = getattr(given, "config", None)
    if file is not None:
        parser.set_defaults(**_read_yaml(Path(file), config))
    return _build(config, vars(parser.parse_args(list(arguments))))


def to_yaml(config: "DataclassInstance") -> str:
    """Return a configuration as the text of a file that ``--config`` reads."""
    values: dict[str, object] = {}
    for group in _groups_in(config):
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            hidden = flag_of(field).help is None and value is None
            if field.name not in ("config", "dry_run") and not hidden:
                values[field.name] = value
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each flag, a short sign for its value, and a default only where it is informative."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    @override
    def _format_action(self, action: Action) -> str:
        opposite_is_shown = any(option.startswith("--no_") for option in action.option_strings)
        return "" if opposite_is_shown else super()._format_action(action)

    @override
    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        if action.const is True:
            return f"--[no_]{action.dest}" if action.default is True else f"--{action.dest}"
        value = "N" if action.type is int else "X" if action.type is float else "TEXT"
        # a flag with the name of a Python keyword has a field with a trailing underscore
        return f"--{action.dest.rstrip('_')} {self._format_args(action, value)}"

    @override
    def _get_help_string(self, action: Action) -> str | None:
        # compared by type: 0 and 1 equal False and True, and are shown
        if action.default is None or isinstance(action.default, bool) or action.default == SUPPRESS:
            return action.help
        return super()._get_help_string(action)


class _Parser(ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


class _Gather(Action):
    """Gathers the values of a flag that is given several times; together they replace the default."""

    def __call__(self, parser: object, namespace: Namespace, values: object, option_string: object = None) -> None:
        before = getattr(namespace, self.dest)
        assert isinstance(values, list)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


class _Options(TypedDict, total=False):
    dest: str
    default: object
    help: str | None
    type: Callable[[str], object]
    nargs: str
    const: object
    action: str | type[Action]


def _arguments(group: type[Group]) -> Iterator[tuple[list[str], _Options]]:
    """Yield the names and the options of each flag of a group, as argparse takes them."""
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        found, hint = flag_of(field), hints[field.name]
        spellings = [spelling for name in (field.name, *found.aliases) for spelling in _spellings(name)]
        options: _Options = {"dest": field.name, "default": field.default, "help": found.help or SUPPRESS}
        types = [kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)) if kind is not NoneType]
        if found.help is None:
            options |= {"type": partial(_from_text, hint)}
            if {bool, object} & set(get_args(hint)):  # it may stand alone
                options |= {"nargs": "?", "const": True}
        elif types == [bool]:
            options |= {"type": partial(_from_text, bool), "nargs": "?", "const": True}
        elif types == [list[str]]:
            options |= {"nargs": "+", "action": _Gather}
        else:
            options |= {"type": types[0]}
            if found.bare:
                options |= {"nargs": "?", "const": found.bare}
        yield spellings, options
        for name in _opposite(field):
            yield _spellings(name), {"dest": field.name, "action": "store_false", "help": found.help}


def _opposite(field: "dataclasses.Field[object]") -> list[str]:
    return [f"no_{field.name}"] if field.default is True else []


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _parts(config: "type[DataclassInstance]") -> "dict[str, type[DataclassInstance]]":
    """Return the classes of a configuration's fields, by the field's name."""
    hints = get_type_hints(config)
    return {field.name: field.metadata.get(GROUP, hints[field.name]) for field in dataclasses.fields(config)}


def _groups_in(config: "DataclassInstance") -> Iterator[Group]:
    if isinstance(config, Group):
        yield config
    else:
        for field in dataclasses.fields(config):
            yield from _groups_in(getattr(config, field.name))


def _build(config: type[Config], values: Mapping[str, object]) -> Config:
    make: Callable[..., Config] = config
    if issubclass(config, Group):
        return make(**{field.name: values[field.name] for field in dataclasses.fields(config)})
    return make(**{name: _build(part, values) for name, part in _parts(config).items()})


def _from_text(hint: "TypeForm[object]", text: str) -> object:
    try:
        return TypeAdapter(hint).validate_strings(text)
    except ValidationError as error:
        raise ArgumentTypeError(f"cannot be {text!r}: {error.errors()[0]['msg']}") from error


def _read_yaml(path: Path, config: "type[DataclassInstance]") -> dict[str, object]:
    """Return the values of a YAML file, checked against the types of the flags."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold 'flag: value' lines, got a {type(values).__name__}")
    types: dict[str, TypeForm[object]] = {}
    for group in groups_of(config):
        hints = get_type_hints(group)
        types |= {field.name: hints[field.name] for field in dataclasses.fields(group)}
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"--config {path} has the unknown key {key!r}{did_you_mean(str(key), types)}")
        try:
            # YAML reads 1e-3 as text and 2 as a whole number: pydantic converts them to the field's type, or refuses
            values[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ConfigError(f"--config {path}: {key} cannot be {value!r}: {reason}") from error
    return values
