"""What a client has not read is added up: nothing is lost, and little is held."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_clients import run

from moe_runtime.serve.request_stream import MAX_UNREAD, RequestFailedError, RequestStream, UnavailableError
from moe_runtime.types.outputs import Completion, ExpertChanges, Logprob, OutputDelta

IDS = ("a", "b", "c")


def deltas_of(request_id: str, sizes: list[int], logprobs: bool) -> list[OutputDelta]:
    """Deltas with this many tokens each; the last one ends the request."""
    deltas, count = [], 0
    for index, size in enumerate(sizes):
        token_ids = list(range(count, count + size))
        count += size
        is_first, is_last = index == 0, index == len(sizes) - 1
        deltas.append(
            OutputDelta(
                request_id,
                "".join(f" {token}" for token in token_ids),
                token_ids,
                [{token: Logprob(-1.0, 1, f" {token}")} for token in token_ids] if logprobs else None,
                "stop" if is_last else None,
                7 if is_last else None,
                3,
                count,
                prompt_token_ids=[1, 2, 3] if is_first else None,
                prompt_logprobs=[None] if is_first else None,
                expert_changes=ExpertChanges(moved=2) if is_last else None,
                scheduled_at=1.5 if is_first else None,
            )
        )
    return deltas


def total(deltas: list[OutputDelta]) -> Completion:
    completion = Completion()
    for delta in deltas:
        completion.add(delta)
    completion.texts = [completion.text]
    return completion


SIZES = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(
    all_sizes=st.lists(SIZES, min_size=1, max_size=3),
    logprobs=st.booleans(),
    reads=st.lists(st.booleans(), min_size=40, max_size=40),
    order=st.randoms(use_true_random=False),
)
def test_whatever_is_read_when(all_sizes: list[list[int]], logprobs: bool, reads: list[bool], order: Any) -> None:
    sent = {
        request_id: deltas_of(request_id, sizes, logprobs) for request_id, sizes in zip(IDS, all_sizes, strict=False)
    }
    waiting = {request_id: list(deltas) for request_id, deltas in sent.items()}
    received: dict[str, list[OutputDelta]] = {request_id: [] for request_id in sent}

    async def scenario() -> None:
        stream = RequestStream(sent, lambda request_id: pytest.fail("aborted"))
        for read in reads:
            if left := [request_id for request_id, deltas in waiting.items() if deltas]:
                stream.put(waiting[order.choice(left)].pop(0))
            assert all(len(unread) <= MAX_UNREAD for unread in stream._unread.values())
            while read and stream._unread:
                delta = await anext(stream)
                received[delta.request_id].append(delta)
        async for delta in stream:
            received[delta.request_id].append(delta)
        stream.close()

    run(scenario())
    for request_id, deltas in received.items():
        assert total(deltas) == total(sent[request_id])
        assert [delta.scheduled_at for delta in deltas] == [1.5] + [None] * (len(deltas) - 1)
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
        assert deltas[-1].num_output_tokens == len(total(deltas).token_ids)


@pytest.mark.parametrize("kind", [UnavailableError, RequestFailedError])
def test_an_error_comes_after_what_came_before_it(kind: type[Exception]) -> None:
    async def scenario() -> None:
        aborted: list[str] = []
        stream = RequestStream(["a"], aborted.append)
        *deltas, last = deltas_of("a", [1, 1, 1], False)
        for delta in deltas:
            stream.put(delta)
        stream.put(UnavailableError("no") if kind is UnavailableError else OutputDelta(**{**vars(last), "error": "no"}))
        assert [(await anext(stream)).token_ids for _ in range(2)] == [[0], [1]]
        for _ in range(2):
            with pytest.raises(kind, match=r"^no$"):
                await asyncio.wait_for(anext(stream), 5)
        stream.close()
        assert aborted == ["a"]

    run(scenario())


def test_a_reader_that_is_late_gets_one_delta_after_a_few() -> None:
    async def scenario() -> None:
        stream = RequestStream(["a"], lambda request_id: None)
        for delta in deltas_of("a", [1] * 1000, False):
            stream.put(delta)
        sizes = [len(delta.token_ids) async for delta in stream]
        assert sizes == [1] * (MAX_UNREAD - 1) + [1001 - MAX_UNREAD]

    run(scenario())
