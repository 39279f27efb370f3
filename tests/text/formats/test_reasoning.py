"""Thoughts: opened by the model or by the prompt, with calls within them, never closed."""

from __future__ import annotations

import pytest
from chat_wire import Parsed, parse_at_every_cut

from moe_runtime.text.formats.registry import ChatFormat, choose_format

CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def chosen(reasoning: str, tools: str = "none") -> ChatFormat:
    return choose_format("", None, [], tools, reasoning)


def split(parsed: Parsed) -> tuple[str, str, int]:
    return parsed.reasoning, parsed.content, len(parsed.calls)


OUTPUTS = {
    "the model opens it": ("qwen3", "", "<think>\nWhy.\n</think>\n\nHi.", ("Why.", "Hi.", 0)),
    "the prompt opens it": ("deepseek_r1", "<A><think>\n", "Why.\n</think>\n\nHi.", ("Why.", "Hi.", 0)),
    "both open it": ("deepseek-r1", "<A><think>\n", "<think>\nWhy.</think>Hi.", ("Why.", "Hi.", 0)),
    "the prompt closes it": ("qwen3", "<A><think>\n\n</think>\n\n", "Hi.", ("", "Hi.", 0)),
    "an empty one": ("qwen3", "", "<think>\n\n</think>\n\nHi.", ("", "Hi.", 0)),
    "the prompt mentions it": (
        "qwen3",
        "Say <think> please<A>",
        "Hi <think> and </think>.",
        ("", "Hi <think> and </think>.", 0),
    ),
    "never closed": ("glm45", "", "\n<think>Why. </thi", ("Why. </thi", "", 0)),
    "never closed, opened by the prompt": ("kimi_k2", "<think>", "Why.", ("Why.", "", 0)),
    "none at all": ("qwen3-thinking", "", "\n Hi.\n", ("", "Hi.\n", 0)),
    "a call within it": ("qwen3", "<think>\n", f"Why.\n{CALL}", ("Why.", "", 1)),
    "a call within it, closed later": ("qwen3", "<think>\n", f"Why.\n{CALL}\n</think>\n\nHi.", ("Why.", "Hi.", 1)),
    "a tag within it that is no call": (
        "qwen3",
        "<think>\n",
        "A <tool_call> tag.</think>Hi.",
        ("A <tool_call> tag.", "Hi.", 0),
    ),
    "a call after it": ("qwen3", "", f"<think>Why.</think>{CALL}", ("Why.", "", 1)),
    "a call within it, and the rest of it": ("qwen3", "", f"<think>x {CALL} y\n{CALL}</think>z", ("x\ny", "z", 2)),
    "a call within it, never closed": ("qwen3", "<think>", f"x {CALL} y\n{CALL}\nz\n", ("x", "y\nz\n", 2)),
    "a call within it, then a new one": (
        "qwen3",
        "<think>",
        f"x{CALL}y{CALL}<think>z</think>Hi.{CALL}End",
        ("x\nz", "y\nHi.\nEnd", 3),
    ),
    "thoughts between calls": (
        "minimax_m2",
        "<think>\n",
        f"One.</think>\n{CALL}\n<think>Two.</think>\n{CALL}",
        ("One.\nTwo.", "", 2),
    ),
    "mistral": ("mistral", "a literal [THINK] in the prompt<A>", "[THINK]Why.[/THINK]Hi.", ("Why.", "Hi.", 0)),
    "mistral, a stray end": ("mistral", "", "Hi[/THINK]!", ("", "Hi!", 0)),
    "gemma4": ("gemma4", "", "<|channel>thought\nWhy.\n<channel|>Hi.", ("Why.", "Hi.", 0)),
    "gemma4, opened by the prompt": ("gemma4", "<|channel>thought\n", "Why.<channel|>Hi.", ("Why.", "Hi.", 0)),
    "gemma4, closed by the prompt": ("gemma4", "<|channel>thought\n<channel|>", "Hi.", ("", "Hi.", 0)),
    "granite 3.2": (
        "granite",
        "",
        "Here is my thought process:\nWhy.\nHere is my response:\nHi.",
        ("Why.", "Hi.", 0),
    ),
    "granite 3.3": ("granite", "", "<think>Why.</think><response>Hi.</response>", ("Why.", "Hi.", 0)),
    "hunyuan": (
        "hunyuan_a13b",
        "",
        "<think>\nWhy.\n</think>\n<answer>\nHi.\n</answer>",
        ("Why.", "Hi.", 0),
    ),
    "hunyuan, a call within it": ("hunyuan_a13b", "", f"<think>{CALL}</think><answer>Hi.", (CALL, "Hi.", 0)),
    "hunyuan, thought closed by the prompt": (
        "hunyuan_a13b",
        "<think>\n\n</think>\n",
        "<answer>\nHi.\n</answer>",
        ("", "Hi.", 0),
    ),
    "ernie": ("ernie45", "<think>\n", "Why.\n</think>\n\n<response>\nHi.\n</response>\n", ("Why.", "Hi.", 0)),
    "ernie, no answer tag": ("ernie45", "<think>\n", "Why.\n</think>\nHi.", ("Why.", "Hi.", 0)),
    "seed": ("seed_oss", "", "<seed:think>Why.</seed:think>Hi.", ("Why.", "Hi.", 0)),
    "minimax, in the content": (
        "minimax_m2_append_think",
        "]~b]ai\n<think>\n",
        "Why.\n</think>\n\nHi.",
        ("", "<think>Why.\n</think>\n\nHi.", 0),
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_thoughts(name):
    reasoning, prompt, output, expected = OUTPUTS[name]
    chat_format = chosen(reasoning, "hermes" if reasoning not in ("mistral", "gemma4") else "none")
    assert split(parse_at_every_cut(chat_format, output, prompt=prompt)) == expected


CONTINUED = {  # the prompt before the final message, the final message, the output
    "within it": ("qwen3", "<A>", "<think>\nLet me", " see.\n</think>\n\nAnswer", (" see.", "Answer", 0)),
    "within it, glm": ("glm45", "<A>", "\n<think>Let me", " see.</think>\nAnswer", (" see.", "Answer", 0)),
    "within it, mistral": (
        "mistral",
        "[THINK] a [/THINK]<A>",
        "[THINK]Let me",
        " see.[/THINK]No.",
        (" see.", "No.", 0),
    ),
    "within it, after a text": ("mistral", "<A>", "Hi. [THINK]Let me", " see.[/THINK]No.", (" see.", "No.", 0)),
    "within it, gemma4": ("gemma4", "<A>", "<|channel>thought\nLet", " us.<channel|>No.", (" us.", "No.", 0)),
    "within it, granite": (
        "granite",
        "<A>",
        "Here is my thought process:\nSo",
        " what?\nHere is my response:\nHi.",
        (" what?", "Hi.", 0),
    ),
    "the template opens it": ("qwen3", "<A><think>\n", "Let me", " see.</think>Hi.", (" see.", "Hi.", 0)),
    "right after the tag": ("qwen3", "<A>", "<think>\n", "\nLet me.</think>Hi.", ("Let me.", "Hi.", 0)),
    "a second one": ("qwen3", "<A>", "<think>a</think>\n<think>b", " c</think>Hi.", (" c", "Hi.", 0)),
    "after it": ("qwen3", "<A>", "<think>a</think>\n\nHi", " you </think>.", ("", " you </think>.", 0)),
    "right after its end": ("qwen3", "<A>", "<think>a</think>", "\n\nHi.", ("", "Hi.", 0)),
    "the prompt has an empty one": ("qwen3", "<A><think>\n\n</think>\n\n", "Hi", " you.", ("", " you.", 0)),
    "prose": ("qwen3", "<A>", "Write <think>", " so.", ("", " so.", 0)),
    "other messages mention it": ("mistral", "Say [THINK]<A>", "Hi", " you.", ("", " you.", 0)),
    "no thought at all": ("hunyuan_a13b", "<A>", "Hi", " you.", ("", " you.", 0)),
    "in the content": ("minimax_m2_append_think", "<A>", "<think>Let me", " see.</think>", ("", " see.</think>", 0)),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_the_final_message_is_continued(name):
    reasoning, prompt, continued, output, expected = CONTINUED[name]
    parsed = parse_at_every_cut(chosen(reasoning), output, prompt=prompt + continued, continued=continued)
    assert split(parsed) == expected


def test_without_a_reasoning_format_the_tags_are_text():
    text = "<think>Why.</think>Hi."
    assert split(parse_at_every_cut(chosen("none", "hermes"), text, prompt="<think>")) == ("", text, 0)


KIMI = "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"


def test_kimi_s_section_ends_a_thought():
    parsed = parse_at_every_cut(chosen("kimi_k2", "kimi_k2"), f"<think>Why.{KIMI}<|tool_calls_section_end|>")
    assert split(parsed) == ("Why.", "", 1)


HARMONY = {
    "an answer": (
        "<|channel|>analysis<|message|>Why.<|end|><|start|>assistant<|channel|>final<|message|>Hi. <|return|>",
        ("Why.", "Hi. ", 0),
    ),
    "an answer that is cut off": ("<|channel|>final<|message|>Hi. <|ret", ("", "Hi. <|ret", 0)),
    "a preamble and a call": (
        "<|channel|>commentary<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.now "
        "<|constrain|>json<|message|>{}<|call|>",
        ("", "Look.", 1),
    ),
    "a recipient before the channel": (
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}",
        ("", "", 1),
    ),
    "the recipient first of all": (" to=functions.now<|channel|>commentary<|message|>{}<|call|>", ("", "", 1)),
    "a recipient twice": (
        "<|channel|>commentary to=functions.now to=functions.now<|constrain|>json<|message|>{}<|call|>",
        ("", "", 1),
    ),
    "two calls": (
        "<|channel|>commentary to=functions.now<|message|>{}<|call|><|start|>assistant<|channel|>commentary "
        "to=now<|message|>{}<|call|>",
        ("", "", 2),
    ),
    "a tool that is not ours": ("<|channel|>analysis to=browser.search<|message|>{}<|call|>", ("", "", 0)),
    "thoughts in several messages": (
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>",
        ("One.\nTwo.", "", 0),
    ),
    "an end is missing": ("<|channel|>analysis<|message|>Why.<|channel|>final<|message|>Hi.", ("Why.", "Hi.", 0)),
    "strange words in the header": ("<|channel|>final ok <|constrain|>text<|message|>Hi.", ("", "Hi.", 0)),
    "no header": ("Hi.", ("", "Hi.", 0)),
    "no header, and a word of one": ("assistants are here", ("", "assistants are here", 0)),
    "no header, and two words of one": ("assistant to=me, please.", ("", "assistant to=me, please.", 0)),
    "no header, and a recipient": ("to=whom? <b>", ("", "to=whom? <b>", 0)),
    "a header without a start": ("assistant<|channel|>final<|message|>Hi.", ("", "Hi.", 0)),
    "a header with nothing but a role": ("assistant <|message|>Hi.", ("", "Hi.", 0)),
    "a header that is cut off": ("<|channel|>comment", ("", "", 0)),
    "nothing": ("", ("", "", 0)),
}


@pytest.mark.parametrize("name", HARMONY)
def test_harmony(name):
    output, expected = HARMONY[name]
    chat_format = chosen("gpt-oss", "gpt-oss")
    parsed = parse_at_every_cut(chat_format, output, prompt="<|start|>user<|message|>Q<|end|><|start|>assistant")
    assert split(parsed) == expected
    silent = parse_at_every_cut(chat_format, output, prompt="<|start|>assistant", calls=False)
    assert split(silent) == (*expected[:2], 0)


def test_harmony_goes_on_in_the_message_that_the_prompt_has_begun():
    prompt = "<|start|>assistant<|channel|>analysis<|message|>Be"
    parsed = parse_at_every_cut(chosen("gpt-oss", "gpt-oss"), "cause.<|end|>", prompt=prompt)
    assert split(parsed) == ("cause.", "", 0)


def test_harmony_without_a_reasoning_format_shows_thoughts_as_content():
    output = HARMONY["an answer"][0]
    parsed = parse_at_every_cut(chosen("none", "openai"), output, prompt="<|start|>assistant")
    assert split(parsed) == ("", "Why.\nHi. ", 0)
