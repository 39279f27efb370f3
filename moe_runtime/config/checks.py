"""Checks of values from users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def is_number(value: object) -> bool:
    """Whether it is an int or a float; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(name: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: {value!r} is not allowed; it must be an integer of at least {least}")


def check_output(name: str, path: object, suffixes: Sequence[str]) -> None:
    """Raise ValueError unless `path` ends in one of `suffixes` and its folder exists, so that a file can be written."""
    shown = str(path) if isinstance(path, Path) else path
    if not isinstance(path, (str, Path)) or Path(path).suffix not in suffixes:
        allowed = " or ".join([", ".join(suffixes[:-1]), suffixes[-1]] if len(suffixes) > 1 else suffixes)
        raise ValueError(f"{name}: {shown!r} is not allowed; it must end in {allowed}")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{name}: {shown!r} is not allowed; it must be in a folder that exists")
