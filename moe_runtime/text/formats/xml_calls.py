"""Formats whose arguments are raw text between tags of their own: Qwen3-Coder, Seed-OSS, MiniMax-M2, dots."""

from __future__ import annotations

import re

from moe_runtime.text.formats.json_builder import JsonBuilder
from moe_runtime.text.formats.json_text import read_calls
from moe_runtime.text.formats.output import Call, Output
from moe_runtime.text.formats.scanner import Scanner, Steps, Tags, drop
from moe_runtime.text.formats.schema import RawValue
from moe_runtime.text.formats.tool_format import ToolFormat

TAG_NAME = re.compile(r"[^<>\n]*")


class XmlReader:
    """Reads `<block> <call NAME> <parameter KEY>VALUE</parameter> </call> </block>`.

    The block's opening tag may be missing if the name is that of a tool. A value loses one newline at each end. It ends
    at its closing tag; if that is missing, at the next tag at the start of a line.

    Args:
        block: name of the outer tag.
        call, parameter: the beginning of an opening tag, up to the name, such as "<function=".
        call_end, parameter_end: the closing tags.
    """

    def __init__(self, block: str, call: str, call_end: str, parameter: str, parameter_end: str) -> None:
        self.opens = (f"<{block}>", call)
        self.tags = (f"</{block}>", call_end, parameter, parameter_end)
        self._block_end, self._call, self._call_end = f"</{block}>", call, call_end
        self._parameter, self._parameter_end = parameter, parameter_end
        self._between = Tags(parameter, call_end, self._block_end)
        enders = (parameter_end, parameter, call_end, self._block_end)
        self._value_ends = Tags(parameter_end, *("\n" + ender for ender in enders))

    def read(self, tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
        is_bare = tag == self._call
        if not is_bare:
            if (yield from scanner.blanks()) in ("{", "["):
                found = yield from read_calls(scanner, output)
                yield from scanner.blanks()
                yield from scanner.accept(self._block_end)
                return found
            if not (yield from scanner.accept(self._call)):
                return scanner.ended
        num_calls = 0
        while True:
            name = _clean((yield from scanner.word(TAG_NAME)))
            if scanner.at_end:
                return num_calls > 0 or not is_bare or output.may_become_known(name)
            is_call = (yield from scanner.accept(">")) and name and (not is_bare or output.knows(name))
            if not is_call:
                return num_calls > 0
            num_calls += 1
            if not (yield from self._arguments(scanner, output.begin_call(name))):
                return True
            yield from scanner.blanks()
            if (yield from scanner.accept(self._block_end, self._call)) != self._call:
                return True

    def _arguments(self, scanner: Scanner, call: Call) -> Steps[bool]:
        """Read the parameters of a call and its closing tag. False: the text ends before."""
        builder = JsonBuilder(call.write)
        builder.open("{")
        found = ""
        while found != self._call_end and found != self._block_end:
            if found != self._parameter:
                found = yield from scanner.until(self._between, drop)
            if found == self._parameter:
                key = _clean((yield from scanner.word(TAG_NAME)))
                yield from scanner.accept(">")
                yield from scanner.accept("\n")
                if scanner.at_end:
                    return False
                builder.scalar(JsonBuilder.quote(key))
                value = RawValue(call.types.get(key, frozenset()), builder)
                ender = yield from scanner.until(self._value_ends, value.write, release=False)
                found = ender.removeprefix("\n")
                if found:
                    value.close()
            if not found:
                return False
        builder.close()
        return True


def _clean(name: str) -> str:
    """A name without the quotes that models put around it or leave out."""
    return name.strip().strip("\"'")


def _xml(block: str, call: str, call_end: str, parameter: str, parameter_end: str) -> ToolFormat:
    reader = XmlReader(block, call, call_end, parameter, parameter_end)
    return ToolFormat(opens=reader.opens, read=reader.read, tags=reader.tags)


QWEN3_CODER = _xml("tool_call", "<function=", "</function>", "<parameter=", "</parameter>")
SEED_OSS = _xml("seed:tool_call", "<function=", "</function>", "<parameter=", "</parameter>")
MINIMAX_M2 = _xml("minimax:tool_call", "<invoke name=", "</invoke>", "<parameter name=", "</parameter>")
DOTS = _xml("dots_function_call", "<invoke name=", "</invoke>", "<parameter name=", "</parameter>")
