"""The sizes of decode steps that GPUs capture. No torch."""

from __future__ import annotations

from moe_runtime.config.engine import EngineConfig

# With few rows a step waits for messages, not for bytes. `all_gather` sends every row to every rank, but needs no
# exchange of counts first, and so one round of messages less than `all_to_all`.
ALL_GATHER_MAX_TOKENS = 64


def buckets_of(config: EngineConfig, num_ranks: int) -> tuple[int, ...]:
    """Rows of steps that GPUs capture: powers of two, and the most there may be; none where the options forbid it.

    With several ranks, as with `all_gather`, at most `ALL_GATHER_MAX_TOKENS`: all ranks get all rows.
    """
    if config.enforce_eager or config.record_trace or config.dispatcher not in ("auto", "local", "all_gather"):
        return ()
    most = config.max_num_seqs if num_ranks == 1 else min(config.max_num_seqs, ALL_GATHER_MAX_TOKENS)
    return (*(1 << power for power in range((most - 1).bit_length())), most)
