"""Mistral: `[TOOL_CALLS]NAME[ARGS]{...}` (new), `[TOOL_CALLS][{"name": ..., "arguments": ...}]` (old)."""

from __future__ import annotations

from moe_runtime.text.formats.json_objects import pass_arguments, read_calls
from moe_runtime.text.formats.output import Output
from moe_runtime.text.formats.scanner import Scanner, Steps
from moe_runtime.text.formats.tool_format import NAME, ToolFormat

CALL, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def _read(tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
    if (yield from scanner.blanks()) in ("[", "{"):
        yield from read_calls(scanner, output)
        return True
    name = yield from scanner.word(NAME)
    yield from scanner.blanks()
    if (yield from scanner.accept(CALL_ID)):
        yield from scanner.word(NAME)
    if not (yield from scanner.accept(ARGS)) and (yield from scanner.look(1)) != "{":
        rest = yield from scanner.look(len(CALL_ID))
        return any(tag.startswith(rest) for tag in (CALL_ID, ARGS))  # cut off
    if name:
        call = output.begin_call(name)
        yield from pass_arguments(scanner, call)
        if not scanner.at_end:
            call.close()
    return True


MISTRAL = ToolFormat(opens=(CALL,), read=_read, tags=(CALL_ID, ARGS), short_ids=True)
