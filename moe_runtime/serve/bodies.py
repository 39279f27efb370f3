"""The common parts of request bodies on all endpoints.

Types are checked here, and a check ends at the first wrong value: a body with many wrong values costs no more than one
with one. `SamplingParams` checks ranges, so that HTTP and Python give the same messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from moe_runtime.serve.errors import UNSUPPORTED
from moe_runtime.types.sampling_params import SamplingParams

MAX_FIELDS = 256  # of an object
MAX_BIAS = 2**16  # tokens of a logit_bias; an option bounds them further
SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingParams))

T = TypeVar("T")
FirstErrorList = Annotated[list[T], Field(fail_fast=True)]


def wrong(wanted: str) -> PydanticCustomError:
    """The error of a value that must be something else.

    A function that raises it stands in place of a union, which would collect errors of every branch.
    """
    return PydanticCustomError("wrong_value", "it must be {wanted}", {"wanted": wanted})


def is_token_ids(value: object) -> bool:
    """Whether a value is a list of integers."""
    return isinstance(value, list) and all(type(token) is int for token in value)


def _text_or_texts(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        return value
    raise wrong("a string or a list of strings")


def _token_ids(value: Any) -> Any:
    if is_token_ids(value):
        return value
    raise wrong("a list of integers")


def _bias(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) > MAX_BIAS:
        raise wrong(f"an object from token ids to numbers, with at most {MAX_BIAS} of them")
    return value


def unsupported(field: str, value: object, allowed: str = "it must be left out") -> PydanticCustomError:
    """The error of a field that is known and not done."""
    return PydanticCustomError(UNSUPPORTED, "{allowed}", {"field": field, "value": value, "allowed": allowed})


TEXT: dict[str, Any] = {"type": "string"}
IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
TextOrTexts = Annotated[
    Any, PlainValidator(_text_or_texts), WithJsonSchema({"anyOf": [TEXT, {"type": "array", "items": TEXT}]})
]
LogitBias = Annotated[
    Any, PlainValidator(_bias), WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}})
]
TokenIds = Annotated[Any, PlainValidator(_token_ids), WithJsonSchema(IDS)]


class Body(BaseModel):
    """Strict JSON types (no "5" for 5), and no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            raise unsupported("body", f"{len(body)} fields", f"it must have at most {MAX_FIELDS}")
        return body


class ExpertPolicyFields(Body):
    """The fields of `ExpertPolicy`: one number for all sparse layers, or one for each layer."""

    top_k: int | FirstErrorList[int] | None = None
    top_p: float | FirstErrorList[float] | None = None
    threshold: float | FirstErrorList[float] | None = None
    temperature: float | FirstErrorList[float] | None = None


class SamplingFields(Body):
    """The fields of `SamplingParams` that mean the same on every endpoint, and `cache_salt`."""

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: LogitBias | None = None
    seed: int | None = None
    stop: TextOrTexts = []
    stop_token_ids: TokenIds = []
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    routing: str | ExpertPolicyFields | None = None
    return_routed_experts: bool = False
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    priority: int = 0
    timeout: float | None = None
    user: str | None = None
    structured_outputs: dict[str, Any] | None = None

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The parameters; `defaults` are the model's, for fields that are not given.

        Raises:
            ValueError: a value is out of range.
        """
        return SamplingParams(**{**defaults, **self._given()})

    def _given(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in SAMPLING_NAMES & self.model_fields_set}
        if isinstance(self.routing, ExpertPolicyFields):
            given["routing"] = self.routing.model_dump(exclude_unset=True)
        if given.get("logit_bias"):
            given["logit_bias"] = {_token(name): bias for name, bias in given["logit_bias"].items()}
        return given


def _token(name: str) -> int:
    if not name.isascii() or not name.isdecimal():
        raise ValueError(f"logit_bias: {name[:40]!r} is not allowed; it must be a token id")
    return int(name)


def with_nulls(schema: dict[str, Any]) -> None:
    """Adds to a model's JSON schema that fields which may be left out may be null."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


def without_nulls(body: Any) -> Any:
    """A JSON object without its null fields. A model that uses it has the schema of `with_nulls`."""
    return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body
