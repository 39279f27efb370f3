"""Formats with a section of calls between control tokens: DeepSeek V3, R1 and V3.1, Kimi K2."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from moe_runtime.text.formats.json_objects import pass_arguments
from moe_runtime.text.formats.output import Call, Output
from moe_runtime.text.formats.scanner import Scanner, Steps, Tags, drop
from moe_runtime.text.formats.tool_format import ToolFormat

LINE = re.compile(r"[^\n<{`]*")
KIMI_ID = re.compile(r"(?:functions\.)?(?P<name>.*?)(?::\d+)?", re.DOTALL)
KIMI_COUNTER = re.compile(r"(?:call_?)?\d*", re.ASCII)


@dataclass(frozen=True)
class SectionReader:
    """Reads `begin (call HEAD separator ARGUMENTS call_end)* end`; the section's own tags may be missing.

    `name_of` finds the name in the head. It may read on after the separator.
    """

    begin: str
    end: str
    call: str
    separator: str
    call_end: str
    name_of: Callable[[str, Scanner, Output], Steps[str]]

    @property
    def opens(self) -> tuple[str, ...]:
        return self.begin, self.call

    @property
    def tags(self) -> tuple[str, ...]:
        return self.end, self.separator, self.call_end

    def read(self, tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
        next_call = Tags(self.call, self.end)
        after_head = Tags(self.separator, self.call, self.call_end, self.end)
        after_call = Tags(self.call, self.call_end, self.end)
        found = tag if tag == self.call else (yield from scanner.until(next_call, drop))
        while found == self.call:
            head: list[str] = []
            found = yield from scanner.until(after_head, head.append)
            if found == self.separator:
                name = yield from self.name_of("".join(head).strip(), scanner, output)
                if scanner.at_end:
                    return True
                call = output.begin_call(name) if name else None
                yield from pass_arguments(scanner, call or Call({}, drop))
                found = yield from scanner.until(after_call, drop)
                if call and found:
                    call.close()
            if found == self.call_end:
                found = yield from scanner.until(next_call, drop)
        return True


def _deepseek_name(head: str, scanner: Scanner, output: Output) -> Steps[str]:
    """V3.1 writes the name before the separator, V3 after it, with the arguments in a fenced block."""
    if (yield from scanner.blanks()) in ("{", '"', "<", ""):
        return head
    name = yield from scanner.word(LINE)
    yield from scanner.blanks()
    if (yield from scanner.accept("```json", "```")):
        yield from scanner.blanks()
        yield from scanner.accept("```")  # an empty block
    return name.strip()


def _kimi_name(head: str, scanner: Scanner, output: Output) -> Steps[str]:
    """The id holds the name: `functions.NAME:0`. A counter alone (`0`, `call00003`) means the only tool.

    If there are several tools, nothing says which one is meant, and the call is left out.
    """
    yield from scanner.blanks()
    found = KIMI_ID.fullmatch(head)
    assert found is not None
    name = found["name"].strip()
    if not KIMI_COUNTER.fullmatch(name) or output.knows(name):
        return name
    return output.tool_names[0] if len(output.tool_names) == 1 else ""


def _sections(reader: SectionReader, stop_tokens: tuple[str, ...] = (), numbered_ids: bool = False) -> ToolFormat:
    return ToolFormat(reader.opens, reader.read, reader.tags, stop_tokens=stop_tokens, numbered_ids=numbered_ids)


DEEPSEEK = _sections(
    SectionReader(
        begin="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
        call="<｜tool▁call▁begin｜>",
        separator="<｜tool▁sep｜>",
        call_end="<｜tool▁call▁end｜>",
        name_of=_deepseek_name,
    )
)
KIMI_K2 = _sections(
    SectionReader(
        begin="<|tool_calls_section_begin|>",
        end="<|tool_calls_section_end|>",
        call="<|tool_call_begin|>",
        separator="<|tool_call_argument_begin|>",
        call_end="<|tool_call_end|>",
        name_of=_kimi_name,
    ),
    numbered_ids=True,
)
