"""Grammars of what stands around an answer: a thought before it, tags around it. In Lark's syntax with `@answer`.

A tag that is a token of its own is named by its number, for control tokens are no text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from moe_runtime.text.formats.harmony import CHANNEL, END, MESSAGE, START
from moe_runtime.text.formats.thoughts import ThoughtFormat

TEXT = "TEXT: /(?s:.*)/\n"
BLANKS = "BLANKS: /[ \\n]{0,4}/\n"


def symbol(text: str, tokens: Mapping[str, int]) -> str:
    """A text in a rule: the token that it is, or its characters."""
    return f"<[{tokens[text]}]>" if text in tokens else json.dumps(text)


def expression(regex: str) -> str:
    """A regular expression in a rule."""
    return "/" + re.sub(r"(?<!\\)/", r"\\/", regex) + "/"


def after_thought(thoughts: ThoughtFormat, opened_by: str, tokens: Mapping[str, int]) -> str:
    """An answer, after a thought: one that the prompt has opened, else one that the model may write.

    Args:
        opened_by: the opening tag that the prompt ends with; "" if it opens none.
        tokens: ids of the tokenizer's added tokens.
    """
    # A thought that begins with an opening tag would be one of that tag.
    opens = "|".join(map(re.escape, thoughts.opens))
    begins_another = expression(rf"\s*({opens})(?s:.*)")
    rules = [BLANKS, f"THOUGHT: /(?s:.*)/ & ~{begins_another}\n"]
    begun = []
    for number, (open_tag, close) in enumerate(thoughts.pairs):
        if close in tokens:
            rules.append(f"thought{number}: THOUGHT {symbol(close, tokens)} BLANKS\n")
        else:
            rules.append(f"thought{number}: text{number} BLANKS\ntext{number}[suffix={json.dumps(close)}]: THOUGHT\n")
        if not opened_by:
            begun.append(f"BLANKS {symbol(open_tag, tokens)} thought{number}")
        elif open_tag == opened_by:
            begun.append(f"thought{number}")
    answer = "@answer"
    if thoughts.answer:
        left, right = (symbol(tag, tokens) for tag in thoughts.answer)
        answer = f"(@answer | {left} BLANKS @answer BLANKS {right})"
    before = f"({' | '.join(begun)})" + ("" if opened_by else "?")
    return f"start: {before} {answer}\n" + "".join(rules)


def harmony_answer(prompt: str, tokens: Mapping[str, int], calls: bool) -> str:
    """An answer in the final channel of harmony, after any thoughts; or calls, which have headers of their own."""
    start, channel, message, end = (symbol(tag, tokens) for tag in (START, CHANNEL, MESSAGE, END))
    header = prompt.rpartition(START)[2]
    if MESSAGE in header:  # the prompt has begun a message
        return "start: @answer\n"
    if calls:
        return f'start: ({channel} "analysis" {message} TEXT {end} {start} "assistant")* @answer\n' + TEXT
    first = "" if CHANNEL in header else channel
    thought = f'"analysis" {message} TEXT {end} {start} "assistant" {channel}'
    return f'start: {first} ({thought})* "final" {message} @answer\n' + TEXT
