"""One stream of `/generate`: what came when, and whether it is what was to come. It costs the client little."""

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
    """A stream. Times are those of `time.monotonic`.

    Attributes:
        times: when tokens arrived, with the number of tokens so far.
        fault: why it is wrong; empty if it is as the question's answer.
    """

    start: float
    times: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    fault: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0][0] - self.start

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        (first, before), (last, count) = self.times[0], self.times[-1]
        return (last - first) / max(1, count - before)


async def ask(url: str, question: Question) -> Stream:
    """Send a question, and read its answer."""
    stream = Stream(time.monotonic())
    try:
        async with asyncio.timeout(SECONDS):
            stream.fault = await _read(url, question, stream)
    except TimeoutError:
        stream.fault = f"no end within {SECONDS:g} s"
    except (OSError, ValueError, KeyError) as error:
        stream.fault = f"{type(error).__name__}: {error}"
    if not stream.fault and (stream.token_ids, stream.text) != (question.token_ids, question.text):
        stream.fault = "another answer"
    return stream


async def _read(url: str, question: Question, stream: Stream) -> str:
    """Read the answer into `stream`. Returns what is wrong with its form."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=2**22)
    try:
        body = json.dumps(question.body()).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        status = (await reader.readline()).decode().strip()
        if " 200 " not in status:
            return f"{status}: {(await reader.read())[-300:]!r}"
        finish_reason = None
        async for line in reader:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                wrong = finish_reason != "length" or len(stream.token_ids) != question.max_tokens
                return f"{len(stream.token_ids)} tokens, finish_reason {finish_reason}" if wrong else ""
            event = json.loads(line[6:])
            if "error" in event:
                return str(event["error"]["message"])
            if event["token_ids"]:
                stream.token_ids += event["token_ids"]
                stream.times.append((time.monotonic(), len(stream.token_ids)))
            stream.text += event["text"]
            finish_reason = event["finish_reason"]
        return f"truncated after {len(stream.token_ids)} tokens"
    finally:
        writer.close()
