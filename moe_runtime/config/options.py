"""Options of the command line and of YAML files, from the fields, defaults and docstrings of frozen dataclasses.

So flags, keys and Python arguments have the same names, and a wrong value gives the same message.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = 'a local Hugging Face directory, a GGUF file, a hub id, or "demo"'
EXPECTED = {int: "an integer", float: "a number", str: "a string"}


class UserMistake(Exception):  # noqa: N818 - not an error of the program
    """A value from the user cannot be used; the message is one clear line."""


@contextlib.contextmanager
def user_mistakes() -> Iterator[None]:
    """Turn a ValueError or OSError about a user's value into a UserMistake."""
    try:
        yield
    except ValueError as error:
        raise UserMistake(str(error)) from error
    except OSError as error:
        raise UserMistake(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error


@dataclass(frozen=True)
class Option:
    """One field of a dataclass: `--ep-size` on the command line, `ep_size` or `ep-size` in a file.

    Attributes:
        kind: type of the value, or of each value in a list.
        many: whether the option takes a list of values.
        alone: whether the option also takes a single value instead of a list.
    """

    name: str
    kind: type
    many: bool
    alone: bool
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def options_of(cls: type, exclude: Iterable[str] = ()) -> list[Option]:
    """The options that a dataclass defines, in the order of its fields."""
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    helps = attribute_docs(cls)
    options = []
    for field in dataclasses.fields(cls):
        if field.name in exclude:
            continue
        kinds = _alternatives(hints[field.name])
        many = [kind for kind in kinds if typing.get_origin(kind) is not None]
        kind = typing.get_args(many[0])[0] if many else next(kind for kind in kinds if kind is not type(None))
        text = helps.get(field.name, "")
        options.append(Option(field.name, kind, bool(many), bool(many) and kind in kinds, field.default, text))
    return options


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def attribute_docs(cls: type) -> dict[str, str]:
    """The text for each name in a docstring's `Attributes:` section; `a, b: text` is for both names."""
    section = textwrap.dedent((cls.__doc__ or "").partition("    Attributes:\n")[2].partition("\n\n")[0])
    entries = re.findall(r"^([\w, ]+): (.*(?:\n +.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def add_flags(parser: argparse._ActionsContainer, options: Iterable[Option]) -> None:
    """Add a flag for each option. A flag that is not given stays absent, so that a file can set the option."""
    for option in options:
        arguments: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": _help(option)}
        if option.kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif option.many and option.kind is str:
            arguments |= {"action": "append", "metavar": "TEXT"}
        elif option.many:
            several: dict[type, tuple[Callable[[str], list[Any]], str]]
            several = {int: (integers, "N,N,..."), float: (numbers, "X,X,...")}
            convert, metavar = several[option.kind]
            arguments |= {"type": _one_or_several(convert) if option.alone else convert, "metavar": metavar}
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[option.kind]
            arguments |= {"type": _converter(option.kind), "metavar": metavar}
        parser.add_argument(option.flag, **arguments)


def _help(option: Option) -> str:
    value = option.default
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    default = "" if value in (None, (), dataclasses.MISSING) else f" (default: {shown})"
    return (option.help.rstrip(".") + default).replace("%", "%%")


def _converter(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            message = f"{text!r} is not allowed; it must be {EXPECTED[kind]}"
            raise argparse.ArgumentTypeError(message) from error

    return convert


def _one_or_several(convert: Callable[[str], list[Any]]) -> Callable[[str], Any]:
    """Wrap `convert` to return a single value alone, not in a list."""

    def convert_or_take(text: str) -> Any:
        values = convert(text)
        return values if len(values) > 1 else values[0]

    return convert_or_take


def integers(text: str) -> list[int]:
    """The integers of a flag's value, separated by commas."""
    convert = _converter(int)
    return [convert(word) for word in text.split(",")]


def numbers(text: str) -> list[float]:
    """The numbers of a flag's value, separated by commas; "inf" is allowed."""
    convert = _converter(float)
    return [convert(word) for word in text.split(",")]


def read_options_file(path: Path, options: Iterable[Option]) -> dict[str, Any]:
    """The options that a YAML file sets, by name.

    Raises:
        ValueError: no such file, not a mapping, or an unknown option. The dataclasses check the values.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config: {str(path)!r} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {str(path)!r} is not YAML ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"config: {str(path)!r} must be a mapping of option names to values")
    known = [option.name for option in options]
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{key}: no such option in {str(path)!r}; known options are {', '.join(known)}")
        values[name] = value
    return values


def given_values(namespace: argparse.Namespace, options: Sequence[Option]) -> dict[str, Any]:
    """The options set on the command line or in the file of `--config`; the command line wins.

    Raises:
        ValueError: as `read_options_file`.
    """
    values = read_options_file(namespace.config, options) if namespace.config else {}
    given = vars(namespace)
    values |= {option.name: given[option.name] for option in options if given.get(option.name) is not None}
    return values


def require_model(values: Mapping[str, Any]) -> None:
    """Raise ValueError if the options name no model."""
    if values.get("model") is None:
        raise ValueError(f"model: missing; it must be {MODEL}")


def option_values(namespace: argparse.Namespace, options: Sequence[Option]) -> dict[str, Any]:
    """As `given_values`, for a command that needs a model.

    Raises:
        ValueError: as `read_options_file`, or no model is named.
    """
    values = given_values(namespace, options)
    require_model(values)
    return values


def only_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values whose names are fields of a dataclass."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: value for name, value in values.items() if name in names}
