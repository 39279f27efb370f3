"""Formats whose arguments are raw text between tags of their own: Qwen3-Coder, Seed-OSS, MiniMax-M2, dots."""

from __future__ import annotations

import re
from collections.abc import Callable

from moe_runtime.text.formats.json_builder import JsonBuilder
from moe_runtime.text.formats.json_objects import FENCE, read_block
from moe_runtime.text.formats.json_text import pass_value
from moe_runtime.text.formats.output import Call, Output
from moe_runtime.text.formats.scanner import Scanner, Steps, Tags, drop
from moe_runtime.text.formats.schema import RawValue
from moe_runtime.text.formats.tool_format import ToolFormat

TAG_NAME = re.compile(r"[^<>\n]*")


class XmlReader:
    """Reads `<block> <call NAME> <parameter KEY>VALUE</parameter> </call> </block>`.

    The block's opening tag may be missing if the name is that of a tool. A value loses one newline at each end. It ends
    at its closing tag, or, if that is missing, at the next tag. A tag within a value is told apart by what follows it:
    only a tag of the grammar or the end of the text may follow. A parameter that begins within a value must begin a
    line, and be one of the tool's that has no value yet.

    Args:
        block: name of the outer tag.
        call, parameter: the beginning of an opening tag, up to the name, such as "<function=".
        call_end, parameter_end: the closing tags.
    """

    def __init__(self, block: str, call: str, call_end: str, parameter: str, parameter_end: str) -> None:
        block_begin, block_end = f"<{block}>", f"</{block}>"
        self.opens = (block_begin, call)
        self.tags = (block_end, call_end, parameter, parameter_end)
        self._block_end, self._call, self._call_end = block_end, call, call_end
        self._parameter = parameter
        self._between = Tags(parameter, call_end, block_end)
        self._followers = {
            parameter_end: (parameter, call_end, block_end),
            call_end: (block_end, call),
            block_end: (block_begin, call),
        }
        self._value_ends = Tags(*self._followers, *(f"\n{end}" for end in self._followers), f"\n{parameter}")

    def read(self, tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
        is_bare = tag == self._call
        if not is_bare:
            if (yield from scanner.blanks()) in ("{", "[", FENCE[0]):
                return (yield from read_block(scanner, output, self._block_end))
            if not (yield from scanner.accept(self._call)):
                return scanner.ended
        num_calls = 0
        while True:
            name = _clean((yield from scanner.word(TAG_NAME)))
            if scanner.at_end:
                return num_calls > 0 or not is_bare or output.may_become_known(name)
            is_tag = (yield from scanner.accept(">", "\n")) and name
            if not is_tag or (is_bare and not output.knows(name)):
                return num_calls > 0
            num_calls += 1
            if not (yield from self._arguments(scanner, output.begin_call(name))):
                return True
            yield from scanner.blanks()
            if (yield from scanner.accept(self._block_end, self._call)) != self._call:
                return True

    def _arguments(self, scanner: Scanner, call: Call) -> Steps[bool]:
        """Read the parameters of a call and its closing tag. False: the text ends before."""
        if (yield from scanner.blanks()) == "{":  # the model writes JSON instead
            yield from pass_value(scanner, call.write)
            is_closed = yield from scanner.until(self._between, drop)
            return is_closed != ""
        builder = JsonBuilder(call.write)
        builder.open("{")
        seen: set[str] = set()
        found = yield from scanner.until(self._between, drop)
        while found == self._parameter:
            key = _clean((yield from scanner.word(TAG_NAME)))
            yield from scanner.accept(">")
            while key and found == self._parameter:
                yield from scanner.accept("\n")
                if scanner.at_end:
                    return False
                seen.add(key)
                builder.scalar(JsonBuilder.quote(key))
                value = RawValue(call.types.get(key, frozenset()), builder)
                found, key = yield from self._value(
                    scanner, value, lambda name: not call.types or (name in call.types and name not in seen)
                )
                if not found:
                    return False
                value.close()
            if found != self._call_end and found != self._block_end:
                found = yield from scanner.until(self._between, drop)
        if not found:
            return False
        builder.close()
        return True

    def _value(self, scanner: Scanner, value: RawValue, is_next: Callable[[str], bool]) -> Steps[tuple[str, str]]:
        """Read a value and the tag that ends it; "" at the end of the text.

        Returns:
            The tag, and the key if it is an opening tag of a parameter, which is consumed then.
        """
        while tag := (yield from scanner.until(self._value_ends, value.write, release=False)):
            end = tag.removeprefix("\n")
            if end != self._parameter:
                if (yield from scanner.comes(*self._followers[end])):
                    return end, ""
                value.write(tag)
                continue
            name = yield from scanner.word(TAG_NAME)
            is_tag = yield from scanner.accept(">")
            if scanner.at_end and not is_tag:
                return "", ""
            if is_tag and _clean(name) and is_next(_clean(name)):
                return end, _clean(name)
            value.write(tag + name + is_tag)
        return "", ""


def _clean(name: str) -> str:
    """A name without the quotes that models put around it or leave out."""
    return name.strip().strip("\"'")


def _xml(block: str, call: str, call_end: str, parameter: str, parameter_end: str) -> ToolFormat:
    reader = XmlReader(block, call, call_end, parameter, parameter_end)
    return ToolFormat(opens=reader.opens, read=reader.read, tags=reader.tags, plain_opens=(call,))


QWEN3_CODER = _xml("tool_call", "<function=", "</function>", "<parameter=", "</parameter>")
SEED_OSS = _xml("seed:tool_call", "<function=", "</function>", "<parameter=", "</parameter>")
MINIMAX_M2 = _xml("minimax:tool_call", "<invoke name=", "</invoke>", "<parameter name=", "</parameter>")
DOTS = _xml("dots_function_call", "<invoke name=", "</invoke>", "<parameter name=", "</parameter>")
