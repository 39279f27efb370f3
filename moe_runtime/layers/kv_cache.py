"""The paged key/value cache of one rank, and how large it may be.

Shape suffixes: N pages, B tokens per page, G key/value heads, d key size, e value size.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.config.attention import AnyAttention, LatentAttentionConfig
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.memory.budget import FREE_MEMORY_SHARE, available_host_memory, default_kv_bytes, num_cache_pages
from moe_runtime.system.pages import ask_for_huge_pages


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; the values may be a part of the keys."""

    k_NBGd: Tensor
    v_NBGe: Tensor


class KVCache:
    """Keys and values of all layers, in pages. Zeroed, so that masked reads past a sequence's end are finite.

    Args:
        num_pages: of each page group.
    """

    def __init__(
        self, config: ModelConfig, num_pages: Sequence[int], block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page_groups = config.page_groups
        counts = [num_pages[group] for group in config.page_groups]
        sizes = [
            count * block_size * layer.attention.kept_size for count, layer in zip(counts, config.layers, strict=True)
        ]
        self._kept = _zeros(sum(sizes), dtype, device)
        self._layers = [
            _layer_cache(layer.attention, kept, count, block_size)
            for layer, kept, count in zip(config.layers, self._kept.split(sizes), counts, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]


def _layer_cache(attention: AnyAttention, kept: Tensor, num_pages: int, block_size: int) -> LayerCache:
    shape = (num_pages, block_size, attention.num_kv_heads)
    if isinstance(attention, LatentAttentionConfig):
        keys = kept.view(*shape, attention.key_size)
        return LayerCache(keys, keys[..., : attention.value_size])
    keys, values = kept.view(2, *shape, attention.head_dim)
    return LayerCache(keys, values)


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On CPUs they are in huge pages, if available, which take no memory before their first use."""
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(pages, dtype=dtype)
    ask_for_huge_pages(tensor)
    return tensor


def choose_num_pages(
    engine: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, local_ranks: int
) -> tuple[int, ...]:
    """Pages of each page group that a rank reserves: the most that its sequences can use, within its memory limit.

    The limit is `kv_cache_memory_bytes` if given. Else it is half of the free memory, shared with the other ranks of
    the device or host, and on CPUs at most 4 GiB.

    Raises:
        ValueError: the memory does not hold one sequence of `max_model_len`.
    """
    if engine.kv_cache_memory_bytes is not None:
        memory = engine.kv_cache_memory_bytes
    elif device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(device)[0] * FREE_MEMORY_SHARE)
    else:
        memory = default_kv_bytes(available_host_memory(), local_ranks)
    return num_cache_pages(engine, model, dtype.itemsize, memory)
