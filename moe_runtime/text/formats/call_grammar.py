"""Grammars of tool calls: arguments are valid by the tools' schemas by construction. In Lark's syntax.

Where arguments are written without quotes, a string ends with the text that follows it, so that no string holds this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_runtime.text.formats.call_forms import COUNTER, CallForm, RawArguments
from moe_runtime.text.formats.grammar import expression, symbol
from moe_runtime.text.formats.schema import listed_values, resolve
from moe_runtime.types.structured_outputs import JSON_BLANKS

MAX_CALLS = 16
MAX_DEPTH, MAX_ALTERNATIVES = 8, 64  # of a parameter's schema
NEVER_LENIENT = {"whitespace_pattern": JSON_BLANKS, "lenient": False}
DEFINITIONS = ("$defs", "definitions")
NO_TAG = {"type": "string", "pattern": "^[^<]*$"}
NESTED = frozenset({"items", "prefixItems", "anyOf", "oneOf", "allOf", "additionalProperties"})  # hold schemas
GROUPS = frozenset({"properties", "patternProperties", *DEFINITIONS})  # hold named schemas
PLAIN = frozenset({"title", "description", "default", "examples", "deprecated"})  # say nothing about a value
FORMATS: Mapping[str, str] = {
    "date": r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d)",
    "time": r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(Z|[+-]\d{2}:\d{2})",
    "date-time": r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d)T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(Z|[+-]\d{2}:\d{2})",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}


def call_grammar(form: CallForm, tools: Sequence[Mapping[str, Any]], tokens: Mapping[str, int], parallel: bool) -> str:
    """At least one call of one of the tools.

    Args:
        tools: OpenAI's tool objects.
        tokens: ids of the tokenizer's added tokens.
        parallel: several calls are allowed.

    Raises:
        ValueError: a tool's schema has a parameter that the form cannot make valid.
    """
    rules = _Rules(tokens)
    calls = [rules.call(form, tool["function"]) for tool in tools]
    call = rules.add(" | ".join(calls))
    more = ""
    if parallel and not form.is_single:
        more = f"({rules.literal(form.between)} {call}){{0,{MAX_CALLS - 1}}}"
    return f"start: {rules.literal(form.opens)} {call} {more} {rules.literal(form.closes)}\n" + "".join(rules.lines)


class _Rules:
    """Collects rules."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self.lines = ["NUMBER: /[0-9]{1,3}/\n"]
        self._tokens = tokens
        known = sorted(filter(None, tokens), key=len, reverse=True)
        self._pieces = re.compile("(" + "|".join(map(re.escape, [*known, COUNTER])) + ")")

    def add(self, body: str, name: str = "rule", options: str = "") -> str:
        """A new rule; a name in capitals makes a terminal."""
        name = f"{name}{len(self.lines)}"
        self.lines.append(f"{name}{options}: {body}\n")
        return name

    def literal(self, text: str) -> str:
        """A text as a sequence of tokens and characters."""
        pieces = filter(None, self._pieces.split(text))
        return " ".join("NUMBER" if piece == COUNTER else symbol(piece, self._tokens) for piece in pieces)

    def json(self, schema: Any, root: Mapping[str, Any]) -> str:
        if isinstance(schema, Mapping):
            shared = {key: root[key] for key in DEFINITIONS if key in root}
            return self.add(f"%json {json.dumps({**shared, **schema, 'x-guidance': NEVER_LENIENT})}")
        return self.add(f"%json {json.dumps(schema)}")

    def call(self, form: CallForm, function: Mapping[str, Any]) -> str:
        name, root = function["name"], function.get("parameters") or {"properties": {}, "additionalProperties": False}
        before, after = (self.literal(text.replace("NAME", name)) for text in (form.before, form.after))
        if form.arguments is None:
            arguments = self.json({"type": "object", **root}, root)
        else:
            arguments = self._arguments(form.arguments, name, root)
        return self.add(f"{before} {arguments} {after}")

    def _arguments(self, form: RawArguments, tool: str, root: Mapping[str, Any]) -> str:
        """The parameters in the schema's order; optional ones may be left out."""
        properties = root.get("properties") or {}
        required = set(root.get("required") or ())
        keys = [*properties, *(key for key in root.get("required") or () if key not in properties)]
        between = self.literal(form.between)
        first = rest = '""'
        for key in reversed(keys):
            try:
                value = self._argument(form, key, properties.get(key, {}), root)
            except ValueError as error:
                raise ValueError(f"tools: {tool!r} cannot be forced: its parameter {key!r} {error}") from error
            optional = "" if key in required else " | "
            first, rest = (
                self.add(f"{value} {rest}" + (optional and optional + first)),
                self.add(f"{between} {value} {rest}" + (optional and optional + rest)),
            )
        return first

    def _argument(self, form: RawArguments, key: str, schema: Any, root: Mapping[str, Any]) -> str:
        opens = self.literal(form.opens.replace("KEY", key))
        if form.strings_are_json:
            return self.add(f"{opens} {self.json(schema, root)} {self.literal(form.closes)}")
        forms = []
        alternatives = _alternatives(schema, root, MAX_DEPTH)
        for each in alternatives:
            if _is_string(each):
                forms.append(self._string(form, each))
            elif "type" in each or "enum" in each or "const" in each:
                schemas = map(_without_tags, (each, root)) if form.ends_at_first else (each, root)
                forms.append(f"{self.json(*schemas)} {self.literal(form.closes)}")
            else:
                forms.append(self._string(form, {}))
        has_free_string = any(_is_string(each) and listed_values(each) is None for each in alternatives)
        if len(forms) > 1 and has_free_string and {each.get("type") for each in alternatives} != {"string", "null"}:
            raise ValueError("must not be a string or something else in this model's tool format")
        return self.add(f"{opens} ({' | '.join(forms)})")

    def _string(self, form: RawArguments, schema: Mapping[str, Any]) -> str:
        """A string without quotes, or with the form's own, and what follows it."""
        quotes = form.quotes or ""
        left, end = self.literal(quotes), quotes + form.closes
        values = listed_values(schema)
        if values is not None:
            texts = " | ".join(json.dumps(value) for value in values if isinstance(value, str) and end not in value)
            return f"{left} ({texts}) {self.literal(end)}"
        text = self.add(_string_pattern(schema), "TEXT")
        if self.literal(end).startswith("<["):  # a token, which no text holds
            return f"{left} {text} {self.literal(end)}"
        return f"{left} {self.add(text, options=f'[suffix={json.dumps(end)}]')}"


