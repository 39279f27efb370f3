"""The control plane between the front, the rank processes and their hosts: typed messages over ZeroMQ.

The front binds a `ControlServer`. Every rank, and every host in a process of its own, connects a `Dealer` under its
name and sends `Hello`. A message is sent as two frames: the name of its type, and its fields in MessagePack.

A `ControlServer` or `Dealer` belongs to one thread at a time.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.types.version import __version__
from moe_runtime.wire.executor import RankInfo
from moe_runtime.wire.messages import RankResult, RankStep, SlotReport, SlotTask

logger = logging.getLogger(__name__)

PROTOCOL = 1
SEND_TIMEOUT_MS = 5000
LINGER_MS = 1000
HEARTBEAT_MS = 2000
HEARTBEAT_TIMEOUT_MS = 15000


class ProtocolError(RuntimeError):
    """A peer sent an unreadable message, or uses another protocol version. The error text names the peer."""


class PeerGoneError(RuntimeError):
    """A message cannot be delivered, because its receiver is not connected. The error text names the peer."""


def rank_name(rank: int) -> str:
    """Name under which a rank connects."""
    return f"rank {rank}"


def host_name(rank: int) -> str:
    """Name under which a host in a process of its own connects."""
    return f"host of rank {rank}"


@dataclass(frozen=True)
class Hello:
    """First message of a rank or host. For a host, `rank` is the rank that it runs."""

    role: Literal["rank", "host"]
    rank: int
    generation: int
    pid: int
    protocol: int = PROTOCOL
    version: str = __version__


@dataclass(frozen=True)
class Init:
    """To a rank: load the model. The front's rendezvous store listens on `store_port`."""

    config: EngineConfig
    model_config: ModelConfig
    path: str
    num_ranks: int
    store_port: int
    log_level: int


@dataclass(frozen=True)
class Ready:
    """From a rank: the model is loaded, and the rank waits for plans."""

    info: RankInfo


@dataclass(frozen=True)
class RunStep:
    """To a rank: run this step."""

    step: RankStep


@dataclass(frozen=True)
class Result:
    """From a rank: a step's outcome."""

    result: RankResult


@dataclass(frozen=True)
class CountsRequest:
    """To a rank: send the expert counts, under this id."""

    request_id: int


@dataclass(frozen=True)
class Forget:
    """To a rank: drop all sequences and expert counts."""


@dataclass(frozen=True)
class Task:
    """To a rank: work between steps."""

    task: SlotTask


@dataclass(frozen=True)
class TaskReport:
    """From a rank: the progress of a task."""

    report: SlotReport


@dataclass(frozen=True)
class Counts:
    """From a rank: int64 expert counts in C order."""

    rank: int
    request_id: int
    shape: list[int]
    data: bytes

    @classmethod
    def from_array(cls, rank: int, request_id: int, counts: np.ndarray) -> Counts:
        return cls(rank, request_id, list(counts.shape), counts.astype(np.int64).tobytes())

    def to_array(self) -> np.ndarray:
        return np.frombuffer(self.data, dtype=np.int64).reshape(self.shape)


@dataclass(frozen=True)
class Failed:
    """From a rank: an exception ended the rank. `kind` is the exception's type, `text` its message."""

    rank: int
    kind: str
    text: str


@dataclass(frozen=True)
class Stop:
    """To a rank or host: end. A host ends with code 1 if `failed` is set, and kills its rank at once."""

    failed: bool = False


@dataclass(frozen=True)
class RankExited:
    """From a host: its rank's process has ended. `returncode` is as in `subprocess`: -9 after SIGKILL."""

    rank: int
    pid: int
    returncode: int


@dataclass(frozen=True)
class Alive:
    """From a host, once a second."""


Message = (
    Hello
    | Init
    | Ready
    | RunStep
    | Result
    | CountsRequest
    | Forget
    | Counts
    | Task
    | TaskReport
    | Failed
    | Stop
    | RankExited
    | Alive
)


_DECODERS: dict[str, msgspec.msgpack.Decoder[Any]] = {
    kind.__name__: msgspec.msgpack.Decoder(kind) for kind in get_args(Message)
}
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> list[bytes]:
    """The frames of a message: its type's name and its fields."""
    return [type(message).__name__.encode(), _ENCODER.encode(message)]


