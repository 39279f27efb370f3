"""Outputs as models of each family write them, and as they get them wrong."""

from __future__ import annotations

import ast
import contextlib
import json

import pytest
from chat_wire import CITY, TOOLS, parse, parse_at_every_cut
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.text.formats.registry import ChatFormat, choose_format
from moe_runtime.text.formats.scanner import MAX_BLANKS

PARIS, ROME = ("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})
NOW = ("now", {})
BAR, SPACE = "｜", "▁"


def chosen(tools: str, reasoning: str = "none") -> ChatFormat:
    return choose_format("", None, [], tools, reasoning)


def deepseek(text: str) -> str:
    """Angle brackets with the bars and blanks that DeepSeek's tokens have."""
    return text.replace("<|", f"<{BAR}").replace("|>", f"{BAR}>").replace("~", SPACE)


CALLS = {
    # as written by the family
    "hermes": ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', [PARIS]),
    "hermes, keys the other way": (
        "hermes",
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>',
        [PARIS],
    ),
    "hermes, no arguments": ("hermes", '<tool_call>{"name": "now"}</tool_call>', [NOW]),
    "hermes, null arguments": ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', [NOW]),
    "hermes, arguments in a string": (
        "granite4",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        [PARIS],
    ),
    "hermes, arguments in a string before the name": (
        "qwen25",
        '<tool_call>{"arguments": "{\\"city\\": \\"Paris\\"}", "name": "get_weather"}</tool_call>',
        [PARIS],
    ),
    "hermes, a brace is missing": (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}\n</tool_call>',
        [PARIS],
    ),
    "hermes, the closing tag as text": (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "</tool_call>}\\"]"}}</tool_call>',
        [("get_weather", {"city": '</tool_call>}"]'})],
    ),
    "hermes, OpenAI's form": (
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}, "id": 1}'
        "</tool_call>",
        [PARIS],
    ),
    "hermes, in a fence": (
        "hermes",
        '<tool_call>\n```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```\n</tool_call>',
        [PARIS],
    ),
    "hermes, an unknown tool": ("hermes", '<tool_call>{"name": "x.y-z", "arguments": {}}</tool_call>', [("x.y-z", {})]),
    "qwen3_coder": (
        "qwen3_xml",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        [("get_weather", {"city": "Paris", "days": 3})],
    ),
    "qwen3_coder, no arguments": ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", [NOW]),
    "qwen3_coder, no outer tag": (
        "qwen3_coder",
        "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        [PARIS],
    ),
    "qwen3_coder, closing tags are missing": (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n<parameter=days>\n3\n</function>\n</tool_call>",
        [("get_weather", {"city": "Paris", "days": 3})],
    ),
    "qwen3_coder, Python's spellings": (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=exact>\nTrue\n</parameter><parameter=unit>\nNone\n</parameter>"
        "</function></tool_call>",
        [("get_weather", {"exact": True, "unit": None})],
    ),
    "qwen3_coder, JSON in its place": (
        "qwen3_coder",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        [PARIS],
    ),
    "qwen3_coder, JSON in place of parameters": (
        "qwen3_coder",
        '<tool_call>\n<function=get_weather>\n{"city": "Paris"}\n</function>\n</tool_call>',
        [PARIS],
    ),
    "qwen3_coder, closing tags are missing in a line": (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=city>Paris</parameter><parameter=days>3</function></tool_call>",
        [("get_weather", {"city": "Paris", "days": 3})],
    ),
    "qwen3_coder, all closing tags are missing": (
        "qwen3_coder",
        "<tool_call><function=get_weather>\n<parameter=days>\n3\n</tool_call>\n<tool_call>\n<function=now></function>"
        "</tool_call>",
        [("get_weather", {"days": 3}), NOW],
    ),
    "qwen3_coder, an angle bracket is missing": (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        [PARIS],
    ),
    "qwen3_coder, one newline is taken off": (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=city>\n\n a<b>\n\n</parameter></function></tool_call>",
        [("get_weather", {"city": "\n a<b>\n"})],
    ),
    "seed_oss": (
        "seed_oss",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>",
        [PARIS],
    ),
    "mistral v2": ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', [PARIS]),
    "mistral v3": (
        "mistral",
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abc123XYZ"}, '
        '{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "def456UVW"}]',
        [PARIS, ROME],
    ),
    "mistral v11": (
        "mistral",
        '[TOOL_CALLS]get_weather[CALL_ID]abc123XYZ[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]def456UVW[ARGS]{}',
        [PARIS, NOW],
    ),
    "mistral v13": (
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}',
        [PARIS, ROME],
    ),
    "llama3": ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    "llama3, arguments": ("llama3", '{"type": "function", "name": "now", "arguments": {}}', [NOW]),
    "llama3, OpenAI's form": (
        "llama3_json",
        '{"type": "function", "function": {"name": "get_weather", "parameters": {"city": "Paris"}}}',
        [PARIS],
    ),
    "llama3, several": (
        "llama3_json",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}',
        [PARIS, NOW],
    ),
    "pythonic": (
        "pythonic",
        '[get_weather(city="Paris", days=-3), now()]',
        [("get_weather", {"city": "Paris", "days": -3}), NOW],
    ),
    "pythonic, unpacked arguments": (
        "pythonic",
        "[get_weather(**{'city': 'Paris', \"days\": 3}, exact=True), now(**{})]",
        [("get_weather", {"city": "Paris", "days": 3, "exact": True}), NOW],
    ),
    "pythonic, literals": (
        "lfm2",
        "<|tool_call_start|>[get_weather(city='a]\\'b\\n\\x41\\u00e9', opt={'k': (1, None,), 2: [True]}, "
        'share=1_000.5, days=0x1F, from="")]<|tool_call_end|>',
        [
            (
                "get_weather",
                {"city": "a]'b\nAé", "opt": {"k": [1, None], "2": [True]}, "share": 1000.5, "days": 31, "from": ""},
            )
        ],
    ),
    "pythonic, long strings": (
        "pythonic",
        '[get_weather(city="""a "b"\nc""")]',
        [("get_weather", {"city": 'a "b"\nc'})],
    ),
    "pythonic, JSON in its place": (
        "llama4_pythonic",
        '[{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "now"}]',
        [PARIS, NOW],
    ),
    "deepseek_v3": (
        "deepseekv3",
        deepseek(
            "<|tool~calls~begin|><|tool~call~begin|>function<|tool~sep|>get_weather\n```json\n"
            '{"city": "Paris"}\n```<|tool~call~end|>\n<|tool~call~begin|>function<|tool~sep|>now\n```json\n{}\n```'
            "<|tool~call~end|><|tool~calls~end|>"
        ),
        [PARIS, NOW],
    ),
    "deepseek_v3, an empty block": (
        "deepseek_v3",
        deepseek(
            "<|tool~calls~begin|><|tool~call~begin|>function<|tool~sep|>now\n```json\n\n```<|tool~call~end|>"
            "<|tool~calls~end|>"
        ),
        [NOW],
    ),
    "deepseek_v31": (
        "deepseek_v31",
        deepseek(
            '<|tool~calls~begin|><|tool~call~begin|>get_weather<|tool~sep|>{"city": "Paris"}<|tool~call~end|>'
            "<|tool~call~begin|>now<|tool~sep|>{}<|tool~call~end|><|tool~calls~end|>"
        ),
        [PARIS, NOW],
    ),
    "glm45": (
        "glm45",
        "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now</tool_call>",
        [("get_weather", {"city": "Paris", "days": 3}), NOW],
    ),
    "glm47": (
        "glm47",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>3 <10</arg_value></tool_call>"
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>",
        [("get_weather", {"city": "3 <10"}), ROME],
    ),
    "glm, an opening tag is missing": (
        "glm",
        "<tool_call>get_weather<arg_key>city</arg_key>Paris</arg_value><arg_key><arg_key>days</arg_key><arg_value>3"
        "</arg_value></tool_call>",
        [("get_weather", {"city": "Paris", "days": 3})],
    ),
    "kimi_k2": (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|> web.find-all_2:1\n<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        [PARIS, ("web.find-all_2", {})],
    ),
    "minimax_m2": (
        "minimax-m2",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        "<parameter name=days>3</parameter>\n</invoke>\n<invoke name='now'>\n</invoke>\n</minimax:tool_call>",
        [("get_weather", {"city": "Paris", "days": 3}), NOW],
    ),
    "dots": (
        "dots",
        '<dots_function_call><invoke name="get_weather"><parameter name="city">Paris</parameter></invoke>'
        "</dots_function_call>",
        [PARIS],
    ),
    "gemma4": (
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Paris, {"x"}<|"|>,days:3,exact:true,opt:{unit:<|"|>C<|"|>},'
        'tags:[<|"|>a<|"|>,1]}<tool_call|><|tool_call>call:now{}<tool_call|>',
        [
            (
                "get_weather",
                {"city": 'Paris, {"x"}', "days": 3, "exact": True, "opt": {"unit": "C"}, "tags": ["a", 1]},
            ),
            NOW,
        ],
    ),
    "gemma4, quotes of JSON": (
        "gemma4",
        '<|tool_call>call:get_weather{"city":"Paris","days":3,"opt":{"unit":"C"}}<tool_call|>',
        [("get_weather", {"city": "Paris", "days": 3, "opt": {"unit": "C"}})],
    ),
    "gemma4, a value is missing": (
        "gemma4",
        "<|tool_call>call:get_weather{city:,days:3}<tool_call|>",
        [("get_weather", {"city": None, "days": 3})],
    ),
    "gemma4, commas in a bare value": (
        "gemma4",
        '<|tool_call>call:get_weather{city:Paris, France, Europe,days:3,"exact":true,tags:[a,1],}<tool_call|>',
        [("get_weather", {"city": "Paris, France, Europe", "days": 3, "exact": True, "tags": ["a", 1]})],
    ),
    "gemma4, a delimiter is missing": ("gemma4", '<|tool_call>call:get_weather{city:Paris<|"|>}<tool_call|>', [PARIS]),
    "granite 3.0": ("granite", '<|tool_call|> [{"name": "get_weather", "arguments": {"city": "Paris"}}]', [PARIS]),
    "granite 3.1": (
        "granite",
        '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
        [PARIS, NOW],
    ),
    "hunyuan": (
        "hunyuan_a13b",
        '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_calls>',
        [PARIS],
    ),
    "ernie": ("ernie45", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n', [NOW]),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    tools, text, calls = CALLS[name]
    parsed = parse_at_every_cut(chosen(tools), text)
    assert parsed.values() == calls
    assert (parsed.content, parsed.reasoning) == ("", "")
    silent = parse_at_every_cut(chosen(tools), text, calls=False)
    assert (silent.content, silent.calls) == ("", [])


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith(("llama3", "pythonic"))])
def test_text_before_and_after_calls_is_content(name):
    tools, text, calls = CALLS[name]
    parsed = parse_at_every_cut(chosen(tools), f"Let me look.\n{text}\nDone.")
    assert parsed.values() == calls
    assert parsed.content == "Let me look.\nDone."