def _without_tags(schema: Any) -> Any:
    """A schema whose strings and free keys have no "<", so that none looks like a tag; those of `schema` otherwise."""
    if schema is True or schema == {}:
        return {"anyOf": [{"type": ["null", "boolean", "number"]}, NO_TAG]}
    if isinstance(schema, list):
        return [_without_tags(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {key: _without_tags(value) if key in NESTED else value for key, value in schema.items()}
    for key in GROUPS & set(schema):
        found[key] = {name: _without_tags(value) for name, value in schema[key].items()}
    types = schema.get("type")
    types = {types} if isinstance(types, str) else set(types or ())
    if "string" in types and not {"enum", "const", "pattern", "format"} & set(schema):
        found["pattern"] = NO_TAG["pattern"]
    if "object" in types or "properties" in schema:
        others = found.get("additionalProperties", False)
        found["additionalProperties"] = False
        if others is not False:
            found["patternProperties"] = {**found.get("patternProperties", {}), NO_TAG["pattern"]: others}
    return found


def _alternatives(schema: Any, root: Mapping[str, Any], depth: int) -> list[Mapping[str, Any]]:
    """The schemas of one type each that a parameter's schema consists of. Raises ValueError if there are none."""
    if schema is True or schema == {}:
        return [{}]
    if not isinstance(schema, Mapping) or depth == 0:
        raise ValueError("has a schema that allows nothing, or refers to itself")
    if isinstance(reference := schema.get("$ref"), str):
        return _alternatives(resolve(reference, root), root, depth - 1)
    for key in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(key), list):
            found: list[Mapping[str, Any]] = []
            for part in parts:
                found += _alternatives(part, root, depth - 1)
                if len(found) > MAX_ALTERNATIVES:  # references multiply
                    raise ValueError(f"has more than {MAX_ALTERNATIVES} alternatives")
            return found
    if isinstance(types := schema.get("type"), list):
        return [{**schema, "type": name} for name in types]
    if "allOf" in schema:
        raise ValueError("has allOf, which this model's tool format cannot have in a parameter")
    return [schema]


def _is_string(schema: Mapping[str, Any]) -> bool:
    values = listed_values(schema)
    if values:
        return all(isinstance(value, str) for value in values)
    return schema.get("type") == "string"


def _string_pattern(schema: Mapping[str, Any]) -> str:
    """A terminal for a string of a schema. Raises ValueError if it cannot be done."""
    unknown = set(schema) - PLAIN - {"type", "minLength", "maxLength", "pattern", "format"}
    if unknown:
        raise ValueError(f"has {sorted(unknown)[0]}, which this model's tool format cannot make valid")
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    parts = [f"/(?s:.{{{least},{most}}})/" if least or most != "" else "/(?s:.*)/"]
    if (pattern := schema.get("pattern")) is not None:
        parts.append(_found_in_text(pattern))
    if (known := schema.get("format")) is not None:
        if known not in FORMATS:
            raise ValueError(f"has the format {known!r}, which this model's tool format cannot make valid")
        parts.append(expression(FORMATS[known]))
    return " & ".join(parts)


def _found_in_text(pattern: str) -> str:
    """A terminal for texts in which an expression is found. Raises ValueError if there are anchors within it."""
    at_start = pattern.startswith("^")
    at_end = pattern.endswith("$") and not pattern.endswith("\\$")
    body = pattern[at_start : len(pattern) - at_end]
    if re.search(r"(?<![\\\[])[\^$]", body) or (("|" in body) and (at_start or at_end)):
        raise ValueError("has a pattern with anchors within it, which this model's tool format cannot make valid")
    return expression(("" if at_start else "(?s:.*)") + f"({body})" + ("" if at_end else "(?s:.*)"))
