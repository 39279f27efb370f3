"""Generated turns in every wire format: cut anywhere they give what was written, and nothing of the markup."""

from __future__ import annotations

import itertools

import pytest
from chat_wire import TOOLS, WIRES, Parsed, parse, to_json
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_runtime.text.formats.harmony import HARMONY_TAGS
from moe_runtime.text.formats.registry import TOOL_FORMATS, ChatFormat, choose_format

BLANKS = " \t\r\n"
PIECES = ["a", " ", "\n", "é", "🙂", "你", "<", "</", "<tool", "<think", "</thi", "[", "{", "}", "]", "<|", "`", "Hi."]
VALUE_PIECES = [*PIECES, '"', "\\", "'", ",", ":", ";", "</tool_call", "</param", "\n</", "null", "1"]
TAGS = ("<tool_call>", "<think>", "</think>", "<function=", "[TOOL_CALLS]", "<|channel|>", "<tool_calls>", "[THINK]")
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join).map(lambda text: text.strip(BLANKS))
plain = texts.filter(lambda text: not any(tag in text for tag in TAGS))
strings = st.lists(st.sampled_from(VALUE_PIECES), max_size=8).map("".join)
scalars = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | strings
nested = st.dictionaries(st.sampled_from(["k", "l"]), scalars | st.lists(scalars, max_size=2), max_size=2)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "city": strings,
        "days": st.integers(-(10**20), 10**20),
        "exact": st.booleans(),
        "share": st.floats(-1e9, 1e9, allow_nan=False),
        "opt": nested,
        "tags": st.lists(scalars | nested, max_size=3),
        "unit": st.none() | strings.filter(lambda text: text.strip() not in ("null", "None")),
    },
)
a_call = st.tuples(st.just("get_weather"), arguments) | st.tuples(st.just("now"), st.just({}))
turns = st.tuples(st.none() | plain.filter(bool), plain, st.lists(a_call, max_size=3))


def the_format(name: str) -> ChatFormat:
    wire = WIRES[name]
    return choose_format("", None, [], wire.tool_format, wire.reasoning_format or "none")


def written(name: str, turn) -> tuple[str, str, str]:
    """A turn's text, content and reasoning. Texts that the format cannot hold are left out."""
    wire = WIRES[name]
    reasoning, text, calls = turn
    if wire.reasoning_format is None:
        reasoning = None
    output = wire.thought(reasoning) if reasoning else ""
    output += wire.text(text) if text else ""
    output += wire.calls(calls) if calls else ""
    return output, text, reasoning or ""


def can_hold(name: str, value: object) -> bool:
    """Whether a raw text may be this string: it does not end the value, and no newline at its ends is lost."""
    if isinstance(value, dict):
        return all(can_hold(name, item) for item in value.values())
    if isinstance(value, list):
        return all(can_hold(name, item) for item in value)
    wire = WIRES[name]
    if wire.is_raw and isinstance(value, str):
        return value == value.strip("\n") and "</tool_call>" not in value
    return True


def cut(text: str, at: list[int]) -> list[str]:
    borders = [0, *sorted({index % (len(text) + 1) for index in at}), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(borders)]


@pytest.mark.parametrize("name", WIRES)
@settings(max_examples=12)
@given(turn=turns, cuts=st.lists(st.integers(0, 10**6), max_size=6))
def test_a_turn_gives_what_was_written_at_every_cut(name, turn, cuts):
    turn = (*turn[:2], [call for call in turn[2] if can_hold(name, call[1])])
    # A bracket before calls of llama3 is the beginning of a list of calls.
    assume(name != "llama3_json" or not turn[1].rstrip(BLANKS).endswith("["))
    output, content, reasoning = written(name, turn)
    whole = parse(the_format(name), [output])
    assert whole.content.strip(BLANKS) == content
    assert whole.reasoning == reasoning
    assert [(call, to_json(values)) for call, values in whole.values()] == [
        (call, to_json(values)) for call, values in turn[2]
    ]
    assert len({call["id"] for call in whole.calls}) == len(whole.calls)
    for pieces in (list(output), cut(output, cuts)):
        assert parse(the_format(name), pieces) == whole
    silent = parse(the_format(name), pieces, calls=False)
    assert (silent.content.strip(BLANKS), silent.reasoning, silent.calls) == (content, reasoning, [])


@pytest.mark.parametrize("name", WIRES)
@settings(max_examples=12)
@given(turn=turns, where=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 10**6), max_size=4))
def test_a_turn_that_is_cut_off_gives_a_prefix(name, turn, where, cuts):
    turn = (*turn[:2], [call for call in turn[2] if can_hold(name, call[1])])
    output, *_ = written(name, turn)
    whole = parse(the_format(name), [output])
    begun = output[: where % (len(output) + 1)]
    part = parse(the_format(name), [begun])
    assert parse(the_format(name), list(begun)) == part
    assert parse(the_format(name), cut(begun, cuts)) == part
    assert len(part.calls) <= len(whole.calls)
    for call, full in zip(part.calls, whole.calls, strict=False):
        assert (call["id"], call["name"]) == (full["id"], full["name"])
        assert full["arguments"].startswith(call["arguments"])
    for tag in TAGS:
        assert tag not in part.content + part.reasoning


@pytest.mark.parametrize("tools", list(TOOL_FORMATS))
@settings(max_examples=12)
@given(
    pieces=st.lists(st.sampled_from([*VALUE_PIECES, "get_weather", "(", ")", "=", "city", "name", *TAGS]), max_size=20),
    data=st.data(),
)
def test_no_text_breaks_a_parser(tools, pieces, data):
    """Any mixture of a format's tags and other text is read to its end, at every cut alike."""
    chosen = choose_format("", None, [], tools, "gpt-oss" if tools == "openai" else "qwen3")
    prompt = data.draw(st.sampled_from(["", "<think>", "<|start|>assistant"]))
    wire = data.draw(
        st.permutations([*pieces, *data.draw(st.lists(st.sampled_from(sorted(tags_of(tools))), max_size=6))])
    )
    text = "".join(wire)
    whole = parse(chosen, [text], prompt)
    assert parse(chosen, list(text), prompt) == whole
    assert parse(chosen, wire, prompt) == whole


def tags_of(tools: str) -> set[str]:
    found = TOOL_FORMATS[tools]
    return set(found.all_tags if found else (*HARMONY_TAGS, "to=functions.now"))


@settings(max_examples=12)
@given(turn=turns)
def test_without_formats_the_text_stays(turn):
    output, *_ = written("hermes", turn)
    nothing = choose_format("", None, [], "none", "none")
    assert parse(nothing, list(output), tools=TOOLS) == Parsed(content=output)