def test_llama_calls_within_a_text():
    text = 'A brace { and {"name": "other"} here. {"name": "now", "parameters": {}} Then {"a": 1}, so.'
    parsed = parse_at_every_cut(chosen("llama3_json"), text)
    assert parsed.values() == [NOW]
    assert parsed.content == 'A brace { and {"name": "other"} here.\nThen {"a": 1}, so.'
    assert parse_at_every_cut(chosen("llama3_json"), text, tools=[]).content == text, "without tools all is text"
    code = parse_at_every_cut(chosen("llama3_json"), '<|python_tag|>brave_search.call(query="x")')
    assert (code.content, code.calls) == ('brave_search.call(query="x")', [])


def test_pythonic_calls_within_a_text():
    text = "A list [1, 2], a [link](x) and [get_weather]: [now()] Then."
    parsed = parse_at_every_cut(chosen("pythonic"), text)
    assert parsed.values() == [NOW]
    assert parsed.content == "A list [1, 2], a [link](x) and [get_weather]:\nThen."
    assert parse_at_every_cut(chosen("pythonic"), text, tools=[]).content == text


PROSE = {
    "hermes": ["Use <tool_call> tags.", "The <tool_call>{1}</tool_call> block", "a < b <tool", "<tool_cal"],
    "qwen3_coder": ["Use <tool_call> tags.", "Write <function=x> so", "x <parameter=a>"],
    "glm45": ["Use <tool_call> and </tool_call> tags.", "<tool_call>x </tool_call> is a call"],
    "minimax_m2": ['Use <invoke name="x"> here', "<minimax:tool_call> is a tag"],
    "pythonic": ["[", "[[get_weathers", "[unknown(a=1)]"],
    "llama3_json": ["{", '{"name": "unknown", "parameters": {}}', '{"a": {"name": 1}}', "{}"],
}


