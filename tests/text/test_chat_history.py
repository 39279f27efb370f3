from __future__ import annotations

import json

import pytest
from chat_wire import parse
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.text.chat_history import count_calls, template_messages
from moe_runtime.text.chat_template import ChatTemplate
from moe_runtime.text.formats.registry import choose_format

PLAIN = "{{ m.tool_calls }}"
KIMI = "<|tool_calls_section_begin|> tool_calls"
MISTRAL = "[TOOL_CALLS] tool_calls"


def call(name: str, arguments: object, call_id: str | None = "call_1") -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str, call_id: str | None = "call_1") -> dict:
    return {"role": "tool", "content": text, "tool_call_id": call_id}


def assistant(*calls: dict, content: object = None, **fields: object) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **fields}


def test_arguments_become_objects_in_the_order_of_their_keys():
    for given_arguments in ('{"b": 1, "a": "é"}', {"b": 1, "a": "é"}):
        (message,) = template_messages([assistant(call("f", given_arguments))], PLAIN)
        arguments = message["tool_calls"][0]["function"]["arguments"]
        assert arguments == {"b": 1, "a": "é"} and list(arguments) == ["b", "a"]
    for nothing in ("", " ", None, "{}"):
        (message,) = template_messages([assistant(call("f", nothing))], PLAIN)
        assert message["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": NaN}',
        '{"a": [-Infinity]}',
        '{"a": 1e999}',
        {"a": float("nan")},
        {"a": {1}},
        '{"city": "Pa',
        "[1]",
        "3",
        5,
        "null",
        "[" * 100_000,
    ],
)
def test_arguments_that_are_no_object_are_refused_by_name(arguments):
    where = r"^messages\.1\.tool_calls\.0\.function\.arguments: [^\n]{1,210} is not allowed; it must be the text of"
    with pytest.raises(ValueError, match=where):
        template_messages([{"role": "user", "content": "a"}, assistant(call("f", arguments))], PLAIN)


def test_arguments_stay_text_where_the_template_adds_them_to_a_text():
    for template in (
        "tool_calls {{ '\\n' + tool['function']['arguments'] + '\\n' }}",
        "tool_calls {{ 'x' + tool.function.arguments }}",
    ):
        text = '{"b":1}'
        messages = template_messages([assistant(call("f", text)), assistant(call("f", {"a": "é"}))], template)
        assert [m["tool_calls"][0]["function"]["arguments"] for m in messages] == [text, '{"a": "é"}']
    for template in ("tool_calls {{ 'x' + tool['function']['arguments'] | tojson }}", "tool_calls {{ x.arguments }}"):
        (message,) = template_messages([assistant(call("f", '{"b":1}'))], template)
        assert message["tool_calls"][0]["function"]["arguments"] == {"b": 1}


def test_contents():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template_messages([{"role": "user", "content": parts}], PLAIN)[0]["content"] == "a\nb"
    assert template_messages([assistant(call("f", "{}"))], PLAIN)[0]["content"] == ""
    for template in ("{% if message['content'] is none %} tool_calls", "tool_calls {% if m.content is not none %}"):
        assert template_messages([assistant(call("f", "{}"))], template)[0]["content"] is None
    mistral = "tool_calls {% if m['content'] is none or m['content'] == '' %}{% elif m['content'] | length %}"
    assert template_messages([assistant(call("f", "{}"))], mistral)[0]["content"] == "", "it takes no None's length"
    assert template_messages([{"role": "assistant", "content": None}], PLAIN) == [{"role": "assistant", "content": ""}]


def test_roles():
    developer = [{"role": "developer", "content": "a"}]
    assert template_messages(developer, PLAIN)[0]["role"] == "system"
    assert template_messages(developer, "message.role == 'developer'")[0]["role"] == "developer"


def test_reasoning_is_given_under_each_name():
    for name in ("reasoning_content", "reasoning", "thinking"):
        (message,) = template_messages([{"role": "assistant", "content": "a", name: "why"}], PLAIN)
        assert (message["reasoning_content"], message["reasoning"], message["thinking"]) == ("why", "why", "why")
    gpt_oss = "tool_calls {% if message.content and message.thinking %}"
    (message,) = template_messages([assistant(call("f", "{}"), content="Look.", reasoning="why")], gpt_oss)
    assert (message["thinking"], message["content"]) == ("why\nLook.", "")


def test_results_come_in_the_order_of_their_calls_with_their_names():
    history = [
        assistant(call("f", "{}", "a"), call("g", "{}", "b")),
        result("2", "b"),
        result("?", "x"),
        result("1", "a"),
    ]
    messages = template_messages(history, PLAIN)
    assert [(m["content"], m.get("name")) for m in messages[1:]] == [("1", "f"), ("2", "g"), ("?", None)]


def test_a_result_has_the_name_of_the_latest_call_with_its_id():
    history = [assistant(call("f", "{}", "call_0")), result("1", "call_0")]
    history += [assistant(call("g", "{}", "call_0")), result("2", "call_0"), result("3", "call_0")]
    names = [message.get("name") for message in template_messages(history, PLAIN) if message["role"] == "tool"]
    assert names == ["f", "g", "g"]


