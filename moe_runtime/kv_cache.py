"""The paged key/value cache of one rank, and how large it may be.

Shape suffixes: N pages (blocks), B tokens per page, G key/value heads, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_runtime.config import EngineConfig, ModelConfig

CPU_DEFAULT_BYTES = 4 << 30
FREE_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer."""

    k_NBGd: Tensor
    v_NBGd: Tensor


class KVCache:
    """Keys and values of all layers, in pages. Zeroed, so that masked reads past a sequence's end are finite."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.num_blocks = num_blocks
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self.keys[index], self.values[index])


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def choose_num_blocks(
    engine: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, local_ranks: int
) -> int:
    """Pages that a rank reserves: what its sequences can use at most, within the memory it may take.

    That memory is `kv_cache_memory_bytes` if given, else half of what is free, shared with the other ranks of the
    device or host, and on CPUs at most 4 GiB.

    Raises:
        ValueError: it does not hold one sequence of `max_model_len`.
    """
    page = block_bytes(model, engine.block_size, dtype)
    max_len = engine.max_model_len or model.max_model_len
    per_sequence = -(-max_len // engine.block_size)
    if engine.kv_cache_memory_bytes is not None:
        budget = engine.kv_cache_memory_bytes
    elif device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * FREE_MEMORY_SHARE)
    else:
        budget = min(int(available_host_memory() * FREE_MEMORY_SHARE) // local_ranks, CPU_DEFAULT_BYTES)
    num_blocks = min(engine.max_num_seqs * per_sequence, budget // page)
    if num_blocks < per_sequence:
        raise ValueError(
            f"kv_cache_memory_bytes: {budget} bytes a rank hold {num_blocks * engine.block_size} tokens, but "
            f"max_model_len is {max_len}; it takes {per_sequence * page} bytes, or a lower max_model_len"
        )
    return num_blocks


def available_host_memory() -> int:
    """Bytes that this process may still take: the host's free memory, within the limit of its control group."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)
