"""An answer of a form, with what stands around it: the parser finds the form in the content, and thoughts beside it."""

from __future__ import annotations

import random

import pytest
from chat_wire import parse
from grammar_walk import Walker

from moe_runtime.text.formats.registry import HARMONY_TOOLS, THOUGHT_FORMATS, ChatFormat, grammar_around
from moe_runtime.types.structured_outputs import StructuredOutputs

HARMONY = ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", sorted(THOUGHT_FORMATS))
def test_the_form_comes_after_the_thought(name: str, special: bool, opened: bool) -> None:
    thoughts = THOUGHT_FORMATS[name]
    tags = HARMONY if thoughts is None else thoughts.tags
    if thoughts is None and (opened or not special):
        pytest.skip("harmony's tags are always tokens, and its prompt ends with a header")
    prompt = "<|start|>assistant" if thoughts is None else "user: hi\n" + (thoughts.opens[0] + "\n") * opened
    found = ChatFormat(HARMONY_TOOLS if thoughts is None else None, name)
    walker = Walker(tags if special else (), [tag for tag in tags if not special])
    around = grammar_around(found, prompt, "", walker.added)
    rng, ended, thought_count = random.Random(), 0, 0
    for _ in range(8):
        text = walker.output(StructuredOutputs(choice=["calm", "wild"], within=around), rng, most=1500)
        if text is None:
            continue
        ended += 1
        parsed = parse(found, [text], prompt, [], calls=False, is_complete=True)
        content = parsed.content
        if thoughts is not None and thoughts.in_content:
            content = content.rpartition(thoughts.closes[0])[2].strip()
        assert content in ("calm", "wild"), text
        thought_count += bool(parsed.reasoning)
    assert ended > 3
    assert thought_count or not opened or (thoughts is not None and thoughts.in_content)
