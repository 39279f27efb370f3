"""The sizes of decode steps that GPUs capture. No torch."""

from __future__ import annotations

from moe_runtime.config.engine import EngineConfig

# With few rows, a step waits for message latency, not for bandwidth. `all_gather` sends every row to every rank, but
# exchanges no counts first, so it needs one exchange of messages fewer than `all_to_all`.
ALL_GATHER_MAX_TOKENS = 64


def buckets_of(config: EngineConfig, num_ranks: int) -> tuple[int, ...]:
    """Rows of steps that GPUs capture: powers of two, and the maximum. Empty if the options forbid captures.

    With several ranks, the maximum is at most `ALL_GATHER_MAX_TOKENS`: as with `all_gather`, all ranks get all rows.
    """
    if config.enforce_eager or config.record_trace or config.dispatcher not in ("auto", "local", "all_gather"):
        return ()
    most = config.max_num_seqs if num_ranks == 1 else min(config.max_num_seqs, ALL_GATHER_MAX_TOKENS)
    return (*(1 << power for power in range((most - 1).bit_length())), most)
