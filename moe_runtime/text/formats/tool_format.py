"""What all tool formats have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from moe_runtime.text.formats.output import Output
from moe_runtime.text.formats.scanner import Scanner, Steps

# Reads calls after an opening tag, which is consumed. Returns whether there was a call, or one that is cut off. If not,
# the tag and what was consumed after it is text. A reader that has called `Scanner.keep` itself has read calls up to
# there, and only what was consumed after that is text.
ReadCalls = Callable[[str, Scanner, Output], Steps[bool]]
NewId = Callable[[str, int], str]  # a call's id, from its name and its number in the conversation
NAME = re.compile(r"[^\s<>()\[\]{}|,:=\"']*")


@dataclass(frozen=True)
class ToolFormat:
    """How a family writes tool calls.

    Attributes:
        opens: tags of which one begins every call.
        plain_opens: those that plain text may hold too. They count only if there are tools.
        read: reads calls after such a tag.
        tags: all other tags that the reader looks for.
        stop_tokens: tokens that end a turn with calls, besides the model's own.
        numbered_ids: an id is the name and the call's number in the conversation, as `functions.NAME:0`.
        short_ids: an id has nine letters or digits.
    """

    opens: tuple[str, ...]
    read: ReadCalls
    tags: tuple[str, ...] = ()
    plain_opens: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    numbered_ids: bool = False
    short_ids: bool = False

    @property
    def all_tags(self) -> tuple[str, ...]:
        return (*self.opens, *self.tags)
