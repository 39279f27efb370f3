"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from moe_runtime.serve.bodies import FirstErrorList, wrong
from moe_runtime.serve.chat_messages import MAX_MESSAGES, Message, Tool
from moe_runtime.serve.openai.fields import OpenAIFields
from moe_runtime.serve.rendering import Chat
from moe_runtime.types.sampling_params import MAX_LOGPROBS, SamplingParams


def _tool_choice(value: Any) -> Any:
    if value in ("none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return value
    raise wrong('none, auto, required or {"type": "function", "function": {"name": a tool\'s name}}')


NAMED_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
ToolChoice = Annotated[
    Any,
    PlainValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, NAMED_TOOL]}),
]


class ChatCompletionRequest(OpenAIFields):
    """`POST /v1/chat/completions`. Without a token limit, the output may continue to the end of the context."""

    messages: Annotated[
        FirstErrorList[Message], Field(max_length=MAX_MESSAGES, examples=[[{"role": "user", "content": "Hi"}]])
    ]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: FirstErrorList[Tool] = Field(default_factory=list, max_length=MAX_MESSAGES)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    echo: Literal[False] = False

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Raises ValueError if a value is out of range."""
        given = {"max_tokens": None, **defaults, **self._given()}
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        if given["max_tokens"] == 0:
            raise ValueError("max_tokens: 0 is not allowed; it must be at least 1")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: is not allowed without logprobs; logprobs must be true")
        given["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return SamplingParams(**given, **self._form())

    def forced_tools(self) -> list[dict[str, Any]]:
        """The tools of which the answer must call one; none if it may do as it likes. Raises ValueError."""
        if self.tool_choice in ("none", "auto"):
            return []
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        if self.tool_choice != "required":
            name = self.tool_choice["function"]["name"]
            tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise ValueError(f"tool_choice: {self.tool_choice!r} is not allowed; tools must have a tool that fits it")
        return tools

    @property
    def may_call_many(self) -> bool:
        """Whether the answer may have several calls."""
        return self.parallel_tool_calls and not isinstance(self.tool_choice, dict)

    def chat(self, max_tools: int) -> Chat:
        """The conversation. Raises ValueError if there are too many tools."""
        if len(self.tools) > max_tools:
            raise ValueError(f"tools: {len(self.tools)} tools are too many; it must be at most {max_tools} (max_tools)")
        generates = (
            not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        )
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return Chat(
            messages=[message.plain() for message in self.messages],
            # A model that is not to call a tool does not see any.
            tools=[] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools],
            add_generation_prompt=generates,
            continue_final_message=self.continue_final_message,
            add_special_tokens=self.add_special_tokens is True,
            template_kwargs={**effort, **self.chat_template_kwargs},
        )
