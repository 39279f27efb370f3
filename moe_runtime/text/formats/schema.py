"""Argument types by a tool's JSON schema, for formats whose values are raw text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_runtime.text.formats.json_builder import JsonBuilder

Types = Mapping[str, frozenset[str]]  # JSON types that a parameter may have; none means that nothing is known
MAX_DEPTH = 16  # of combined schemas and references; more says nothing

STRING = frozenset({"string"})
NULLS = ("null", "None")
PYTHON_SPELLINGS = {"True": "true", "False": "false", "None": "null"}
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
INTEGER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.0+)?", re.ASCII)


def parameter_types(function: Mapping[str, Any]) -> Types:
    """The types that each parameter of a tool may have."""
    root = function.get("parameters")
    properties = root.get("properties") if isinstance(root, Mapping) else None
    if not isinstance(root, Mapping) or not isinstance(properties, Mapping):
        return {}
    return {name: frozenset(_types(schema, root, MAX_DEPTH)) for name, schema in properties.items()}


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth == 0:
        return set()
    named = schema.get("type")
    if isinstance(named, str):
        types = {named}
    elif isinstance(named, Sequence):
        types = {name for name in named if isinstance(name, str)}
    elif isinstance(reference := schema.get("$ref"), str):
        types = _types(_resolve(reference, root), root, depth - 1)
    elif isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        types = {_type_of(value) for value in values}
    else:
        types = _combined_types(schema, root, depth)
    return types | {"null"} if schema.get("nullable") is True and types else types


def _combined_types(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> set[str]:
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(key), list):
            found = [types for part in parts if (types := _types(part, root, depth - 1))]
            return set.union(*found) if found else set()
    if "properties" in schema:
        return {"object"}
    return {"array"} if "items" in schema else set()


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """The part of the schema that a reference such as "#/$defs/City" names."""
    part: Any = root
    for key in reference.removeprefix("#").strip("/").split("/"):
        part = part.get(key) if isinstance(part, Mapping) else None
    return part


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    for types, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, types):
            return name
    return "object"


def json_of(text: str, types: frozenset[str]) -> str | None:
    """JSON text of a raw value that fits one of the types other than string (without types: any). None if it fits none.

    The model's own spelling of a number, a list or an object is kept. True, False and None are read too.
    """
    text = text.strip()
    text = PYTHON_SPELLINGS.get(text, text)
    kind = _kind_of(text)
    if kind is None or (types and kind not in types and not (kind == "integer" and "number" in types)):
        return None
    return text


def _kind_of(text: str) -> str | None:
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
    return _type_of(value)


def _is_integral(text: str) -> bool:
    """Whether a number such as 1e3 is an integer."""
    return float(text).is_integer() if len(text) < 32 else False


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


class RawValue:
    """One argument whose value is raw text, of the types that its schema allows.

    A string is passed on as it comes. Other values are converted once they are complete. A value that fits no other
    type of its schema becomes a string.
    """

    def __init__(self, types: frozenset[str], builder: JsonBuilder) -> None:
        self._types = types
        self._builder = builder
        self._held: list[str] = []
        self._streams = types == STRING
        if self._streams:
            builder.begin_string()

    def write(self, text: str) -> None:
        if self._streams:
            self._builder.string(text)
            return
        self._held.append(text)
        if self._types == STRING | {"null"}:
            begun = "".join(self._held)  # at most as long as "None", and one piece
            if not any(null.startswith(begun) for null in NULLS):
                self._stream(begun)

    def _stream(self, text: str) -> None:
        self._streams = True
        self._builder.begin_string()
        self._builder.string(text)

    def close(self) -> None:
        if not self._streams:
            text = "".join(self._held)
            found = json_of(text, self._types - STRING)
            if found is not None:
                self._builder.scalar(found)
                return
            self._stream(text)
        self._builder.end_string()
