"""Calls written as Python, `[f(a="x", days=3), g()]`: Llama 4, where tags around the list are optional, and LFM2."""

from __future__ import annotations

from moe_runtime.text.formats.json_builder import JsonBuilder
from moe_runtime.text.formats.json_objects import read_call
from moe_runtime.text.formats.output import Call, Output
from moe_runtime.text.formats.python_values import pass_source, read_value
from moe_runtime.text.formats.scanner import Scanner, Steps, drop
from moe_runtime.text.formats.tool_format import NAME, ToolFormat

LIST_ENDS = ("<|python_end|>", "<|tool_call_end|>")
BARE_LIST = "["


def _read(tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
    """Read a list of calls. Without a tag, the first one must be that of a given tool."""
    is_bare = tag == BARE_LIST
    if not is_bare:
        yield from scanner.blanks()
        yield from scanner.accept(BARE_LIST)
    num_calls = 0
    while (char := (yield from scanner.blanks())) not in ("", "]"):
        known_only = is_bare and not num_calls
        if char == "{":  # the model writes JSON instead
            if not (yield from read_call(scanner, output, known_only)):
                break
        else:
            name = yield from scanner.word(NAME)
            yield from scanner.blanks()
            if scanner.at_end:
                return num_calls > 0 or not is_bare or (name != "" and output.may_become_known(name))
            if not name or (known_only and not output.knows(name)) or not (yield from scanner.accept("(")):
                break
            yield from _arguments(scanner, output.begin_call(name))
        num_calls += 1
        yield from scanner.blanks()
        yield from scanner.accept(",")
        yield from scanner.blanks()
        if is_bare:
            scanner.keep()  # what follows and is no call stays text
    if is_bare and not (num_calls and char in ("", "]")):
        return False
    yield from scanner.accept("]")
    yield from scanner.blanks()
    yield from scanner.accept(*LIST_ENDS)
    return True


def _arguments(scanner: Scanner, call: Call) -> Steps[None]:
    """Read `a="x", days=3)`. Values without a name are left out, because nothing says which argument they are."""
    builder = JsonBuilder(call.write)
    builder.open("{")
    while not scanner.at_end:
        yield from scanner.blanks()
        if (yield from scanner.accept(")")):
            builder.close()
            return
        key = yield from scanner.word(NAME)
        yield from scanner.blanks()
        if key and (yield from scanner.accept("=")):
            builder.scalar(JsonBuilder.quote(key))
            yield from read_value(scanner, builder)
        elif key == "**" and (yield from scanner.accept("{")):
            yield from _unpacked(scanner, builder)
        yield from pass_source(scanner, drop)
        yield from scanner.accept(",", ":", "]", "}")


def _unpacked(scanner: Scanner, builder: JsonBuilder) -> Steps[None]:
    """Read the items of `**{"city": "Paris"}`, which are arguments too."""
    while (yield from scanner.blanks()) and not (yield from scanner.accept("}")):
        yield from read_value(scanner, builder)
        yield from scanner.blanks()
        yield from scanner.accept(":", ",")


PYTHONIC = ToolFormat(
    opens=("<|python_start|>", BARE_LIST),
    read=_read,
    tags=("<|python_end|>",),
    plain_opens=(BARE_LIST,),
    stop_tokens=("<|eom|>", "<|eot|>"),
)
LFM2 = ToolFormat(opens=("<|tool_call_start|>",), read=_read, tags=("<|tool_call_end|>",))
