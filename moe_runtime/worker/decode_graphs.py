"""Decode steps of fixed shapes, captured as CUDA graphs: nothing in them waits for the host.

If all ranks have only decode rows, the plan names a bucket, a number of rows. Every rank runs that number: its own rows
and padding, which uses no expert and writes its keys to a spare page. All values that depend on the step are in static
tensors, which are filled before the graph; tokens are sampled after it. A bucket has several graphs with different
longest contexts, so that short contexts do not pay for long ones. Attention sends nothing between ranks, so each rank
chooses its own graph.

Shape suffixes: T rows of a bucket, P rows of the largest bucket, D hidden, G page groups, M pages of a sequence, X
columns of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from moe_runtime.kernels import ops
from moe_runtime.kernels.attention import DecodeRows
from moe_runtime.layers.batch import Batch, BatchPages, StepPolicies
from moe_runtime.wire.messages import PADDED, ExpertWork
from moe_runtime.worker.rank_step import StepRows

WARM_UPS = 2  # to compile kernels and connect collectives
SHORTEST_CONTEXT = 4096
CONTEXT_FACTOR = 4

Run = Callable[[], None]


def context_sizes(longest: int) -> tuple[int, ...]:
    """The context lengths that graphs are captured for, up to `longest`."""
    sizes = [longest]
    size = SHORTEST_CONTEXT
    while size < longest:
        sizes.insert(-1, size)
        size *= CONTEXT_FACTOR
    return tuple(sizes)


class CudaCapture:
    """Captures calls into CUDA graphs that share memory: only one may run at a time. Capture the largest first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """A function that replays `run` with the tensors it has used."""
        here, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        replay: Run = graph.replay
        return replay


def capture_on(device: torch.device) -> Callable[[Run], Run] | None:
    """How steps are captured on a device; None if they are not captured: on CPUs, and without Triton."""
    return CudaCapture(device) if device.type == "cuda" and ops.uses_triton(device) else None


class DecodeGraphs:
    """Runs decode steps of a rank in buckets.

    Args:
        forward: hidden states `[T, D]` of token ids and a batch.
        buckets: numbers of rows, ascending.
        num_ranks: ranks that run each step.
        max_context: longest context of a sequence.
        block_size: tokens per page.
        spare_pages: the page of each page group that padding writes to.
        hidden_size, dtype, device: of the hidden states.
        capture: returns a function that repeats a call.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Batch], Tensor],
        buckets: Sequence[int],
        *,
        num_ranks: int,
        max_context: int,
        block_size: int,
        spare_pages: Sequence[int],
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        capture: Callable[[Run], Run],
    ) -> None:
        self._forward = forward
        self._num_ranks = num_ranks
        self._contexts = context_sizes(max_context)
        # A padding token attends only to itself, uses no expert and writes to the spare page.
        self._padding = {
            "token": 0,
            "position": 0,
            "num_prompt": 1,
            "live": 0,
        } | {f"cache_position {group}": page * block_size for group, page in enumerate(spare_pages)}
        most, num_groups, pinned = buckets[-1], len(spare_pages), device.type == "cuda"
        sizes = {"rows": (len(self._padding), most), "tables": (num_groups, most, -(-max_context // block_size))}
        self._on_host = {name: torch.zeros(size, dtype=torch.int64, pin_memory=pinned) for name, size in sizes.items()}
        self._rows_XP, self._table_GPM = (
            torch.zeros(size, dtype=torch.int64, device=device) for size in sizes.values()
        )
        self._sequence_P = torch.arange(most, device=device)
        self._out_PD = torch.zeros(most, hidden_size, dtype=dtype, device=device)
        self._copied = torch.cuda.Event() if pinned else None
        self._fill([], StepRows.take([], [], num_groups, block_size), most)
        free = _free_bytes(device)
        with torch.inference_mode():
            self._replays = {
                (bucket, context): capture(partial(self._run, bucket, context, None))
                for bucket in reversed(buckets)
                for context in reversed(self._contexts)
            }
        static = (self._rows_XP, self._table_GPM, self._sequence_P, self._out_PD)
        self.nbytes = sum(tensor.nbytes for tensor in static) + free - _free_bytes(device)

    def __call__(
        self, tokens: list[int], rows: StepRows, bucket: int, expert_work: list[ExpertWork] | None = None
    ) -> Tensor:
        """Hidden states of the rows, valid until the next call. All ranks call it for the same step and bucket.

        With `expert_work`, layers record their experts' work, so the step runs without a graph.
        """
        self._fill(tokens, rows, bucket)
        longest = max(rows.positions, default=0) + 1
        context = next(size for size in self._contexts if size >= longest)
        if expert_work is None:
            self._replays[bucket, context]()
        else:
            self._run(bucket, context, expert_work)
        return self._out_PD[: len(tokens)]

    def _fill(self, tokens: list[int], rows: StepRows, bucket: int) -> None:
        """Copy a step to the device; waits at most until the previous step's copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()
        num_rows = len(tokens)
        host_XP, table_GPM = self._on_host["rows"].numpy(), self._on_host["tables"].numpy()
        columns: dict[str, list[int] | int] = {
            "token": tokens,
            "position": rows.positions,
            "num_prompt": rows.num_prompt,
            "live": 1,
        }
        columns |= {f"cache_position {group}": where for group, where in enumerate(rows.cache_positions)}
        for row_P, (name, padding) in zip(host_XP, self._padding.items(), strict=True):
            row_P[:num_rows] = columns[name]
            row_P[num_rows:bucket] = padding
        for table_PM, pages_of_group in zip(table_GPM, rows.pages, strict=True):
            for row, pages in enumerate(pages_of_group):
                table_PM[row, : len(pages)] = pages
        self._rows_XP.copy_(self._on_host["rows"], non_blocking=True)
        for table_PM, host_PM in zip(self._table_GPM, self._on_host["tables"], strict=True):
            table_PM[:bucket].copy_(host_PM[:bucket], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _run(self, bucket: int, context: int, expert_work: list[ExpertWork] | None) -> None:
        token_T, position_T, num_prompt_T, live_T, *cache_positions = self._rows_XP[:, :bucket]
        batch = Batch(
            position_T=position_T,
            num_prompt_T=num_prompt_T,
            pages=[
                BatchPages(cache_position_T, DecodeRows(table_PM, self._sequence_P[:bucket], position_T, context))
                for cache_position_T, table_PM in zip(cache_positions, self._table_GPM, strict=True)
            ],
            num_decode=bucket,
            dispatcher=PADDED,
            tokens_per_rank=[bucket] * self._num_ranks,
            expert_work=expert_work,
            policies=StepPolicies(live_T=live_T > 0),
        )
        self._out_PD[:bucket] = self._forward(token_T, batch)


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
