"""What a parser hands out: pieces of content, of reasoning and of tool calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.text.formats.scanner import BLANKS, Write, drop
from moe_runtime.text.formats.schema import Types, parameter_types


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call.

    Attributes:
        index: number of the call in this output, from 0.
        id, name: only in the call's first delta.
        arguments: the next piece of the arguments' JSON text.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class ChatDelta:
    """What has become known since the last delta."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __add__(self, later: ChatDelta) -> ChatDelta:
        return ChatDelta(
            self.content + later.content, self.reasoning + later.reasoning, self.tool_calls + later.tool_calls
        )


class Channel:
    """Text of one field, in segments that other things separate.

    Blanks at the end of a segment are left out once `end` is called; so are those at the start of a later one. A
    newline stands between segments.

    Args:
        trim: leave out blanks at the start of the first segment too.
    """

    def __init__(self, trim: bool) -> None:
        self._ready: list[str] = []
        self._held: list[str] = []  # blanks; more text decides about them
        self._trim = trim
        self._is_ended = False
        self.is_empty = True
        self.at_start = True  # of a segment: no text but blanks has come

    def write(self, text: str) -> None:
        if self.at_start and self._trim:
            text = text.lstrip(BLANKS)
        body = text.rstrip(BLANKS)
        if body:
            self._ready += [*self._held, body]
            self._held = []
            self._is_ended = self.is_empty = self.at_start = False
        if len(text) > len(body):
            self._held.append(text[len(body) :])

    def end(self) -> None:
        """End the segment."""
        self._held = [] if self.is_empty else ["\n"]
        self._is_ended = self._trim = self.at_start = True

    def finish(self) -> None:
        """No more text follows."""
        if not self._is_ended:
            self._ready += self._held

    def take(self) -> str:
        text = "".join(self._ready)
        self._ready = []
        return text


class Undecided:
    """Text of which a later tag says whether it is content or part of a thought."""

    def __init__(self) -> None:
        self._pieces: list[str | None] = []  # None: the end of a segment
        self.at_start = True

    def write(self, text: str) -> None:
        self._pieces.append(text)
        self.at_start = self.at_start and not text.strip(BLANKS)

    def end(self) -> None:
        """End the segment."""
        self._pieces.append(None)
        self.at_start = True

    def move_to(self, channel: Channel) -> None:
        for piece in self._pieces:
            if piece is None:
                channel.end()
            else:
                channel.write(piece)
        self._pieces = []
        self.at_start = True


class Call:
    """A tool call that is being read."""

    def __init__(self, types: Types, write: Write) -> None:
        self.types = types
        self._write = write
        self.is_empty = True

    def write(self, text: str) -> None:
        """The next piece of the arguments' JSON text."""
        if text:
            self.is_empty = False
            self._write(text)

    def close(self) -> None:
        """The call is complete. Arguments that were left out are an empty object."""
        if self.is_empty:
            self.write("{}")


class Output:
    """Collects what a parser finds, for the next delta.

    Args:
        tools: OpenAI's tool objects.
        new_id: the id of a call, from its name and index.
        calls: False drops all calls.
        trim_content, trim_reasoning: leave out blanks at the start.

    Attributes:
        num_begun: calls that were found, also if they are dropped.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        new_id: Callable[[str, int], str],
        calls: bool,
        trim_content: bool,
        trim_reasoning: bool,
    ) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self._tools = {function["name"]: function for function in functions if isinstance(function.get("name"), str)}
        self._new_id = new_id
        self._calls = calls
        self._last_call: Call | None = None
        self.num_begun = 0
        self._deltas: list[ToolCallDelta] = []
        self.content = Channel(trim_content)
        self.reasoning = Channel(trim_reasoning)

    @property
    def tool_names(self) -> Sequence[str]:
        return list(self._tools)

    def knows(self, name: str) -> bool:
        return name in self._tools

    def may_become_known(self, name: str) -> bool:
        """Whether a name that is cut off may be the beginning of a tool's."""
        return any(tool.startswith(name) for tool in self._tools)

    def begin_call(self, name: str) -> Call:
        types = parameter_types(self._tools.get(name, {}))
        self.content.end()
        index = self.num_begun
        self.num_begun += 1
        if not self._calls:
            return Call(types, drop)
        self._deltas.append(ToolCallDelta(index, self._new_id(name, index), name, ""))
        self._last_call = Call(types, lambda text: self._deltas.append(ToolCallDelta(index, None, None, text)))
        return self._last_call

    def finish(self, is_complete: bool) -> None:
        if is_complete and self._last_call:
            self._last_call.close()
        self.content.finish()
        self.reasoning.finish()

    def take(self) -> ChatDelta:
        """What was found since the last call; pieces of one call are joined."""
        deltas, self._deltas = self._deltas, []
        joined: list[ToolCallDelta] = []
        begin = 0
        for end in range(1, len(deltas) + 1):
            if end == len(deltas) or deltas[end].index != deltas[begin].index:
                first = deltas[begin]
                arguments = "".join(delta.arguments for delta in deltas[begin:end])
                joined.append(ToolCallDelta(first.index, first.id, first.name, arguments))
                begin = end
        return ChatDelta(self.content.take(), self.reasoning.take(), tuple(joined))
