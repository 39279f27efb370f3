from __future__ import annotations

import re

import pytest
from places import ROOT

from moe_runtime.text.formats.registry import (
    THOUGHT_ALIASES,
    THOUGHT_FORMATS,
    TOOL_ALIASES,
    TOOL_FORMATS,
    choose_format,
)

DEEPSEEK = "<｜tool▁calls▁begin｜>"
AUTO = [  # family, text in the template, tool format, reasoning format
    ("qwen3_moe", "<tool_call> <think></think>", "hermes", "qwen3"),
    ("qwen3_moe", "<tool_call>\n<function=", "qwen3_coder", None),
    ("qwen3_5_moe", "<tool_call>\n<function= </think>", "qwen3_coder", "qwen3"),
    ("glm4_moe", "<tool_call> <arg_key> </think>", "glm45", "glm45"),
    ("mixtral", "[TOOL_CALLS]", "mistral", None),
    ("mistral3", "[TOOL_CALLS] [THINK]", "mistral", "mistral"),
    ("deepseek_v3", DEEPSEEK + "```json <think></think>", "deepseek_v3", "deepseek_r1"),
    ("deepseek_v3", DEEPSEEK + "<think></think>", "deepseek_v31", "deepseek_v3"),
    ("deepseek_v3", "</think>", None, "deepseek_r1"),
    ("kimi_k2", "<|tool_calls_section_begin|>", "kimi_k2", None),
    ("kimi_k2", "<|tool_calls_section_begin|> </think>", "kimi_k2", "kimi_k2"),
    ("minimax_m2", "<minimax:tool_call> </think>", "minimax_m2", "minimax_m2"),
    ("gpt_oss", None, "openai", "openai_gptoss"),
    ("other", "<|start|>assistant<|channel|>analysis", "openai", "openai_gptoss"),
    ("gemma4", "<|tool_call> <|channel>thought", "gemma4", "gemma4"),
    ("granitemoe", "<tool_call>", "granite", None),
    ("granitemoehybrid", "Here is my thought process:", "granite", "granite"),
    ("llama", "<|python_tag|>", "llama3_json", None),
    ("llama4", "x", "pythonic", None),
    ("lfm2_moe", "List of tools: <|tool_list_start|>", "lfm2", None),
    ("hunyuan_v1_moe", "<tool_calls> </think>", "hunyuan_a13b", "hunyuan_a13b"),
    ("ernie4_5_moe", "<tool_call> </think>", "ernie45", "ernie45"),
    ("seed_oss", "<seed:tool_call> <seed:think>", "seed_oss", "seed_oss"),
    ("dots1", "<dots_function_call>", "dots", None),
    ("olmoe", "{{ messages }}", None, None),
    ("mixtral", None, None, None),
]


@pytest.mark.parametrize(("family", "template", "tools", "reasoning"), AUTO)
def test_auto(family, template, tools, reasoning):
    chosen = choose_format(family, template, [])
    assert (chosen.tool_format, chosen.reasoning_format) == (tools, reasoning)


def test_only_tokens_of_the_vocabulary_are_shown_and_stop():
    vocabulary = {"<tool_call>", "</tool_call>", "<think>", "<|user|>", "<|x|>"}
    chosen = choose_format("glm4_moe", "<arg_key> </think>", vocabulary)
    assert chosen.shown_tokens == {"<tool_call>", "</tool_call>", "<think>"}
    assert chosen.stop_tokens == ("<|user|>",)
    harmony = choose_format("gpt_oss", None, {"<|call|>", "<|return|>", "<|channel|>", "<|x|>"})
    assert harmony.shown_tokens == {"<|call|>", "<|return|>", "<|channel|>"}
    assert harmony.stop_tokens == ("<|call|>", "<|return|>")
    assert choose_format("x", None, vocabulary).shown_tokens == frozenset()


@pytest.mark.parametrize("name", [*TOOL_FORMATS, *TOOL_ALIASES])
def test_every_tool_parser_can_be_named(name):
    assert choose_format("x", None, [], name, "auto").tool_format == TOOL_ALIASES.get(name, name)


@pytest.mark.parametrize("name", [*THOUGHT_FORMATS, *THOUGHT_ALIASES])
def test_every_reasoning_parser_can_be_named(name):
    assert choose_format("x", None, [], "none", name).reasoning_format == THOUGHT_ALIASES.get(name, name)


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(
        ValueError, match=r"^tool_call_parser: 'x' is not allowed; it must be one of auto, [^\n]*, hermes, "
    ):
        choose_format("", None, [], "x")
    with pytest.raises(ValueError, match=r"^reasoning_parser: 'x' is not allowed; it must be one of auto, [^\n]*qwen3"):
        choose_format("", None, [], "none", "x")


@pytest.mark.parametrize(("tools", "reasoning"), [("pythonic", "mistral"), ("openai", "qwen3"), ("hermes", "gpt-oss")])
def test_formats_that_do_not_go_together_are_refused(tools, reasoning):
    with pytest.raises(ValueError, match=r"^reasoning_parser: [^\n]* is not allowed with the tool parser"):
        choose_format("", None, [], tools, reasoning)


def test_the_page_lists_every_name():
    tools, reasoning = (ROOT / "docs" / "tools.md").read_text().split("| reasoning format |")
    for text, names in ((tools, {*TOOL_FORMATS, *TOOL_ALIASES}), (reasoning, {*THOUGHT_FORMATS, *THOUGHT_ALIASES})):
        rows = re.findall(r"(?m)^\| (`.*?) \| (.*?) \|", text)
        assert {name for row in rows for cell in row for name in re.findall(r"`([\w-]+)`", cell)} == names
