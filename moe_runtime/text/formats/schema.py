"""Argument types by a tool's JSON schema, for formats whose values are raw text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_runtime.text.formats.json_builder import JsonBuilder
from moe_runtime.text.formats.json_kinds import NULLS, PYTHON_SPELLINGS, kind_of_text, kind_of_value
from moe_runtime.text.formats.python_values import literal_json

Types = Mapping[str, frozenset[str]]  # JSON types that a parameter may have; none means that nothing is known
MAX_DEPTH = 16  # of combined schemas and references; more says nothing

STRING = frozenset({"string"})
# JSON Schema's names of types, and others that tools are described with. What is not here says nothing.
TYPE_NAMES: Mapping[str, str] = {
    spelling: name
    for name, spellings in {
        "string": "str text char varchar date time datetime",
        "integer": "int long short byte int32 int64 bigint",
        "number": "float double decimal float32 float64",
        "boolean": "bool",
        "array": "list tuple set arraylist",
        "object": "dict dictionary map hashmap json",
        "null": "none nonetype",
    }.items()
    for spelling in (name, *spellings.split())
}
LOOSE_NUMBER = re.compile(
    r"\+?(?P<minus>-?)(?=\.?\d)(?P<whole>\d*)(?P<rest>(?:\.\d*)?(?:(?<=\d)[eE][+-]?\d+)?)", re.ASCII
)


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
    if isinstance(named, str) or (isinstance(named, Sequence) and named):
        names = {TYPE_NAMES.get(str(name).lower(), "") for name in ([named] if isinstance(named, str) else named)}
        types = set() if "" in names else names
    elif isinstance(reference := schema.get("$ref"), str):
        types = _types(resolve(reference, root), root, depth - 1)
    elif isinstance(values := listed_values(schema), list):
        types = {kind_of_value(value) for value in values}
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


def listed_values(schema: Mapping[str, Any]) -> Any:
    """The values that a schema lists, by `enum` or `const`; None if it lists none."""
    return schema.get("enum", [schema["const"]] if "const" in schema else None)


def resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """The part of the schema that a reference such as "#/$defs/City" names."""
    part: Any = root
    for key in reference.removeprefix("#").strip("/").split("/"):
        part = part.get(key) if isinstance(part, Mapping) else None
    return part


def json_of(text: str, types: frozenset[str]) -> str | None:
    """JSON text of a raw value that fits one of the types other than string (without types: any). None if it fits none.

    The model's own spelling of a number, a list or an object is kept. True, False and None are read too, and where the
    schema asks for the type, so are other spellings: TRUE, .5, +1, and lists and objects as Python writes them.
    """
    text = text.strip()
    text = PYTHON_SPELLINGS.get(text, text)
    kind = kind_of_text(text)
    if kind is None and types:
        text = _respelled(text, types)
        kind = kind_of_text(text)
    if kind is None or (types and kind not in types and not (kind == "integer" and "number" in types)):
        return None
    return text


def _respelled(text: str, types: frozenset[str]) -> str:
    """A value that is no JSON in JSON's spelling, as far as its types are asked for."""
    if "boolean" in types and text.lower() in ("true", "false"):
        return text.lower()
    if types & {"integer", "number"} and (number := LOOSE_NUMBER.fullmatch(text)):
        return f"{number['minus']}{number['whole'] or '0'}{number['rest'].removesuffix('.')}"
    return literal_json(text) or text if types & {"array", "object"} and text[:1] in ("[", "{", "(") else text


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
