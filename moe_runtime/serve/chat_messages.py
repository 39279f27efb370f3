"""Messages and tools of a chat, in the shapes that OpenAI publishes. Fields that they do not name have no effect."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from moe_runtime.serve.bodies import TEXT, FirstErrorList, unsupported, with_nulls, without_nulls, wrong

MAX_MESSAGES = 2**14  # of a chat; also parts of a message, tool calls, and tools
TEXT_PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": TEXT}, "required": ["type", "text"]}


def _function(value: Any) -> str:
    if value == "function":
        return "function"
    raise wrong("'function'; other kinds of tools are not supported")


def _content(value: Any) -> str:
    """The text of a content: a string, or text parts, which are joined by newlines, as vLLM joins them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        raise wrong(f"a string or a list of at most {MAX_MESSAGES} text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(text, str):
            raise wrong('a string or a list of parts such as {"type": "text", "text": "..."}; only text is supported')
        texts.append(text)
    return "\n".join(texts)


Content = Annotated[
    str, PlainValidator(_content), WithJsonSchema({"anyOf": [TEXT, {"type": "array", "items": TEXT_PART}]})
]


FunctionKind = Annotated[str, PlainValidator(_function), WithJsonSchema({"const": "function"})]


class Open(BaseModel):
    """Strict JSON types. Fields that are not named here are left out."""

    model_config = ConfigDict(strict=True, extra="ignore", json_schema_extra=with_nulls)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return without_nulls(body)


class FunctionCall(Open):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Open):
    id: str = ""
    type: FunctionKind = "function"
    function: FunctionCall


class Message(Open):
    """A message of a chat. Only an assistant's may have no content."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[FirstErrorList[ToolCall], Field(max_length=MAX_MESSAGES)] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_audio(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("audio") is not None:
            raise unsupported("messages", body["audio"], "audio must be left out")
        return body

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing_content", "it must have a content")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as `text.chat_history` takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.content is None and self.refusal is not None:
            message["content"] = self.refusal
        calls = [call.model_dump() for call in self.tool_calls or ()]
        if self.function_call is not None:  # the form before there were tools
            calls.append({"id": "", "type": "function", "function": self.function_call.model_dump()})
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        for name, value in (
            ("name", self.name),
            ("tool_calls", calls or None),
            ("tool_call_id", self.tool_call_id),
            ("reasoning_content", reasoning),
        ):
            if value is not None:
                message[name] = value
        if self.role == "function":
            message["role"] = "tool"
        return message


class FunctionDefinition(Open):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Open):
    """A function that the model may call."""

    type: FunctionKind
    function: FunctionDefinition
