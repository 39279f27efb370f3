"""Framing of messages, and the two ends of the control plane."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import zmq
from fake_rank import model_config
from hypothesis import given
from hypothesis import strategies as st
from process_tools import eventually

from moe_runtime.config.engine import EngineConfig
from moe_runtime.types.outputs import ExpertChanges
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.executor import RankInfo
from moe_runtime.wire.messages import (
    Chunk,
    NewSequence,
    PageCopy,
    PromptLogprobs,
    RankPlan,
    RankResult,
    RankStep,
    Sample,
    SequenceChanges,
    SlotReport,
    SlotTask,
    TokenLogprobs,
)
from moe_runtime.wire.transport import (
    Alive,
    ControlServer,
    Counts,
    CountsRequest,
    Dealer,
    Failed,
    Forget,
    Hello,
    Init,
    Message,
    PeerGoneError,
    ProtocolError,
    RankExited,
    Ready,
    Result,
    RunStep,
    Stop,
    Task,
    TaskReport,
    decode,
    encode,
    rank_name,
)

KINDS = get_args(Message)

INTEGERS = st.integers(-(2**62), 2**62)
FLOATS = st.floats(allow_nan=False)
FEW = st.lists(INTEGERS, max_size=3)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 9),
    temperature=st.sampled_from([0, 0.5, 1.0]),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
)
SEQUENCES = st.builds(NewSequence, INTEGERS, FEW, INTEGERS, PARAMS, INTEGERS, st.lists(FEW, max_size=2))
CHUNKS = st.builds(Chunk, INTEGERS, INTEGERS, INTEGERS, st.lists(FEW, max_size=2), st.booleans())
RANK_PLANS = st.builds(
    RankPlan,
    st.lists(SEQUENCES, max_size=2),
    FEW,
    st.lists(CHUNKS, max_size=3),
    INTEGERS,
    page_copies=st.lists(st.builds(PageCopy, INTEGERS, INTEGERS, INTEGERS), max_size=2),
)
STEPS = st.builds(
    RankStep,
    INTEGERS,
    st.text(),
    FEW,
    st.booleans(),
    rank_rows=st.lists(FEW, max_size=2),
    bucket=INTEGERS,
    work=RANK_PLANS,
)
LOGPROBS = st.builds(TokenLogprobs, FEW, st.lists(FLOATS, max_size=3), FEW)
RESULTS = st.builds(
    RankResult,
    INTEGERS,
    INTEGERS,
    st.lists(st.builds(Sample, INTEGERS, INTEGERS, st.none() | LOGPROBS), max_size=3),
    st.lists(st.builds(PromptLogprobs, INTEGERS, INTEGERS, st.lists(LOGPROBS, max_size=2)), max_size=2),
    FLOATS,
    expert_changes=st.lists(
        st.builds(SequenceChanges, INTEGERS, st.builds(ExpertChanges, *[INTEGERS] * 3)), max_size=2
    ),
    expert_rows=FEW,
    extra_rounds=INTEGERS,
)
CONFIGS = st.builds(EngineConfig, st.text(min_size=1), ep_size=st.integers(1, 64), step_timeout=st.just(3)) | st.lists(
    st.integers(0, 9), min_size=2
).map(lambda counts: EngineConfig("m", ep_size=len(counts), redundant_experts=counts))
KERNELS = st.dictionaries(st.text(), st.text(), max_size=2)
INFOS = st.builds(
    RankInfo,
    *[INTEGERS] * 2,
    *[st.text()] * 2,
    INTEGERS,
    FEW.map(tuple),
    INTEGERS,
    st.text(),
    INTEGERS,
    FLOATS,
    KERNELS,
    st.booleans(),
    st.tuples(st.text()),
)
STRATEGIES = {
    Hello: st.builds(Hello, st.sampled_from(["rank", "host"]), *[INTEGERS] * 4, st.text()),
    Init: st.builds(Init, CONFIGS, st.just(model_config()), st.text(), *[INTEGERS] * 3),
    Ready: st.builds(Ready, INFOS),
    RunStep: st.builds(RunStep, STEPS),
    Result: st.builds(Result, RESULTS),
    CountsRequest: st.builds(CountsRequest, INTEGERS),
    Forget: st.builds(Forget),
    Counts: st.builds(Counts, INTEGERS, INTEGERS, FEW, st.binary()),
    Task: st.builds(Task, st.builds(SlotTask, *[INTEGERS] * 5)),
    TaskReport: st.builds(
        TaskReport, st.builds(SlotReport, INTEGERS, INTEGERS, st.booleans(), INTEGERS, FLOATS, INTEGERS, st.text())
    ),
    Failed: st.builds(Failed, INTEGERS, st.text(), st.text()),
    Stop: st.builds(Stop, st.booleans()),
    RankExited: st.builds(RankExited, INTEGERS, INTEGERS, INTEGERS),
    Alive: st.just(Alive()),
}


@pytest.fixture
def endpoint() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield f"ipc://{folder}/front"


@given(st.data())
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_way(kind, data):
    message = data.draw(STRATEGIES[kind])
    arrived = decode(encode(message), "rank 0")
    assert isinstance(arrived, kind)
    assert dataclasses.asdict(arrived) == dataclasses.asdict(message)


@given(PARAMS)
def test_sampling_params_arrive_as_they_are(params):
    step = RankStep(1, "auto", [1], work=RankPlan([NewSequence(1, [2], 1, params, 3)]))
    arrived = decode(encode(RunStep(step)), "the front")
    assert isinstance(arrived, RunStep)
    arrived_params = arrived.step.work.new_sequences[0].params
    assert isinstance(arrived_params, SamplingParams)
    assert (arrived_params.stop, arrived_params.stop_token_ids) == (params.stop, params.stop_token_ids)


def test_counts_keep_their_shape():
    counts = np.random.default_rng().integers(0, 2**62, (2, 5, 7))
    assert np.array_equal(Counts.from_array(1, 2, counts).to_array(), counts)


@pytest.mark.parametrize(
    "frames",
    [[], [b"Stop"], [b"Stop", b"\x80", b"\x80"], [b"Ghost", b"\x80"], [b"\xff\xfe", b""], [b"Stop", b""]],
    ids=["none", "one", "three", "unknown", "no text", "empty"],
)
def test_what_cannot_be_read_names_the_peer(frames):
    with pytest.raises(ProtocolError, match=r"^rank 7 sent a "):
        decode(frames, "rank 7")


@given(st.binary(max_size=40))
def test_noise_is_a_protocol_error_or_a_message(noise):
    for kind in KINDS:
        try:
            assert isinstance(decode([kind.__name__.encode(), noise], "rank 7"), kind)
        except ProtocolError as error:
            assert "rank 7" in str(error)


def test_a_field_of_a_wrong_type_names_peer_and_field():
    frames = encode(Hello("rank", 1, 0, 5))
    wrong = encode(Failed(1, "kind", "text"))[1]
    with pytest.raises(ProtocolError, match=r"^rank 1 sent a Hello that cannot be read: .*role"):
        decode([frames[0], wrong], "rank 1")


def test_router_and_dealers_talk_by_name(endpoint):
    dealers = [Dealer(endpoint, rank_name(rank)) for rank in range(3)]  # before the front is there
    server = ControlServer(endpoint, [rank_name(rank) for rank in range(3)])
    try:
        for rank, dealer in enumerate(dealers):
            dealer.send(Hello("rank", rank, 0, os.getpid()))
        received = dict(filter(None, (server.receive(10) for _ in dealers)))
        assert received == {rank_name(rank): Hello("rank", rank, 0, os.getpid()) for rank in range(3)}
        server.send("rank 1", Stop(failed=True))
        assert dealers[1].receive(10) == Stop(failed=True)
        assert dealers[0].receive(0) is None
        assert server.receive(0) is None
    finally:
        for end in (*dealers, server):
            end.close()


def test_a_message_in_order_of_sending(endpoint):
    server, dealer = ControlServer(endpoint, ["rank 0"]), Dealer(endpoint, "rank 0")
    try:
        for number in range(200):
            dealer.send(Failed(number, "kind", "text"))
        received = [server.receive(10) for _ in range(200)]
        assert received == [("rank 0", Failed(number, "kind", "text")) for number in range(200)]
    finally:
        dealer.close()
        server.close()


def test_strangers_are_ignored_and_peers_that_send_noise_are_named(endpoint, caplog):
    server = ControlServer(endpoint, ["rank 0"])
    context = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(2)]
    try:
        for socket, name in zip(sockets, (b"stranger", b"rank 0"), strict=True):
            socket.setsockopt(zmq.IDENTITY, name)
            socket.connect(endpoint)
        sockets[0].send_multipart([b"Stop", b"noise"])
        assert server.receive(0.5) is None
        assert "stranger" in caplog.text
        sockets[1].send_multipart([b"Result", b"noise"])
        with pytest.raises(ProtocolError, match=r"^rank 0 sent a Result that cannot be read"):
            server.receive(10)
    finally:
        context.destroy(linger=0)
        server.close()


def test_sending_to_who_is_not_there_is_an_error_that_names_it(endpoint):
    server = ControlServer(endpoint, ["rank 0"])
    dealer = Dealer(endpoint, "rank 0")
    try:
        dealer.send(Alive())
        assert server.receive(10) == ("rank 0", Alive())
        dealer.close()

        def gone() -> bool:
            try:
                server.send("rank 0", Stop())
            except PeerGoneError as error:
                return "rank 0 is not connected" in str(error)
            return False

        assert eventually(gone, 10)
    finally:
        dealer.close()
        server.close()


def test_a_dealer_knows_whether_the_front_is_there(endpoint):
    dealer = Dealer(endpoint, "rank 0")
    try:
        assert not dealer.connected and not dealer.ever_connected and dealer.lost_seconds == 0
        server = ControlServer(endpoint, ["rank 0"])
        assert eventually(lambda: dealer.connected, 10)
        assert dealer.ever_connected and dealer.lost_seconds == 0
        server.close()
        assert eventually(lambda: not dealer.connected, 10)
        assert dealer.ever_connected and eventually(lambda: dealer.lost_seconds > 0.1, 10)
    finally:
        dealer.close()


def test_what_was_sent_before_closing_arrives(endpoint):
    server, dealer = ControlServer(endpoint, ["rank 0"]), Dealer(endpoint, "rank 0")
    try:
        dealer.send(Failed(0, "ValueError", "x" * 1_000_000))
        dealer.close()
        received = server.receive(10)
        assert received is not None and received[1] == Failed(0, "ValueError", "x" * 1_000_000)
    finally:
        server.close()


def test_closing_twice_is_fine_and_nothing_stays(endpoint):
    threads = threading.active_count()
    server, dealer = ControlServer(endpoint, ["rank 0"]), Dealer(endpoint, "rank 0")
    for end in (server, dealer, server, dealer):
        end.close()
    assert threading.active_count() == threads


def test_an_endpoint_in_use_is_an_oserror():
    first = ControlServer("tcp://127.0.0.1:*", [])
    port = first._socket.getsockopt(zmq.LAST_ENDPOINT).decode().rpartition(":")[2]
    try:
        with pytest.raises(OSError, match=f"cannot listen for ranks at tcp://127.0.0.1:{port}"):
            ControlServer(f"tcp://127.0.0.1:{port}", [])
    finally:
        first.close()


def test_receive_waits_no_longer_than_asked(endpoint):
    server = ControlServer(endpoint, ["rank 0"])
    try:
        before = time.monotonic()
        assert server.receive(0.05) is None
        assert time.monotonic() - before < 5
    finally:
        server.close()


def test_the_socket_lies_in_the_folder(endpoint):
    server = ControlServer(endpoint, [])
    try:
        assert Path(endpoint.removeprefix("ipc://")).is_socket()
    finally:
        server.close()