@pytest.mark.parametrize(("tools", "text"), [(tools, text) for tools, texts in PROSE.items() for text in texts])
def test_prose_that_mentions_tags_stays(tools, text):
    parsed = parse_at_every_cut(chosen(tools), text)
    assert (parsed.content, parsed.calls) == (text, [])


KEPT = {  # what stays text or goes on after a call: tool format, output, calls, content
    "pythonic, an unknown tool after a call": (
        "pythonic",
        "[now(), unknown(a=1)] tail",
        [NOW, ("unknown", {"a": 1})],
        "tail",
    ),
    "pythonic, a text after a call": ("pythonic", "[now(), then some] tail", [NOW], "then some] tail"),
    "pythonic, a call that is none": ("pythonic", "[now() for x in y] tail", [NOW], "for x in y] tail"),
    "hermes, a brace too many": (
        "hermes",
        '<tool_call>{"name": "now", "arguments": {}}}</tool_call>x',
        [NOW],
        "x",
    ),
    "llama3, a brace too many": ("llama3_json", '{"name": "now", "parameters": {}}} x', [NOW], "x"),
    "llama3, a list": (
        "llama3_json",
        '[{"name": "now", "parameters": {}},\n{"name": "get_weather", "parameters": {"city": "Rome"}}\n] x',
        [NOW, ROME],
        "x",
    ),
    "llama3, a list with others": (
        "llama3_json",
        '[{"name": "now"}, {"name": "x"}] y',
        [NOW],
        '{"name": "x"}] y',
    ),
    "llama3, a name within other JSON": (
        "llama3_json",
        '{"name": "x", "value": {"name": "now"}} [{"name": 1, "v": [{"name": "now"}]}, 2]',
        [],
        '{"name": "x", "value": {"name": "now"}} [{"name": 1, "v": [{"name": "now"}]}, 2]',
    ),
    "glm, an unknown tool without arguments": ("glm45", "<tool_call>x.y\n</tool_call> z", [("x.y", {})], "z"),
    "glm, a closing tag is missing": (
        "glm45",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</tool_call> tail",
        [PARIS],
        "tail",
    ),
    "glm, closing tags are missing": (
        "glm45",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris\n<arg_key>days</arg_key>\n<arg_value>3\n"
        "</tool_call>tail",
        [("get_weather", {"city": "Paris", "days": 3})],
        "tail",
    ),
    "qwen3_coder, the name is missing": ("qwen3_coder", "<tool_call><function=<x> y", [], "<tool_call><function=<x> y"),
    "mistral, a text after the token": ("mistral", "a [TOOL_CALLS] b c d", [], "a [TOOL_CALLS] b c d"),
    "kimi, a counter in place of a name": (
        "kimi_k2",
        "a<|tool_call_begin|>call00003<|tool_call_argument_begin|>{}<|tool_call_end|>",
        [],
        "a",
    ),
    "granite, the closing tag of Phi": (
        "granite",
        '<|tool_call|>[{"name": "now", "arguments": {}}]<|/tool_call|>x',
        [NOW],
        "x",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_call_stays_and_what_is_one_leaves_nothing(name):
    tools, text, calls, content = KEPT[name]
    parsed = parse_at_every_cut(chosen(tools), text)
    assert (parsed.values(), parsed.content) == (calls, content)


PYTHON = [  # the source of a value, the value
    ("10**30", "10**30"),
    ("1,000", "1,000"),
    ('"a" "b"', "ab"),
    ("'a' + \"b\" +\n r'\\n'", "ab\\n"),
    ('"a" + x', "a + x"),
    ('"a".format(1, "b)")', 'a.format(1, "b)")'),
    ('{"a", "b"}', ["a", "b"]),
    ("{1, 2}", [1, 2]),
    ("{1: 2, 'k': {3}}", {"1": 2, "k": [3]}),
    ("{(1, 2): 3}", {"": [1, 2], "3": None}),
    ("{}", {}),
    ("g(1)", "g(1)"),
    ("g(1, 'x)', [2])", "g(1, 'x)', [2])"),
    ("[g(1), -2]", ["g(1)", -2]),
    ("[1] + g(2, 3)", [1]),
    ('float("inf")', 'float("inf")'),
    ("L'Aquila", "L'Aquila"),
    ("lambda x: x", "lambda x: x"),
    ("'\\101\\0\\7b'", "A\0\x07b"),
    ("'\\N{DEGREE SIGN}C \\N{nothing}'", "°C \\N{nothing}"),
    ("r'\\d\\n'", "\\d\\n"),
    ("-0x1F", -31),
    ("", None),
]


@pytest.mark.parametrize(("source", "value"), PYTHON)
def test_python_values(source, value):
    parsed = parse_at_every_cut(chosen("pythonic"), f"[get_weather(any={source}, days=3)] x")
    assert parsed.values() == [("get_weather", {"any": value, "days": 3})]
    assert parsed.content == "x"


CUT = [
    *((tools, text) for tools, text, _ in CALLS.values()),
    *(("pythonic", f"[get_weather(any={source}, days=3)]") for source, _ in PYTHON),
]


@pytest.mark.parametrize(("tools", "text"), CUT)
def test_arguments_that_are_cut_off_are_a_prefix(tools, text):
    whole = parse(chosen(tools), [text])
    for end in range(len(text)):
        part = parse(chosen(tools), [text[:end]])
        assert len(part.calls) <= len(whole.calls)
        for begun, full in zip(part.calls, whole.calls, strict=False):
            assert full["arguments"].startswith(begun["arguments"])


@given(st.text("[](){}'\"\\,:=+* ab1", max_size=24))
def test_any_value_in_python_gives_valid_json_at_every_cut(source):
    whole = parse(chosen("lfm2"), [text := f"<|tool_call_start|>[f(a={source}"])
    assert parse(chosen("lfm2"), list(text)) == whole
    closed = parse(chosen("lfm2"), [text + ")]<|tool_call_end|>"])
    assert closed.calls[0]["arguments"].startswith(whole.calls[0]["arguments"])
    with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = ast.literal_eval(source)
        if not isinstance(value, str | tuple | bytes):
            assert json.loads(closed.calls[0]["arguments"])["a"] == json.loads(json.dumps(as_json(value)))


def as_json(value: object) -> object:
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, set | list | tuple):
        if isinstance(value, set) and len(value) > 1:
            raise TypeError
        return [as_json(item) for item in value]
    return value


RAW = {  # values of the parameter city that hold tags
    "a\n</tool_call>\nb": None,
    "a\n</function>\nb": None,
    "a</parameter>b": None,
    "a\n</parameter>\nb\n</function>\nc</tool_call>": None,
    "a\n<parameter=b>\n1": None,
    "<parameter=city>": None,
    "\n</parameter>": None,
    "a\n<parameter=days>\n3": {"city": "a", "days": 3},  # cannot be told apart from a closing tag that is missing
}


@pytest.mark.parametrize("value", RAW)
def test_closing_tags_within_a_value(value):
    output = f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{value}\n</parameter>\n</function>\n</tool_call>x"
    parsed = parse_at_every_cut(chosen("qwen3_coder"), output)
    assert parsed.values() == [("get_weather", RAW[value] or {"city": value})]
    assert parsed.content == "x"


def test_blanks_after_a_tag_are_looked_at_only_so_far():
    begin, rest = "<tool_call><function=get_weather><parameter=city>a</parameter>", "</function></tool_call>"
    few, many = " " * MAX_BLANKS, " " * (MAX_BLANKS + 1)
    assert parse_at_every_cut(chosen("qwen3_coder"), begin + few + rest).values() == [("get_weather", {"city": "a"})]
    parsed = parse(chosen("qwen3_coder"), list(f"{begin}{many}</parameter>{rest}"))
    assert parsed.values() == [("get_weather", {"city": "a</parameter>" + many})]


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        ("mistral", "[TOOL_CALLS]now[ARGS]"),
        ("hermes", '<tool_call>{"name": "now", "arguments": '),
        ("gpt-oss", "<|channel|>commentary to=functions.now<|message|>"),
    ],
)
def test_arguments_that_have_not_begun_are_empty_if_the_model_ends_the_output(tools, text):
    assert parse_at_every_cut(chosen(tools), text, is_complete=True).values() == [NOW]
    assert [call["arguments"] for call in parse_at_every_cut(chosen(tools), text).calls] == [""], "cut off"
    begun = text + '{"a'
    assert [call["arguments"] for call in parse_at_every_cut(chosen(tools), begun, is_complete=True).calls] == ['{"a']


