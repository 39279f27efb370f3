"""Reading text in pieces, and how much work it is."""

from __future__ import annotations

import pytest
from chat_wire import WIRES, parse
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.text.formats.registry import choose_format
from moe_runtime.text.formats.scanner import MAX_BLANKS, Scanner, Tags, overlap

TAGS = ("ab", "\nab", "<ac", "c|", "<<")


def pieces_until(text: str, pieces: list[str], release: bool) -> tuple[list[str], str]:
    scanner, found = Scanner(), []
    steps = scanner.until(Tags(*TAGS), found.append, release)
    for piece in pieces:
        scanner.feed(piece)
        try:
            next(steps)
        except StopIteration as stop:
            return found, stop.value
    scanner.end()
    with pytest.raises(StopIteration) as stop:
        next(steps)
    return found, stop.value.value


@given(text=st.text("ab<c|\n", max_size=12), cut=st.integers(0, 12), release=st.booleans())
def test_until_finds_the_first_tag_and_holds_back_only_beginnings(text, cut, release):
    first = min((place for tag in TAGS if (place := text.find(tag)) >= 0), default=len(text))
    before, tag = pieces_until(text, [text], release)
    if first < len(text):
        assert ("".join(before), text.startswith(tag, first)) == (text[:first], True)
    else:
        begun = max((n for t in TAGS for n in range(1, len(t)) if text.endswith(t[:n])), default=0)
        assert "".join(before) == (text if release else text[: len(text) - begun])
    for pieces in (list(text), [text[:cut], text[cut:]]):
        again, same = pieces_until(text, pieces, release)
        assert ("".join(again), same) == ("".join(before), tag)


def test_tags_that_could_hide_each_other_overlap():
    assert overlap(["[", "[THINK]"]) and overlap(["<a", "<ab"]) and overlap(["b", "abc"])
    assert not overlap(["\n</a>", "</a>", "<a>", "</b>"])


LONG = 20_000


def work(monkeypatch, name: str, size: int, step: int) -> tuple[int, int, int]:
    """Parses a call with a long string. Returns how often text was consumed, the characters that were held back from
    one piece to the next, and the largest number of pieces without any news of the arguments."""
    consumed = held = silent = longest_silence = 0
    consume, feed = Scanner._consume, Scanner.feed

    def counting_consume(self: Scanner, end: int) -> str:
        nonlocal consumed
        consumed += 1
        return consume(self, end)

    def counting_feed(self: Scanner, text: str) -> None:
        nonlocal held
        held += len(self._text) - self._at
        feed(self, text)

    monkeypatch.setattr(Scanner, "_consume", counting_consume)
    monkeypatch.setattr(Scanner, "feed", counting_feed)
    text = WIRES[name].calls([("get_weather", {"city": "x é" * (size // 3)})])
    parser = choose_format("", None, [], WIRES[name].tool_format, "none").parser(
        "", [{"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}}],
        calls=True, num_earlier_calls=0, new_id=lambda: "1",
    )  # fmt: skip
    for begin in range(0, len(text), step):
        delta = parser.feed(text[begin : begin + step])
        silent = 0 if delta.tool_calls else silent + 1
        longest_silence = max(silent, longest_silence)
    parser.finish()
    monkeypatch.undo()
    return consumed, held, longest_silence


@pytest.mark.parametrize("name", WIRES)
def test_a_long_string_streams_with_linear_work(monkeypatch, name):
    consumed, held, silence = work(monkeypatch, name, LONG, step=4)
    num_pieces = LONG // 4
    assert consumed <= 2 * num_pieces + 200
    assert held <= 400, "text is consumed when it comes"
    assert silence <= 30, "the arguments grow with every piece, after the opening tags"


@pytest.mark.parametrize("name", WIRES)
def test_many_calls_in_one_piece_are_linear_work(monkeypatch, name):
    counts = []
    for num_calls in (20, 40, 80):
        count = 0
        consume = Scanner._consume

        def counting(self: Scanner, end: int, consume=consume) -> str:
            nonlocal count
            count += 1
            return consume(self, end)

        monkeypatch.setattr(Scanner, "_consume", counting)
        text = WIRES[name].calls([("get_weather", {"city": "Paris"})] * num_calls)
        parsed = parse(choose_format("", None, [], WIRES[name].tool_format, "none"), [text])
        assert len(parsed.calls) == num_calls
        monkeypatch.undo()
        counts.append(count)
    assert counts[2] - counts[1] <= 2.2 * (counts[1] - counts[0])


@pytest.mark.parametrize("tools", ["hermes", "llama3_json", "pythonic", "qwen3_coder"])
def test_prose_full_of_opening_tags_is_linear_work(monkeypatch, tools):
    count = 0
    consume = Scanner._consume

    def counting(self: Scanner, end: int) -> str:
        nonlocal count
        count += end - self._at
        return consume(self, end)

    monkeypatch.setattr(Scanner, "_consume", counting)
    text = '<tool_call> { [ {"name": "x" <function=y> ' * 500
    parsed = parse(choose_format("", None, [], tools, "none"), [text])
    assert parsed.content == text
    assert count == len(text), "every character is consumed once"


@pytest.mark.parametrize("tools", ["llama3_json", "pythonic"])
def test_without_tools_brackets_are_no_work(monkeypatch, tools):
    text = "{[" * 500
    monkeypatch.setattr(Scanner, "keep", lambda self, begin="": pytest.fail("a reader has begun"))
    assert parse(choose_format("", None, [], tools, "none"), [text], tools=[]).content == text


FULL_OF_TAGS = {  # tool format, begin, what is repeated, end
    "closing tags in a value": (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=city>\n",
        "</parameter>\n</tool_call>\n x\n<parameter=y> </function> \n",
        "\n</parameter></function></tool_call>",
    ),
    "blanks after closing tags": (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=city>\n",
        "</parameter>" + " " * 200,
        "\n</parameter></function></tool_call>",
    ),
    "an expression": ("lfm2", "<|tool_call_start|>[get_weather(city=", "f('a', \"b\" [1, {2: 3}]) + ", "1)]"),
    "strings that are added": ("lfm2", "<|tool_call_start|>[get_weather(city=", "'a' + \"b\" r'c' ", "'')]"),
    "escapes": ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "', '\\d\n\\u00zz\\"', '"}}'),
    "a text after a call": (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>',
        "a <b> \n",
        ".",
    ),
    "other JSON": ("llama3_json", '{"name": "x", "value": [', '{"name": "get_weather", "parameters": {}}, ', "]}"),
}


@pytest.mark.parametrize("name", FULL_OF_TAGS)
def test_what_is_read_twice_is_short(monkeypatch, name):
    tools, begin, repeated, end = FULL_OF_TAGS[name]
    text = begin + repeated * 300 + end
    longest = count = 0
    consume, feed = Scanner._consume, Scanner.feed

    def counting_consume(self: Scanner, end: int) -> str:
        nonlocal count
        count += end - self._at
        return consume(self, end)

    def counting_feed(self: Scanner, text: str) -> None:
        nonlocal longest
        longest = max(longest, len(self._text) - self._at)
        feed(self, text)

    monkeypatch.setattr(Scanner, "_consume", counting_consume)
    monkeypatch.setattr(Scanner, "feed", counting_feed)
    parse(choose_format("", None, [], tools, "qwen3"), list(text), prompt="<think>")
    assert count <= 1.1 * len(text), "every character is consumed once"
    assert longest <= MAX_BLANKS + 20, "what is looked at before it is consumed"
