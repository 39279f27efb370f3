"""What an output must look like: the field `structured_outputs` of sampling parameters. Names are those of vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CHARS = 2**17  # of a schema, an expression or a grammar; of all choices together
MAX_CHOICES = 10_000
# Blanks between the parts of a JSON value: one, or a new line. Without a bound, models may write blanks for ever.
JSON_BLANKS = r" |\n[ \t]{0,32}"
FIELDS = ("json", "json_object", "regex", "grammar", "choice")


@dataclass(frozen=True)
class StructuredOutputs:
    """The form of an output. Exactly one field is given.

    Attributes:
        json: a JSON schema (a mapping, true, or its text); the output is JSON that is valid by it. Held as text.
        json_object: the output is a JSON object.
        regex: a regular expression that matches the whole output, in the syntax of Rust's regex crate.
        grammar: a grammar in Lark's or in llama.cpp's syntax (GBNF).
        choice: the output is one of these texts.
        within: what stands around that, as a thought before it: a grammar in Lark's syntax that names it `@answer`.
            Chats set it; it is none of the fields that a request has.

    Raises:
        ValueError: none or several fields are given, or one of a wrong type.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] = ()
    within: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [name for name in FIELDS if getattr(self, name) not in (None, (), False)]
        if len(given) != 1:
            raise _wrong("exactly one of json, json_object, regex, grammar and choice", " and ".join(given) or "none")
        if self.json_object not in (True, False):
            raise _wrong("json_object true or false", repr(self.json_object))
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise _wrong(f"a text as {name}", repr(value)[:80])
        if self.choice:
            object.__setattr__(self, "choice", _choices(self.choice))
        size = sum(map(len, self.choice)) + sum(len(getattr(self, name) or "") for name in ("json", "regex", "grammar"))
        if size > MAX_CHARS:
            raise _wrong(f"at most {MAX_CHARS} characters", f"{size} characters")

    @classmethod
    def of(cls, value: object) -> StructuredOutputs | None:
        """From an object of this class, a mapping with its fields, or None."""
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) or not set(value) <= set(FIELDS):
            raise _wrong(f"an object with one of {', '.join(FIELDS)}", repr(value)[:80])
        return cls(**{name: each for name, each in value.items() if each is not None})


def _schema_text(schema: object) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise _wrong("a JSON schema as json", f"text that is not JSON: {error}") from error
    if not isinstance(schema, (Mapping, bool)):
        raise _wrong("a JSON schema as json", repr(schema)[:80])
    try:
        return json.dumps({} if schema is True else schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _wrong("a JSON schema as json", str(error)[:80]) from error


def _choices(choices: object) -> tuple[str, ...]:
    if not isinstance(choices, (list, tuple)) or len(choices) > MAX_CHOICES:
        raise _wrong(f"a list of at most {MAX_CHOICES} texts as choice", repr(choices)[:80])
    for text in choices:
        if not isinstance(text, str) or not text:
            raise _wrong("texts that are not empty as choice", repr(text)[:80])
    return tuple(choices)


def _wrong(allowed: str, found: str) -> ValueError:
    return ValueError(f"structured_outputs: it must have {allowed}, not {found}")