JSON_MISTAKES = [
    ('{"city": "a\nb\tc\x00"}', {"city": "a\nb\tc\0"}),
    ('{"city": "it\\\'s \\d \\u12 \\u0041"}', {"city": "it's \\d \\u12 A"}),
    ('{"exact": True, "unit": None, "tags": [False, "True"]}', {"exact": True, "unit": None, "tags": [False, "True"]}),
    ('"{\\"city\\": \\"a\\nb\\"} "', {"city": "a\nb"}),
    ("None", {}),
]


@pytest.mark.parametrize(("arguments", "values"), JSON_MISTAKES)
@pytest.mark.parametrize("tools", ["hermes", "mistral"])
def test_mistakes_in_json_are_mended_as_it_streams(tools, arguments, values):
    text = {
        "hermes": f'<tool_call>{{"name": "get_weather", "arguments": {arguments}}}</tool_call>',
        "mistral": f"[TOOL_CALLS]get_weather[ARGS]{arguments} ",
    }[tools]
    parsed = parse_at_every_cut(chosen(tools), text)
    assert parsed.values() == [("get_weather", values)]


def test_ids():
    kimi = "<|tool_calls_section_begin|>" + "".join(
        f"<|tool_call_begin|>{name}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        for name in ("functions.now:7", "now:0", "functions.a.b:9")
    )
    parsed = parse_at_every_cut(chosen("kimi_k2"), kimi, num_earlier_calls=3)
    assert [call["id"] for call in parsed.calls] == ["functions.now:3", "functions.now:4", "functions.a.b:5"]
    one_tool = parse_at_every_cut(
        chosen("kimi_k2"), "<|tool_call_begin|>0<|tool_call_argument_begin|>{}<|tool_call_end|>", tools=[CITY]
    )
    assert one_tool.calls[0]["name"] == "get_weather"
    mistral = parse_at_every_cut(chosen("mistral"), "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}")
    ids = [call["id"] for call in mistral.calls]
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids) and ids[0] != ids[1]
    hermes = parse_at_every_cut(chosen("hermes"), '<tool_call>{"name": "now"}</tool_call>' * 2)
    assert [call["id"] for call in hermes.calls] == [f"call_{0:024x}", f"call_{1:024x}"]


