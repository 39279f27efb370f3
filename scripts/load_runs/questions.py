"""Questions whose greedy answers are known, because the server has given them alone.

Lengths are those of ShareGPT's chats in characters: human messages have p50/p90/p99 82/587/5,396, answers of assistants
1,245/2,624/3,793. They are drawn from lognormal distributions; a token has about 4 characters of English.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from load_runs.streams import ask

QUESTION_CHARS, QUESTION_SIGMA, LONGEST_QUESTION = 82, 1.6, 5396
ANSWER_TOKENS, ANSWER_SIGMA = 311, 0.58
CORPUS = ("README.md", "CONTRIBUTING.md", "docs/*.md")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Question:
    """A message of a user, and the greedy answer: its tokens and its text."""

    content: str
    max_tokens: int
    token_ids: list[int]
    text: str

    def body(self) -> dict[str, object]:
        messages = [{"role": "user", "content": self.content}]
        return {
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
        }


def draw(number: int, longest_answer: int, random_numbers: random.Random) -> list[Question]:
    """Questions without answers. Their texts are cut from this project's pages."""
    corpus = "".join(path.read_text() for pattern in CORPUS for path in sorted(ROOT.glob(pattern)))
    questions = []
    for _ in range(number):
        chars = QUESTION_CHARS * random_numbers.lognormvariate(0, QUESTION_SIGMA)
        size = round(min(max(chars, 8), LONGEST_QUESTION))
        start = random_numbers.randrange(len(corpus) - size)
        tokens = ANSWER_TOKENS * random_numbers.lognormvariate(0, ANSWER_SIGMA)
        questions.append(Question(corpus[start : start + size], round(min(max(tokens, 8), longest_answer)), [], ""))
    return questions


async def answer_alone(url: str, questions: Sequence[Question]) -> list[Question]:
    """The questions with their answers, one after the other. Raises RuntimeError if one fails."""
    answered = []
    for question in questions:
        found = await ask(url, question)
        found.read(question)
        if found.fault and found.fault != "another answer":
            raise RuntimeError(f"alone, a stream failed: {found.fault}")
        answered.append(Question(question.content, question.max_tokens, found.token_ids, found.text))
    return answered


def load(path: Path) -> list[Question]:
    return [Question(**entry) for entry in json.loads(path.read_text())]


def save(path: Path, questions: Sequence[Question]) -> None:
    path.write_text(json.dumps([asdict(question) for question in questions], indent=1) + "\n")
