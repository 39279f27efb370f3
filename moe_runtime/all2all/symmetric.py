"""Dispatch and combine between CPU ranks of one host: one-sided puts into shared memory, no sockets.

The data path is `kernels/cpu/exchange.h`; this file has the memory and the start. Native layers exchange rows
themselves, with `exchange` and `step`. Other layers make two native calls each, `dispatch` and `combine`.

Shape suffixes: T this rank's tokens, K experts per token, D hidden, W ranks, S slots per rank, N rows that arrived
(each token once), R rows that experts compute here.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
import weakref
from collections.abc import Iterator
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatched, Returned
from moe_runtime.all2all.rounds import counts_of, in_round, round_of
from moe_runtime.kernels.cpu import loader, native
from moe_runtime.kernels.cpu.native import check_arrived, native_code
from moe_runtime.kernels.cpu.structs import ExchangeShape, SpreadStep

Value = TypeVar("Value")

SHARED_MEMORY = Path("/dev/shm")
MAX_BYTES = 48 << 20  # of all ranks: fits the containers' default of 64 MB, and in most cases the last-level cache


class Room:
    """Memory for short-lived rows. It is kept, because the system provides new memory page by page."""

    def __init__(self, row_size: int, dtype: torch.dtype) -> None:
        self._rows = torch.empty(0, row_size, dtype=dtype)

    def rows(self, count: int) -> Tensor:
        """`[count, row_size]`, the same memory every time."""
        if count > len(self._rows):
            self._rows = self._rows.new_empty(0, self._rows.shape[1])  # freed before more is allocated
            self._rows = self._rows.new_empty(count, self._rows.shape[1])
        return self._rows[:count]


class SymmetricDispatcher:
    """Writes rows into the peers' shared memory and waits on flags in its own; see `dispatch.Dispatcher`.

    A token's row is sent once to each rank that has a slot for it; the return path has one row per (token, k). If a
    rank has more tokens than the buffers hold, the step takes several rounds, with the same result. Call `combine` or
    `bring_back` for a dispatch before the next one. After a TimeoutError the dispatcher can't be used any more.

    Args:
        group: the ranks, all on this host; used at the start only.
        num_slots: the most slots that any rank has, S.
        max_tokens: the usual maximum of a rank's tokens in a step; more tokens take more rounds.
        hidden_size, top_k: D, K.
        dtype: float32 or bfloat16.
        timeout: seconds to wait for the peers in `dispatch` or `combine` before they raise TimeoutError.
        max_bytes: shared memory of all ranks together; if `max_tokens` needs more, steps take several rounds.

    Raises:
        ValueError: the shared memory is too small, or not the same for all ranks; all ranks raise it.
        NativeUnavailableError: no native kernels.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_slots: int,
        *,
        max_tokens: int,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        timeout: float,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if dtype not in native.DTYPES:
            raise ValueError(f"dtype: {dtype} is not allowed with symmetric; it must be one of {native.DTYPES}")
        self.num_slots, self.hidden_size, self.top_k, self.dtype = num_slots, hidden_size, top_k, dtype
        self.rank = group.rank()
        self._timeout_ns = int(timeout * 1e9)
        self._element = native_code(dtype)
        self._number = 0
        self._arrived, self._computed = Room(hidden_size, dtype), Room(hidden_size, dtype)
        self._kernels = loader.load()
        self._library = self._kernels.library
        cores = set().union(*_gather(group, os.sched_getaffinity(0)))
        shape = ExchangeShape(
            ranks=group.size(),
            rank=self.rank,
            slots=num_slots,
            hidden=hidden_size,
            top_k=top_k,
            row_bytes=hidden_size * dtype.itemsize,
            ranks_share_cores=group.size() > len(cores),
        )
        self.nbytes = self._choose_capacity(shape, max_tokens, max_bytes // group.size())
        self.capacity: int = shape.capacity
        # The exchange's finalizer holds the maps, so they live as long as the exchange.
        maps = _share(group, self.nbytes)
        views = [ctypes.c_char.from_buffer(segment) for segment in maps]
        addresses = (c_void_p * len(views))(*map(ctypes.addressof, views))
        self.exchange = self._library.moe_exchange_open(ctypes.addressof(shape), addresses)
        weakref.finalize(self, _close, self._library, self.exchange, views).atexit = False

    def _choose_capacity(self, shape: ExchangeShape, max_tokens: int, max_bytes: int) -> int:
        """Set the tokens of an exchange, an even number; returns the size of a segment."""

        def size(capacity: int) -> int:
            shape.capacity = capacity
            nbytes: int = self._library.moe_exchange_segment_bytes(ctypes.addressof(shape))
            return nbytes

        fixed = size(0)
        per_pair = max(1, (size(2048) - fixed) // 1024)
        fitting = (max_bytes - fixed) // per_pair
        return size(2 * max(1, min(-(-max_tokens // 2), fitting)))

    def step(self, tokens_per_rank: list[int], part_tokens: int) -> SpreadStep:
        """Parameters for native layers that exchange rows themselves, `part_tokens` of each rank at a time."""
        rows = sum(min(tokens, part_tokens) for tokens in tokens_per_rank)
        arrived, computed = self._arrived.rows(rows), self._computed.rows(rows * self.top_k)
        pointers = arrived.data_ptr(), computed.data_ptr()
        step = SpreadStep(max(tokens_per_rank), part_tokens, rows, self._timeout_ns, *pointers)
        step.keep = (arrived, computed)
        return step

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        """See `dispatch.Dispatcher`; `slot_TK` is int64."""
        return self._dispatch(x_TD, slot_TK, tokens_per_rank, 0)[0]

    def dispatch_rounds(
        self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int], capacity_W: list[int]
    ) -> Iterator[Dispatched]:
        """With its first flag each rank sends the number of rounds that its rows need; all ranks use the largest."""
        num_slots, capacity = len(tokens_per_rank) * self.num_slots, capacity_W[self.rank]
        round_TK = round_of(slot_TK, num_slots, capacity)
        own = -(-int(counts_of(slot_TK.flatten(), num_slots).max()) // capacity)
        sent, num_rounds = self._dispatch(x_TD, in_round(slot_TK, round_TK, 0), tokens_per_rank, own)
        yield sent
        for number in range(1, num_rounds):
            yield self._dispatch(x_TD, in_round(slot_TK, round_TK, number), tokens_per_rank, own)[0]

    def _dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int], own: int) -> tuple[Dispatched, int]:
        """Dispatch; also returns the largest `own` of all ranks."""
        num_tokens, all_tokens = tokens_per_rank[self.rank], sum(tokens_per_rank)
        assert x_TD.dtype == self.dtype and x_TD.shape == (num_tokens, self.hidden_size)
        assert slot_TK.dtype == torch.int64 and slot_TK.shape == (num_tokens, self.top_k)
        x_TD, slot_TK = x_TD.contiguous(), slot_TK.contiguous()
        x_ND = self._arrived.rows(all_tokens)
        row_R = slot_TK.new_empty(all_tokens * self.top_k)
        counts_S = slot_TK.new_empty(self.num_slots)
        largest = c_int64()
        total = self._library.moe_exchange_dispatch(
            self.exchange,
            x_TD.data_ptr(),
            slot_TK.data_ptr(),
            num_tokens,
            max(tokens_per_rank),
            own,
            self._timeout_ns,
            x_ND.data_ptr(),
            row_R.data_ptr(),
            counts_S.data_ptr(),
            ctypes.addressof(largest),
        )
        check_arrived(-1 - total, self._timeout_ns)
        self._number += 1
        sent = Dispatched(x_ND, row_R[:total], counts_S, (self._number, slot_TK), self._computed.rows(total))
        return sent, largest.value

    def combine(self, y_RD: Tensor, sent: Dispatched, weights_TK: Tensor) -> Tensor:
        """See `dispatch.Dispatcher`; `weights_TK` is float32."""
        slot_TK = self._check(y_RD, sent)
        assert weights_TK.dtype == torch.float32 and weights_TK.shape == slot_TK.shape
        y_RD, weights_TK = y_RD.contiguous(), weights_TK.contiguous()
        out_TD = y_RD.new_empty(len(weights_TK), self.hidden_size)
        late = self._library.moe_exchange_combine(
            self._element,
            self.exchange,
            y_RD.data_ptr(),
            weights_TK.data_ptr(),
            self._timeout_ns,
            out_TD.data_ptr(),
        )
        check_arrived(late, self._timeout_ns)
        return out_TD

    def bring_back(self, y_RD: Tensor, sent: Dispatched) -> Returned:
        """See `dispatch.Dispatcher`."""
        slot_TK = self._check(y_RD, sent)
        y_RD = y_RD.contiguous()
        y_ND = y_RD.new_empty(slot_TK.numel(), self.hidden_size)
        late = self._library.moe_exchange_bring_back(self.exchange, y_RD.data_ptr(), self._timeout_ns, y_ND.data_ptr())
        check_arrived(late, self._timeout_ns)
        pair_R = (slot_TK.flatten() >= 0).nonzero().flatten()
        return Returned(y_ND[pair_R], pair_R)

    def combine_rounds(self, rounds: list[Returned], weights_TK: Tensor) -> Tensor:
        """See `dispatch.Dispatcher`; `weights_TK` is float32."""
        rows = Returned.join(rounds)
        return self._kernels.combine(rows.y_RD, rows.pair_R, weights_TK)

    def _check(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        """The slots that were dispatched."""
        number, slot_TK = sent.handle
        assert number == self._number, "a dispatch must be combined before the next"
        assert y_RD.dtype == self.dtype and y_RD.shape == (len(sent.row_R), self.hidden_size)
        slots: Tensor = slot_TK
        return slots


def free_bytes() -> int:
    """Bytes left in /dev/shm for this user; 0 if there is no /dev/shm."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except FileNotFoundError:
        return 0
    return status.f_bavail * status.f_frsize


def _close(library: ctypes.CDLL, exchange: int, views: list[ctypes.c_char]) -> None:
    library.moe_exchange_close(exchange)
    views.clear()


def _share(group: dist.ProcessGroup, nbytes: int) -> list[mmap.mmap]:
    """A segment of zeros from each rank, mapped here in order of rank. This rank's file name is removed afterwards.

    Every rank learns of an error on any rank, so that all raise the same error and none waits for another.
    """
    free = min(_gather(group, free_bytes()))
    needed = nbytes * group.size()
    too_small = (
        f"symmetric: needs {needed / 1e6:.1f} MB of shared memory, {SHARED_MEMORY} has {free / 1e6:.1f} MB free; "
        "use dispatcher all_gather or all_to_all, or enlarge it"
    )
    if needed > free:
        raise ValueError(too_small)
    path = SHARED_MEMORY / f"moe-runtime-{secrets.token_hex(16)}"
    try:
        problem = _reserve(path, nbytes)
        reserved = _gather(group, (path, problem))
        if any(code == errno.ENOSPC for _, code in reserved):
            raise ValueError(too_small)
        for rank, (_, code) in enumerate(reserved):
            if code:
                raise ValueError(f"symmetric: rank {rank} cannot reserve shared memory: {os.strerror(code)}")
        maps = [_map(other, nbytes) for other, _ in reserved]
        # No rank continues before all ranks have opened all segments.
        for rank, opened in enumerate(_gather(group, [segment is not None for segment in maps])):
            if not all(opened):
                owner = opened.index(False)
                raise ValueError(
                    f"symmetric: rank {rank} cannot open the shared memory of rank {owner}; all ranks must be on one "
                    f"host and see the same {SHARED_MEMORY}"
                )
    finally:
        path.unlink(missing_ok=True)
    return [segment for segment in maps if segment is not None]


def _reserve(path: Path, nbytes: int) -> int:
    """Create a file with all its pages; returns 0 or the system's error number."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        os.close(file)
    return 0


def _map(path: Path, nbytes: int) -> mmap.mmap | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return mmap.mmap(file, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(file)


def _gather(group: dist.ProcessGroup, value: Value) -> list[Value]:
    found = [value] * group.size()
    dist.all_gather_object(found, value, group=group)
    return found