@pytest.mark.parametrize("no_id", ["", None])
def test_calls_without_an_id_and_their_results_get_one(no_id):
    history = [
        assistant(call("f", "{}", no_id), call("g", "{}", no_id)),
        {"role": "tool", "name": "g", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        assistant(call("f", "{}", no_id)),
        {"role": "tool", "name": "other", "content": "4"},
    ]
    messages = template_messages(history, PLAIN)
    ids = [entry["id"] for message in messages for entry in message.get("tool_calls", ())]
    assert len(set(ids)) == 3 and all(ids)
    results = {message["content"]: message.get("tool_call_id") for message in messages if message["role"] == "tool"}
    assert results == {"1": ids[1], "2": ids[0], "3": None, "4": ids[2]}
    short = template_messages(history, MISTRAL)
    assert [len(entry["id"]) for entry in short[0]["tool_calls"]] == [9, 9]
    assert {entry["id"] for entry in short[0]["tool_calls"]} == {m["tool_call_id"] for m in short[1:3]}


def test_kimi_numbers_the_calls_of_the_conversation():
    history = [
        assistant(call("f", "{}", "call_x"), call("g", "{}", "call_y")),
        result("1", "call_x"),
        result("2", "call_y"),
        assistant(call("f", "{}", "call_z")),
        result("3", "call_z"),
        result("4", "unknown"),
    ]
    messages = template_messages(history, KIMI)
    assert [c["id"] for m in messages for c in m.get("tool_calls", ())] == [
        "functions.f:0",
        "functions.g:1",
        "functions.f:2",
    ]
    results = [m["tool_call_id"] for m in messages if m["role"] == "tool"]
    assert results == ["functions.f:0", "functions.g:1", "functions.f:2", "unknown"]
    assert count_calls(history) == 3


@given(ids=st.lists(st.text(max_size=30), min_size=1, max_size=4, unique=True))
def test_mistral_has_ids_of_nine_characters(ids):
    history = [assistant(*(call("f", "{}", call_id) for call_id in ids)), *(result("r", call_id) for call_id in ids)]
    messages = template_messages(history, MISTRAL)
    made = [entry["id"] for entry in messages[0]["tool_calls"]]
    assert made == [m["tool_call_id"] for m in messages[1:]] and len(set(made)) == len(ids)
    assert all(len(one) == 9 and one.isascii() and one.isalnum() for one in made)
    own = template_messages([assistant(call("f", "{}", "abc123XYZ"))], MISTRAL)
    assert own[0]["tool_calls"][0]["id"] == "abc123XYZ"


@pytest.mark.parametrize(
    ("template", "tools", "text"),
    [
        ("granite <|tool_call|>", "granite", '<|tool_call|>[{"name": "f", "arguments": {"a": "é", "b": true}}]'),
        ("granite", "granite", '<tool_call>[{"name": "f", "arguments": {"a": "é", "b": true}}]'),
        ("<|tool_list_start|>", "lfm2", "<|tool_call_start|>[f(a='é', b=True)]<|tool_call_end|>"),
    ],
)
def test_calls_that_a_template_leaves_out_are_in_the_content(template, tools, text):
    (message,) = template_messages([assistant(call("f", {"a": "é", "b": True}), content="Look.")], template)
    assert message["content"] == "Look." + text and "tool_calls" not in message
    parsed = parse(choose_format("", None, [], tools, "none"), [message["content"]])
    assert parsed.values() == [("f", {"a": "é", "b": True})]


WRONG = [
    ([], r"^messages: \[\] is not allowed"),
    ([{"role": "user", "content": None}], r"^messages\.0: .* is not allowed"),
    ([{"role": "assistant"}], r"^messages\.0: .* is not allowed"),
    ([{"role": "user", "content": 5}], r"^messages\.0\.content: 5 is not allowed; it must be a text or a list"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], r"^messages\.0\.content\.0: .* is not allowed"),
    ([assistant("f")], r"^messages\.0\.tool_calls\.0: 'f' is not allowed"),
    ([{"role": "assistant", "tool_calls": 5}], r"^messages\.0\.tool_calls: 5 is not allowed"),
    ([{"role": "user", "content": ["x" * 10_000]}], r"^[^\n]{1,300}$"),
]


@pytest.mark.parametrize(("messages", "error"), WRONG)
def test_messages_of_another_form_are_refused_in_one_short_line(messages, error):
    with pytest.raises(ValueError, match=error):
        template_messages(messages, PLAIN)


def test_the_client_s_messages_stay_as_they_are():
    history = [assistant(call("f", '{"a": 1}')), result("1")]
    before = json.dumps(history)
    template_messages(history, KIMI)
    assert json.dumps(history) == before


HERMES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' + m.content }}{% for c in m.tool_calls %}"
    "{% if m.content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


def test_the_history_of_parsed_calls_is_what_the_model_wrote():
    """So the next turn's prompt begins with the tokens that are in the cache."""
    wrote = "Look.\n" + "\n".join(
        f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>'
        for arguments in ('{"city": "Paris", "days": 3}', '{"days": 4, "city": "Zürich \\"x\\""}')
    )
    parsed = parse(choose_format("", HERMES, []), list(wrote))
    calls = [call(entry["name"], entry["arguments"], entry["id"]) for entry in parsed.calls]
    history = template_messages([assistant(*calls, content=parsed.content)], HERMES)
    assert ChatTemplate(HERMES, {}).render(history) == f"<|im_start|>assistant\n{wrote}<|im_end|>\n"
