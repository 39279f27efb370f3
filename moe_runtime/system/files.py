"""Reads the JSON files that this package writes, and checks their format and fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def parse_json(text: str) -> Any:
    """The JSON value in `text`. Raises ValueError with one line if it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at line {error.lineno}, column {error.colno})") from error
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, without a byte order mark. Raises ValueError with one line if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not a text file (byte {error.start} is not UTF-8)") from error


def require_format(data: object, name: str, version: int) -> Mapping[str, Any]:
    """`data`, if it is an object of the named format in a version that can be read.

    Raises:
        ValueError: it has another format, or a newer version wrote it.
    """
    if not isinstance(data, Mapping) or data.get("format") != name:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f'format: {found!r} is not allowed; it must be "{name}"')
    if data.get("format_version") != version:
        raise ValueError(f"format_version: {data.get('format_version')!r} is not allowed; it must be {version}")
    return data


def field(data: Mapping[str, Any], name: str, kind: type, optional: bool = False) -> Any:
    """`data[name]`, checked to be of type `kind` (or None where `optional`).

    Raises:
        ValueError: it is missing or of another type.
    """
    value = data.get(name)
    if value is None and optional:
        return None
    # bool is a subclass of int, and no field here is a bool
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "missing" if name not in data else f"of type {type(value).__name__}"
        raise ValueError(f"{name}: must be of type {kind.__name__}; it is {found}")
    return value
