"""The load test finds what is wrong with a stream, and computes its figures from the counted part."""

from __future__ import annotations

import asyncio
import json
import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import SCRIPTS

sys.path.insert(0, str(SCRIPTS))
from load_runs.questions import LONGEST_QUESTION, Question, draw
from load_runs.report import Limits, Result, table
from load_runs.run import Run
from load_runs.streams import Stream, ask

QUESTION = Question("a question", 3, [5, 6, 7], " a b c")
EVENTS = [
    {"text": " a", "token_ids": [5], "finish_reason": None},
    {"text": " b", "token_ids": [6], "finish_reason": None},
    {"text": " c", "token_ids": [7], "finish_reason": "length"},
]


def reply(events: list[object], done: bool = True, status: str = "200 OK") -> bytes:
    parts = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"] * done
    chunks = "".join(f"{len(part):x}\r\n{part}\r\n" for part in parts)
    return f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n".encode()


def answered(content: bytes) -> Stream:
    """The stream from a server that sends this."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(content)
        await writer.drain()
        writer.close()

    async def scenario() -> Stream:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            return await ask(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", QUESTION)

    stream = asyncio.run(asyncio.wait_for(scenario(), 20))
    stream.read(QUESTION)
    return stream


def test_a_right_stream() -> None:
    stream = answered(reply(EVENTS))
    assert (stream.fault, stream.token_ids, stream.text) == ("", QUESTION.token_ids, QUESTION.text)
    assert [count for _, count in stream.times] == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (reply(EVENTS[:2], done=False), "truncated after 2 tokens"),
        (reply(EVENTS, done=False), "truncated after 3 tokens"),
        (reply(EVENTS[:2]), "2 tokens, finish_reason None"),
        (reply([*EVENTS[:2], {**EVENTS[2], "token_ids": [8]}]), "another answer"),
        (reply([*EVENTS[:2], {**EVENTS[2], "text": " d"}]), "another answer"),
        (reply([*EVENTS[:2], {"error": {"message": "rank 1 has died"}}]), "rank 1 has died"),
        (reply([], status="503 Service Unavailable"), "HTTP/1.1 503 Service Unavailable"),
        (b"", ""),
    ],
)
def test_what_is_wrong_with_a_stream(content: bytes, fault: str) -> None:
    found = answered(content).fault
    assert found and found.startswith(fault)


@given(st.lists(st.integers(1, 400), max_size=12))
def test_a_stream_is_the_same_wherever_it_is_cut(sizes: list[int]) -> None:
    content, stream = reply(EVENTS), Stream(0.0)
    for size in [*sizes, 1000]:
        stream.chunks.append((float(len(stream.chunks)), content[:size]))
        content = content[size:]
    stream.read(QUESTION)
    assert (stream.fault, stream.token_ids, stream.text) == ("", QUESTION.token_ids, QUESTION.text)


def run_of(streams: list[Stream], **more: float) -> Run:
    return Run("closed, 2", 2, start=0.0, counted_from=10.0, end=20.0, streams=streams, **more)  # type: ignore[arg-type]


def test_only_the_counted_part_counts() -> None:
    ramp = Stream(0.0, [(8.0, 1), (9.0, 2), (12.0, 5)], [0] * 5)
    steady = Stream(11.0, [(12.0, 1), (16.0, 5), (25.0, 9)], [0] * 9)
    run = run_of([ramp, steady])
    assert run.tokens_per_second == (3 + 5) / 10
    assert run.counted == [steady]
    assert (steady.ttft, steady.tpot) == (1.0, 13 / 8)
    figures = Result(run_of([steady, steady], ranks_cpu=1.0), Limits(1.5, 2.0)).figures()
    assert (figures["good_share"], figures["good_per_second"]) == (1.0, 0.2)
    assert Result(run_of([steady], ranks_cpu=1.0), Limits(0.5, 2.0)).figures()["good_share"] == 0.0


def test_every_mistake_is_named() -> None:
    steady = Stream(11.0, [(12.0, 1), (16.0, 5)], [0] * 5)
    memory = [(float(moment), 100 + 5 * (moment > 225)) for moment in range(0, 300, 5)]
    run = run_of([steady, Stream(11.0, fault="another answer")], front_cpu=2.0, ranks_cpu=10.0)
    run.end, run.memory, run.used_pages = 300.0, memory, 3
    mistakes = Result(run, Limits(1.0, 1.0), offline=100.0).mistakes()
    words = [
        "1 of 2 streams are wrong",
        "3 pages are not free",
        "grown by 5.0%",
        "speed offline",
        "the front takes 0.200",
    ]
    assert len(mistakes) == len(words)
    assert all(word in mistake for word, mistake in zip(words, mistakes, strict=True))
    assert "| closed, 2 | 300 | 2 | 1 |" in table([Result(run, Limits(1.0, 1.0))])


def test_questions_have_the_lengths_of_chats() -> None:
    drawn = draw(400, 940, random.Random(random.random()))
    assert 60 < sorted(len(question.content) for question in drawn)[200] < 115
    assert 270 < sorted(question.max_tokens for question in drawn)[200] < 360
    assert max(len(question.content) for question in drawn) <= LONGEST_QUESTION
    assert max(question.max_tokens for question in drawn) <= 940
