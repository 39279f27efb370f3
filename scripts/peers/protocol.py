"""The side of the protocol that runs with an engine: commands as JSON lines on stdin, answers on stdout.

Standard library only: it runs in the environment of every engine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

Handler = Callable[..., Any]


def take_stdout() -> TextIO:
    """The stream for answers. Later output of libraries to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, handlers: dict[str, Handler]) -> None:
    """Answer `{"do": name, ...arguments}` with what `handlers[name]` returns, until stdin ends.

    A handler's error ends the process; its traceback is on stderr.
    """
    for line in sys.stdin:
        command = json.loads(line)
        answer = handlers[command.pop("do")](**command)
        answers.write(json.dumps(answer) + "\n")


class Stopwatch:
    """Times one generation of `num_prompts` sequences, all submitted now.

    Prefill lasts until every sequence has its first token; decode lasts from then to the end. Second and later tokens
    before that moment count in neither rate, so an engine that mixes both phases in a step has no advantage.
    """

    def __init__(self, num_prompts: int) -> None:
        self._waiting = set(range(num_prompts))
        self._decoded = 0
        self._start = self._first = self._last = time.perf_counter()

    def step(self, sequences: Iterable[int]) -> None:
        """A step has ended; each of `sequences` (numbers from 0) got one token."""
        sequences = list(sequences)
        self._last = time.perf_counter()
        if self._waiting:
            self._waiting.difference_update(sequences)
            self._first = self._last
        else:
            self._decoded += len(sequences)

    def result(self) -> dict[str, float]:
        """Seconds of both phases, and tokens of the second."""
        assert not self._waiting
        return {
            "prefill_s": self._first - self._start,
            "decode_s": self._last - self._first,
            "decode_tokens": self._decoded,
        }
