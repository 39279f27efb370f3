from __future__ import annotations

import json

import pytest
from fakes import save_byte_tokenizer
from transformers import PreTrainedTokenizerFast

from moe_runtime.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi <b> & 'you' é🙂"}, {"role": "assistant", "content": "Yes. "}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [None, True]}}}]
TURNS = "{% for m in messages %}{% if m.role == 'user' %}U:{% endif %}{{ m.content }}|\n{% endfor %}"
BEARABLE = {
    "turns": TURNS + "{% if add_generation_prompt %}A:{% endif %}",
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n  U\n  {%- endif %}\n{% endfor %}\n x",
    "append": "{% set seen = namespace(n=[]) %}{% for m in messages %}"
    "{% set seen.n = seen.n + [m.role] %}{% endfor %}{{ seen.n | join(',') }}",
    "json": "{{ tools | tojson }}{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(ensure_ascii=True) }}"
    "{{ (tools or [{}])[0].function is defined }}"
    "{{ tools | tojson(sort_keys=true) }}{{ tools | tojson(separators=(',', ':')) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% set x = 1 %}{% generation %}{% set x = 2 %}a{{ x }}{% endgeneration %}{{ x }}",
    "tokens": "{{ eos_token }}{{ enable_thinking }}{{ bos_token is defined }}{{ tools is none }}",
    "dates": "{{ strftime_now('%Y') }}",
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", BEARABLE)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_render_as_in_transformers(theirs, name, tools):
    template = ChatTemplate(BEARABLE[name], theirs.special_tokens_map)
    for add in (False, True):
        ours = template.render(MESSAGES, tools, add_generation_prompt=add, template_kwargs={"enable_thinking": False})
        assert ours == theirs.apply_chat_template(
            MESSAGES,
            tools=tools,
            chat_template=BEARABLE[name],
            add_generation_prompt=add,
            tokenize=False,
            enable_thinking=False,
        )


TRIMMED = "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}"


@pytest.mark.parametrize("source", [TURNS, TRIMMED])
@pytest.mark.parametrize("content", ["Yes", "Yes. ", "  Yes  \n", ""])
def test_the_final_message_is_continued_as_in_transformers(theirs, source, content):
    messages = [MESSAGES[0], {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    ours = ChatTemplate(source, {}).render(messages, **options)
    assert ours == theirs.apply_chat_template(messages, chat_template=source, tokenize=False, **options)


def test_a_template_may_append_to_lists_and_changes_no_message():
    source = (
        "{% set names = [] %}{% for m in messages %}{% set _ = names.append(m.get('role')) %}{% endfor %}{{ names }}"
    )
    source += "{{ names.pop(0) }}"
    source += "{% set _ = messages.append(1) %}{% set _ = messages[0].update({'role': 'x'}) %}"
    messages = [dict(message) for message in MESSAGES]
    assert ChatTemplate(source, {}).render(messages) == "['user', 'assistant']user"
    assert messages == MESSAGES


FAILURES = {
    "{{ messages[0]['content'] + 1 }}": "can only concatenate str",
    "{{ 1 / 0 }}": "division by zero",
    "{{ nothing.at.all }}": "'nothing' is undefined",
    "{{ raise_exception('two\nlines') }}": "two lines$",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{% if %}": "Expected an expression",
    "{{ nothing | tojson }}": "JSON",
    "{{ range(10**9) | list }}": "Range too big",
    "{{ strftime_now(5) }}": "must be str",
}


@pytest.mark.parametrize("source", FAILURES)
def test_whatever_a_template_raises_is_one_line(source):
    with pytest.raises(
        ValueError, match=rf"(?s)^messages: the chat template fails: [^\n]*{FAILURES[source]}"
    ) as raised:
        ChatTemplate(source, {}).render(MESSAGES)
    assert "\n" not in str(raised.value)


def test_the_template_for_tools_is_used_with_tools():
    template = ChatTemplate({"default": "d", "tool_use": "t"}, {})
    assert (template.render(MESSAGES), template.render(MESSAGES, TOOLS), template.render(MESSAGES, [])) == (
        "d",
        "t",
        "d",
    )
    assert template.source(has_tools=True) == "t"
    with pytest.raises(ValueError, match=r"^chat_template: rag is not allowed; one must be named 'default'$"):
        ChatTemplate({"rag": "x"}, {}).render(MESSAGES)


def test_variables_of_the_request_come_before_those_of_the_tokenizer():
    template = ChatTemplate("{{ a }}{{ b }}{{ documents }}", {"a": 1, "b": 2})
    assert template.render(MESSAGES, template_kwargs={"b": 3, "documents": [4]}) == "13[4]"
    with pytest.raises(ValueError, match=r"^chat_template_kwargs: 'tools' is not allowed"):
        template.render(MESSAGES, template_kwargs={"tools": []})


def test_what_cannot_be_continued_is_refused():
    template = ChatTemplate(TURNS, {})
    with pytest.raises(ValueError, match=r"^continue_final_message: true is not allowed with add_generation_prompt"):
        template.render(MESSAGES, continue_final_message=True)
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(ValueError, match="content is None"):
        template.render([{"role": "assistant", "content": None}], **options)
    calls = [{"function": {"name": "f", "arguments": {}}}]
    with pytest.raises(ValueError, match=r"^continue_final_message: true is not allowed if the last message has tool"):
        template.render([{"role": "assistant", "content": "", "tool_calls": calls}], **options)
    with pytest.raises(ValueError, match="leaves the last message's content out"):
        ChatTemplate("x", {}).render(MESSAGES, **options)


def test_json_keeps_every_character():
    assert json.loads(ChatTemplate("{{ messages | tojson }}", {}).render(MESSAGES)) == MESSAGES
    assert "<b> & 'you' é🙂" in ChatTemplate("{{ messages | tojson }}", {}).render(MESSAGES)