VALUES = [
    ({"type": "string"}, "3", "3"),
    ({"type": "string"}, "", ""),
    ({"type": "string"}, "null", "null"),
    ({"type": "string"}, '"quoted"', '"quoted"'),
    ({"type": "integer"}, "123456789012345678901234567890", 123456789012345678901234567890),
    ({"type": "integer"}, " -4 ", -4),
    ({"type": "integer"}, "1e3", 1000.0),
    ({"type": "integer"}, "1.5", "1.5"),
    ({"type": "integer"}, "three", "three"),
    ({"type": "number"}, "1e-3", 0.001),
    ({"type": "number"}, "7", 7),
    ({"type": "number"}, "NaN", "NaN"),
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "yes", "yes"),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": ["string", "null"]}, "None", None),
    ({"type": ["string", "null"]}, "nullable", "nullable"),
    ({"type": ["string", "null"]}, "nu", "nu"),
    ({"type": "string", "nullable": True}, "null", None),
    ({"type": ["integer", "null"]}, "5", 5),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
    ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '["a"]', ["a"]),
    ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[a", "[a"),
    ({"$ref": "#/$defs/Size"}, "5", "5"),
    ({"enum": ["a", "5"]}, "5", "5"),
    ({"const": 5}, "5", 5),
    ({"properties": {}}, '{"a": {"b": [1]}}', {"a": {"b": [1]}}),
    ({"items": {}}, "[1, 2]", [1, 2]),
    ({"type": "object"}, "{'a': 1}", {"a": 1}),
    ({"type": "object"}, "{'a'}", "{'a'}"),
    ({"type": "array"}, "['a', 'b']", ["a", "b"]),
    ({"type": "array"}, "('a', None, {1: [True]})", ["a", None, {"1": [True]}]),
    ({"type": "array"}, "[a, f(1)]", "[a, f(1)]"),
    ({"type": "array"}, "['a'] + ['b']", "['a'] + ['b']"),
    ({"type": "array"}, "['a", "['a"),
    ({"type": ["string", "array"]}, "['a']", ["a"]),
    ({"type": "boolean"}, "TRUE", True),
    ({"type": "number"}, ".5", 0.5),
    ({"type": "number"}, "-.5e1", -5.0),
    ({"type": "number"}, "5.", 5),
    ({"type": "number"}, ".", "."),
    ({"type": "integer"}, "+1", 1),
    ({"type": "integer"}, "+", "+"),
    ({"type": "integer"}, "007", "007"),
    ({"type": "float"}, "1.5", 1.5),
    ({"type": "int"}, "3", 3),
    ({"type": "str"}, "3", "3"),
    ({"type": "Dict"}, '{"a": 1}', {"a": 1}),
    ({"type": "list"}, "[1]", [1]),
    ({"type": "tuple"}, "(1, 2)", [1, 2]),
    ({"type": "bool"}, "false", False),
    ({"type": "any"}, "3", 3),
    ({"type": "any"}, "three", "three"),
    ({"type": ["str", "Color"]}, "3", 3),
    ({"type": []}, "3", 3),
    ({"type": "array"}, "[" * 5000, "[" * 5000),
    ({}, "5", 5),
    ({}, '"quoted"', "quoted"),
    ({}, "text", "text"),
    (None, "5", 5),
    (None, 'a 🙂 \\ " é\t', 'a 🙂 \\ " é\t'),
]


@pytest.mark.parametrize(("schema", "text", "value"), VALUES)
def test_raw_values_follow_the_schema(schema, text, value):
    parameters = {"properties": {} if schema is None else {"v": schema}, "$defs": {"Size": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    for name, output in (
        ("qwen3_coder", f"<tool_call><function=f><parameter=v>\n{text}\n</parameter></function></tool_call>"),
        ("glm45", f"<tool_call>f<arg_key>v</arg_key><arg_value>{text}</arg_value></tool_call>"),
        ("minimax_m2", f'<minimax:tool_call><invoke name="f"><parameter name="v">{text}</parameter></invoke>'),
    ):
        if len(text) < 100:
            parsed = parse_at_every_cut(chosen(name), output + "\n", tools=tools)
        else:
            parsed = parse(chosen(name), [output], tools=tools)
        ((called, arguments),) = parsed.values()
        assert (called, json.dumps(arguments)) == ("f", json.dumps({"v": value}))


def test_a_tool_without_a_schema():
    tools = [{"type": "function", "function": {"name": "f"}}, {"name": "g", "parameters": {"properties": []}}, *TOOLS]
    output = "<tool_call><function={}><parameter=v>\n5\n</parameter></function></tool_call>"
    for name in ("f", "g", "unknown"):
        assert parse_at_every_cut(chosen("qwen3_coder"), output.format(name), tools=tools).values() == [
            (name, {"v": 5})
        ]
