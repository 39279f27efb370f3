"""One stream of `/generate`: what came when, and whether it is what was to come.

While a load runs, its client shares the machine with the server. So it only keeps what comes, and reads it afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from load_runs.questions import Question

SECONDS = 600.0  # that a stream may take


@dataclass
class Stream:
    """A stream. Times are those of `time.monotonic`. Before `read`, only `start`, `chunks` and a failure are known.

    Attributes:
        times: when tokens arrived, with the number of tokens so far.
        fault: why it is wrong; empty if it is as the question's answer.
        chunks: what came of the answer, and when.
    """

    start: float
    times: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    fault: str = ""
    chunks: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0][0] - self.start

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        (first, before), (last, count) = self.times[0], self.times[-1]
        return (last - first) / max(1, count - before)

    def read(self, question: Question) -> None:
        """Take tokens and text out of the chunks, and compare them with the answer to the question."""
        if not self.fault:
            try:
                self.fault = self._read(question)
            except (ValueError, KeyError) as error:
                self.fault = f"{type(error).__name__}: {error}"
        if not self.fault and (self.token_ids, self.text) != (question.token_ids, question.text):
            self.fault = "another answer"
        self.chunks = []

    def _read(self, question: Question) -> str:
        """What is wrong with the form of the answer."""
        finish_reason, rest = None, b""
        status, _, answer = b"".join(chunk for _, chunk in self.chunks).partition(b"\r\n")
        if b" 200 " not in status:
            return f"{status.decode()}: {answer[-300:]!r}"
        for moment, chunk in self.chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data: [DONE]"):
                    wrong = finish_reason != "length" or len(self.token_ids) != question.max_tokens
                    return f"{len(self.token_ids)} tokens, finish_reason {finish_reason}" if wrong else ""
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return str(event["error"]["message"])
                    if event["token_ids"]:
                        self.token_ids += event["token_ids"]
                        self.times.append((moment, len(self.token_ids)))
                    self.text += event["text"]
                    finish_reason = event["finish_reason"]
        return f"truncated after {len(self.token_ids)} tokens"


async def ask(url: str, question: Question) -> Stream:
    """Send a question, and keep its answer, which `Stream.read` reads."""
    stream = Stream(time.monotonic())
    try:
        async with asyncio.timeout(SECONDS):
            await _receive(url, question, stream)
    except TimeoutError:
        stream.fault = f"no end within {SECONDS:g} s"
    except OSError as error:
        stream.fault = f"{type(error).__name__}: {error}"
    return stream


async def _receive(url: str, question: Question, stream: Stream) -> None:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        body = json.dumps(question.body()).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        while chunk := await reader.read(1 << 16):
            stream.chunks.append((time.monotonic(), chunk))
    finally:
        writer.close()