def decode(frames: list[bytes], peer: str) -> Message:
    """The message in `frames`. Raises ProtocolError, naming `peer`, if they hold no valid message."""
    if len(frames) != 2:
        raise ProtocolError(f"{peer} sent a message of {len(frames)} frames; 2 are expected")
    kind = frames[0].decode(errors="replace")
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise ProtocolError(f"{peer} sent a message of unknown type {kind[:40]!r}")
    try:
        message: Message = decoder.decode(frames[1])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"{peer} sent a {kind} that cannot be read: {error}") from error
    return message


def _configure(socket: zmq.Socket[bytes], endpoint: str) -> None:
    socket.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
    if endpoint.startswith("tcp:"):  # a machine that disappears does not close its connections
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def _receive_frames(socket: zmq.Socket[bytes], timeout: float | None) -> list[bytes] | None:
    if not socket.poll(None if timeout is None else max(0, round(timeout * 1000))):
        return None
    return socket.recv_multipart()


class ControlServer:
    """The front's end: binds `endpoint` and talks to `peers` by name. Messages of other peers are ignored.

    Raises OSError if `endpoint` cannot be bound.
    """

    def __init__(self, endpoint: str, peers: list[str]) -> None:
        self._peers = frozenset(peers)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        _configure(self._socket, endpoint)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"cannot listen for ranks at {endpoint}: {error.strerror}") from error

    def send(self, peer: str, message: Message) -> None:
        """Raises PeerGoneError if `peer` has not connected, has gone, or takes no more messages."""
        try:
            self._socket.send_multipart([peer.encode(), *encode(message)])
        except (zmq.Again, zmq.ZMQError) as error:
            raise PeerGoneError(f"{peer} is not connected: {error.strerror}") from error

    def receive(self, timeout: float) -> tuple[str, Message] | None:
        """Next message and its sender, or None after `timeout` seconds. Raises ProtocolError naming the sender."""
        deadline = time.monotonic() + timeout
        while frames := _receive_frames(self._socket, deadline - time.monotonic()):
            peer = frames[0].decode(errors="replace")
            if peer in self._peers:
                return peer, decode(frames[1:], peer)
            logger.warning("ignored a message from an unknown peer %r", peer)
        return None

    def close(self) -> None:
        """Deliver what was sent, within a second, and close. May be called twice."""
        self._context.destroy(linger=LINGER_MS)


class Dealer:
    """The peers' end: connects to the front at `endpoint` under `name`, now or as soon as the front listens."""

    def __init__(self, endpoint: str, name: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        _configure(self._socket, endpoint)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._connected = False
        self._ever_connected = False
        self._lost_at: float | None = None
        self._socket.connect(endpoint)

    def send(self, message: Message) -> None:
        """Send, or queue until the front is connected. Raises PeerGoneError if the front takes no more messages."""
        try:
            self._socket.send_multipart(encode(message))
        except (zmq.Again, zmq.ZMQError) as error:
            raise PeerGoneError(f"the front takes no messages: {error.strerror}") from error

    def receive(self, timeout: float | None) -> Message | None:
        """Next message, or None after `timeout` seconds; a timeout of None waits forever. Raises ProtocolError."""
        frames = _receive_frames(self._socket, timeout)
        return None if frames is None else decode(frames, "the front")

    @property
    def connected(self) -> bool:
        """Whether the front is connected now."""
        self._read_monitor()
        return self._connected

    @property
    def ever_connected(self) -> bool:
        """Whether the front is, or has been, connected."""
        self._read_monitor()
        return self._ever_connected

    @property
    def lost_seconds(self) -> float:
        """Seconds since the connection to the front broke; 0 while connected, and before the first connection."""
        self._read_monitor()
        return 0.0 if self._lost_at is None else time.monotonic() - self._lost_at

    def _read_monitor(self) -> None:
        while self._monitor.poll(0):
            self._connected = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._ever_connected = True
            self._lost_at = None if self._connected else time.monotonic()

    def close(self) -> None:
        """Deliver what was sent, within a second, and close. May be called twice."""
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._context.destroy(linger=LINGER_MS)
