"""What a text is as JSON."""

from __future__ import annotations

import json
import re
from typing import Any

NULLS = ("null", "None")
PYTHON_SPELLINGS = {"True": "true", "False": "false", "None": "null"}
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
INTEGER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.0+)?", re.ASCII)


def kind_of_text(text: str) -> str | None:
    """The JSON type of a text; None if it is no JSON."""
    if text == "null":
        return "null"
    if text in ("true", "false"):
        return "boolean"
    if NUMBER.fullmatch(text):
        return "integer" if INTEGER.fullmatch(text) or _is_integral(text) else "number"
    if text[:1] not in ("{", "[", '"'):
        return None
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=float)  # float: int refuses 4,301 digits
    except (ValueError, RecursionError):
        return None
    return kind_of_value(value)


def kind_of_value(value: object) -> str:
    """The JSON type of a Python value."""
    if value is None:
        return "null"
    for types, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, types):
            return name
    return "object"


def _is_integral(text: str) -> bool:
    """Whether a number such as 1e3 is an integer."""
    return float(text).is_integer() if len(text) < 32 else False


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
