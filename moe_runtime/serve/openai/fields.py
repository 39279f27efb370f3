"""Fields that OpenAI's endpoints share, and what happens with those that are not done.

A field that nothing here names has no effect: clients send fields that are newer than this server. The log says so once
for each name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from moe_runtime.serve.bodies import Body, SamplingFields, unsupported, with_nulls, without_nulls

logger = logging.getLogger(__name__)

MAX_NAMES, MAX_NAME = 100, 40  # unknown fields that the log names, and their characters

# Fields that would change the answer and are not done, with the values that change nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "verbosity": ("medium",),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "chat_template": (),
    "documents": ([],),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
}
NO_EFFECT = "Has no effect."


class StreamOptions(Body):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = Field(False, description=NO_EFFECT)


class OpenAIFields(SamplingFields):
    """Fields of OpenAI's endpoints. Null means not given."""

    model_config = ConfigDict(extra="allow", json_schema_extra=with_nulls)

    model: str | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    metadata: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    store: bool | None = Field(None, description=NO_EFFECT)
    service_tier: str | None = Field(None, description=NO_EFFECT)
    safety_identifier: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_retention: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    response_format: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = Field(None, description="Has no effect on the answer.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        body = without_nulls(body)
        for name in NEUTRAL.keys() & body if isinstance(body, dict) else ():
            if body[name] not in NEUTRAL[name]:
                raise unsupported(name, body[name], " or ".join(["it must be left out", *map(repr, NEUTRAL[name])]))
        return body

    def _form(self) -> dict[str, Any]:
        """`structured_outputs` as `response_format` asks for them. Raises ValueError."""
        asked = self.response_format
        if asked is None or asked.get("type") == "text":
            return {}
        if self.structured_outputs is not None:
            raise ValueError("response_format: is not allowed beside structured_outputs; only one may say the form")
        if asked.get("type") == "json_object":
            return {"structured_outputs": {"json_object": True}}
        named = asked.get("json_schema")
        if asked.get("type") != "json_schema" or not isinstance(named, dict) or "schema" not in named:
            raise ValueError(
                f"response_format: {str(asked)[:80]} is not allowed; its type must be text, json_object, "
                "or json_schema with json_schema.schema"
            )
        return {"structured_outputs": {"json": named["schema"]}}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_every_chunk(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


class UnknownFields:
    """Logs each field without effect once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, body: OpenAIFields) -> None:
        names = {name[:MAX_NAME] for name in body.model_extra or () if name not in NEUTRAL} - self._seen
        new = sorted(names)[: MAX_NAMES - len(self._seen)]
        if new:
            self._seen.update(new)
            logger.info("fields without effect: %s", ", ".join(map(repr, new)))
