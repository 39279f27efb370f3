"""The formats by name, and the choice of a model's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.text.formats.call_forms import call_form
from moe_runtime.text.formats.call_grammar import call_grammar
from moe_runtime.text.formats.gemma4 import GEMMA4
from moe_runtime.text.formats.glm import GLM
from moe_runtime.text.formats.grammar import after_thought, harmony_answer
from moe_runtime.text.formats.harmony import HARMONY_STOPS, HARMONY_TAGS, harmony_parser
from moe_runtime.text.formats.ids import numbered_id, short_id
from moe_runtime.text.formats.json_calls import GRANITE, HERMES, HUNYUAN, LLAMA3
from moe_runtime.text.formats.mistral import MISTRAL
from moe_runtime.text.formats.output import Output
from moe_runtime.text.formats.parser import OutputParser, tagged_parser, text_tags
from moe_runtime.text.formats.pythonic import LFM2, PYTHONIC
from moe_runtime.text.formats.scanner import overlap
from moe_runtime.text.formats.sections import DEEPSEEK, KIMI_K2
from moe_runtime.text.formats.thoughts import (
    ERNIE_THINK,
    GEMMA_THOUGHT,
    GRANITE_THINK,
    HUNYUAN_THINK,
    MISTRAL_THINK,
    SEED_THINK,
    THINK,
    THINK_IN_CONTENT,
    ThoughtFormat,
)
from moe_runtime.text.formats.tool_format import ToolFormat
from moe_runtime.text.formats.xml_calls import DOTS, MINIMAX_M2, QWEN3_CODER, SEED_OSS

HARMONY_TOOLS, HARMONY_THOUGHTS = "openai", "openai_gptoss"

# Harmony divides the whole output, so it has a parser of its own (None here).
TOOL_FORMATS: Mapping[str, ToolFormat | None] = {
    "hermes": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "seed_oss": SEED_OSS,
    "mistral": MISTRAL,
    "llama3_json": LLAMA3,
    "pythonic": PYTHONIC,
    "lfm2": LFM2,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v31": DEEPSEEK,
    "glm45": GLM,
    "glm47": GLM,
    "kimi_k2": KIMI_K2,
    "minimax_m2": MINIMAX_M2,
    "openai": None,
    "gemma4": GEMMA4,
    "granite": GRANITE,
    "hunyuan_a13b": HUNYUAN,
    "ernie45": HERMES,
    "dots": DOTS,
}
TOOL_ALIASES: Mapping[str, str] = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3_xml": "qwen3_coder",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "glm": "glm45",
    "minimax-m2": "minimax_m2",
    "gpt-oss": "openai",
    "granite4": "granite",
}
THOUGHT_FORMATS: Mapping[str, ThoughtFormat | None] = {
    "deepseek_r1": THINK,
    "deepseek_v3": THINK,
    "qwen3": THINK,
    "glm45": THINK,
    "glm47": THINK,
    "kimi_k2": THINK,
    "minimax_m2": THINK,
    "minimax_m2_append_think": THINK_IN_CONTENT,
    "nemotron_v3": THINK,
    "seed_oss": SEED_THINK,
    "mistral": MISTRAL_THINK,
    "granite": GRANITE_THINK,
    "hunyuan_a13b": HUNYUAN_THINK,
    "ernie45": ERNIE_THINK,
    "openai_gptoss": None,
    "gemma4": GEMMA_THOUGHT,
}
THOUGHT_ALIASES: Mapping[str, str] = {
    "deepseek-r1": "deepseek_r1",
    "deepseek-v3": "deepseek_v3",
    "deepseek_v31": "deepseek_v3",
    "qwen3-thinking": "qwen3",
    "kimi": "kimi_k2",
    "minimax": "minimax_m2",
    "minimax-append-think": "minimax_m2_append_think",
    "nemotron_3": "nemotron_v3",
    "gpt-oss": "openai_gptoss",
}

# What models write around thoughts and calls.
ANSWER_TAGS: frozenset[str] = frozenset(
    tag
    for tags in (
        *(tools.all_tags for tools in TOOL_FORMATS.values() if tools),
        *(thoughts.tags for thoughts in THOUGHT_FORMATS.values() if thoughts),
    )
    for tag in tags
)

# A text in the chat template that shows the format; the first that is found counts.
TOOL_CLUES: Sequence[tuple[str, str]] = (
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<seed:tool_call>", "seed_oss"),
    ("<dots_function_call>", "dots"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|tool_list_start|>", "lfm2"),
    ("<|tool_call>", "gemma4"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_coder"),
    ("<tool_calls>", "hunyuan_a13b"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_start|>", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ("<|tool_call|>", "granite"),
    ("<|start|>assistant<|channel|>", "openai"),
)
FAMILY_TOOLS: Mapping[str, str] = {
    "gpt_oss": "openai",
    "granite": "granite",
    "granitemoe": "granite",
    "granitemoeshared": "granite",
    "granitemoehybrid": "granite",
    "ernie4_5": "ernie45",
    "ernie4_5_moe": "ernie45",
    "hunyuan_v1_moe": "hunyuan_a13b",
    "llama4": "pythonic",
    "llama4_text": "pythonic",
}
THOUGHT_CLUES: Sequence[tuple[str, str]] = (
    ("[THINK]", "mistral"),
    ("<seed:think>", "seed_oss"),
    ("<|channel>", "gemma4"),
    ("Here is my thought process:", "granite"),
)
# What a thought between <think> and </think> is called where a tool format goes with it.
THINK_NAMES: Mapping[str | None, str] = {
    "hermes": "qwen3",
    "qwen3_coder": "qwen3",
    "deepseek_v3": "deepseek_r1",
    "deepseek_v31": "deepseek_v3",
    "glm45": "glm45",
    "kimi_k2": "kimi_k2",
    "minimax_m2": "minimax_m2",
    "granite": "granite",
    "hunyuan_a13b": "hunyuan_a13b",
    "ernie45": "ernie45",
}


@dataclass(frozen=True)
class ChatFormat:
    """What a model writes.

    Attributes:
        tool_format, reasoning_format: names; None: calls or thoughts are not looked for.
        shown_tokens: special tokens that must stay in the decoded text, because the parser looks for them.
        stop_tokens: tokens that end a turn besides the model's own.
    """

    tool_format: str | None
    reasoning_format: str | None
    shown_tokens: frozenset[str] = frozenset()
    stop_tokens: tuple[str, ...] = ()

    def parser(
        self,
        prompt: str,
        tools: Sequence[Mapping[str, Any]],
        *,
        calls: bool,
        num_earlier_calls: int,
        new_id: Callable[[], str],
        continued: str = "",
    ) -> OutputParser:
        """A parser for one output.

        Args:
            prompt: the rendered prompt; its end says whether a thought is open.
            tools: OpenAI's tool objects. Their schemas give the types of arguments that are written as raw text.
            calls: False makes no calls; their markup is left out all the same.
            num_earlier_calls: tool calls in the conversation so far, for formats that number them.
            new_id: returns a new random text for an id.
            continued: the final message's content, if the model continues it.
        """
        tool_format = TOOL_FORMATS[self.tool_format] if self.tool_format else None
        thoughts = THOUGHT_FORMATS[self.reasoning_format] if self.reasoning_format else None

        def call_id(name: str, index: int) -> str:
            if tool_format and tool_format.numbered_ids:
                return numbered_id(name, num_earlier_calls + index)
            return short_id(new_id()) if tool_format and tool_format.short_ids else "call_" + new_id()

        is_harmony = _is_harmony(self.tool_format, self.reasoning_format)
        opened_by = thoughts.opened_by(prompt, continued) if thoughts else ""
        is_within = thoughts.is_within(continued) if thoughts else continued != ""
        continues_thought = opened_by != "" and thoughts is not None and not thoughts.in_content
        output = Output(
            tools,
            call_id,
            calls and self.tool_format is not None,
            trim_content=continues_thought or (thoughts is not None and not is_within),
            trim_reasoning=not is_within,
        )
        if is_harmony:
            return harmony_parser(prompt, output, split_reasoning=self.reasoning_format is not None)
        return tagged_parser(tool_format, thoughts, output, opened_by, is_within)


def grammar_of_calls(
    found: ChatFormat, tools: Sequence[Mapping[str, Any]], tokens: Mapping[str, int], parallel: bool
) -> str:
    """A grammar of at least one call of one of these tools. Arguments and errors are those of `call_grammar`."""
    if found.tool_format is None:
        raise ValueError("tool_choice: this model has no format of tool calls that is known; it must be none or auto")
    try:
        return call_grammar(call_form(found.tool_format, tokens), tools, tokens, parallel)
    except RecursionError:
        raise ValueError("tools: a schema is nested too deeply") from None


def grammar_around(
    found: ChatFormat, prompt: str, continued: str, tokens: Mapping[str, int], calls: bool = False
) -> str:
    """What a model writes around an answer of a given form, as a grammar that names it `@answer`; "" if nothing.

    Args:
        prompt, continued: as for `ChatFormat.parser`.
        tokens: ids of the tokenizer's added tokens.
        calls: the answer is tool calls.
    """
    if _is_harmony(found.tool_format, found.reasoning_format):
        return harmony_answer(prompt, tokens, calls)
    thoughts = THOUGHT_FORMATS[found.reasoning_format] if found.reasoning_format else None
    if thoughts is None or thoughts.is_within(continued):
        return ""
    return after_thought(thoughts, thoughts.opened_by(prompt, continued), tokens)


def choose_format(
    family: str,
    chat_template: str | None,
    vocabulary: Collection[str],
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
) -> ChatFormat:
    """The format of a model.

    Args:
        family: `model_type` of its configuration.
        chat_template: its text.
        vocabulary: texts of the tokenizer's special and added tokens, or of all tokens.
        tool_parser, reasoning_parser: a name, "none", or "auto" for what family and template show.

    Raises:
        ValueError: an unknown name, or two formats that do not go together.
    """
    template = chat_template or ""
    tool_name = _named(
        "tool_call_parser", tool_parser, TOOL_FORMATS, TOOL_ALIASES, lambda: _auto_tools(family, template)
    )
    thought_name = _named(
        "reasoning_parser",
        reasoning_parser,
        THOUGHT_FORMATS,
        THOUGHT_ALIASES,
        lambda: _auto_thoughts(family, template, tool_name),
    )
    tool_format = TOOL_FORMATS[tool_name] if tool_name else None
    thoughts = THOUGHT_FORMATS[thought_name] if thought_name else None
    tags: tuple[str, ...] = HARMONY_TAGS
    stops: tuple[str, ...] = HARMONY_STOPS
    is_pair = not tool_format and not thoughts
    if not _is_harmony(tool_name, thought_name):
        tags = (*(tool_format.all_tags if tool_format else ()), *(thoughts.tags if thoughts else ()))
        stops = tool_format.stop_tokens if tool_format else ()
        is_pair = not overlap(text_tags(tool_format, thoughts))
    if not is_pair:
        raise ValueError(
            f"reasoning_parser: {thought_name!r} is not allowed with the tool parser {tool_name!r}; "
            "it must be that of the same family, or none"
        )
    present = [tuple(tag for tag in wanted if tag in vocabulary) for wanted in (tags, stops)]
    return ChatFormat(tool_name, thought_name, frozenset(present[0]), present[1])


def _is_harmony(tool_name: str | None, thought_name: str | None) -> bool:
    return tool_name == HARMONY_TOOLS or thought_name == HARMONY_THOUGHTS


def _named(
    field: str, name: str, formats: Mapping[str, Any], aliases: Mapping[str, str], auto: Callable[[], str | None]
) -> str | None:
    if name == "none":
        return None
    if name == "auto":
        return auto()
    known = aliases.get(name, name)
    if known not in formats:
        allowed = ", ".join(sorted({"auto", "none", *formats, *aliases}))
        raise ValueError(f"{field}: {name!r} is not allowed; it must be one of {allowed}")
    return known


def _auto_tools(family: str, template: str) -> str | None:
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    for text, name in TOOL_CLUES:
        if text in template:
            return name
    return FAMILY_TOOLS.get(family) or ("hermes" if "<tool_call>" in template else None)


def _auto_thoughts(family: str, template: str, tool_name: str | None) -> str | None:
    if HARMONY_TOOLS in (tool_name, _auto_tools(family, template)):
        return HARMONY_THOUGHTS
    for text, name in THOUGHT_CLUES:
        if text in template:
            return name
    return THINK_NAMES.get(tool_name, "deepseek_r1") if "</think>" in template else None
