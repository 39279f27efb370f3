"""The speed of the same engine without a server: `LLM`, which is given a new prompt whenever one has ended."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from load_runs.questions import Question
from moe_runtime import LLM, SamplingParams


def offline_speed(
    model: str, options: dict[str, Any], questions: Sequence[Question], num_streams: int, seconds: float, ramp: float
) -> float:
    """Tokens per second with `num_streams` requests at a time."""
    with LLM(model, **options) as llm:
        engine = llm._engine
        prompts = [
            engine.tokenizer.apply_chat_template([{"role": "user", "content": question.content}]).token_ids
            for question in questions
        ]
        num_added = count = 0

        def add() -> None:
            nonlocal num_added
            index = random.randrange(len(questions))
            params = SamplingParams(temperature=0.0, max_tokens=questions[index].max_tokens, ignore_eos=True)
            engine.add_request(str(num_added), prompts[index], params)
            num_added += 1

        for _ in range(num_streams):
            add()
        counted_from = time.monotonic() + ramp
        while (now := time.monotonic()) < counted_from + seconds:
            deltas = engine.step()
            for _ in range(sum(delta.finish_reason is not None for delta in deltas)):
                add()
            count += sum(len(delta.token_ids) for delta in deltas) * (now >= counted_from)
        return count / (time.monotonic() - counted_from)
