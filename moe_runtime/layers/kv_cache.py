"""The paged key/value cache of one rank, and how large it may be.

A page of rows of 8 bits is one block in each layer: codes of keys, codes of values, scales of keys, scales of values.
In latent attention, it has codes and scales of keys only, whose fronts are the values.

Shape suffixes: N pages, B tokens per page, G key/value heads, d key size, e value size, X bytes of a page, P parts of
a layer: its keys and its values, or one part with both.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.config.attention import SCALE_BYTES, AnyAttention, LatentAttentionConfig
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.kernels.kv_rows import DTYPES, KVScales
from moe_runtime.memory.budget import FREE_MEMORY_SHARE, available_host_memory, default_kv_bytes, num_cache_pages
from moe_runtime.system.pages import ask_for_huge_pages
from moe_runtime.wire.messages import PageCopy


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; the values may be a part of the keys. `scales` are those of rows of 8 bits."""

    k_NBGd: Tensor
    v_NBGe: Tensor
    scales: KVScales | None = None


class KVCache:
    """Keys and values of all layers, in pages. Zeroed, so that masked reads past a sequence's end are finite.

    Args:
        num_pages: of each page group.
        dtype: of rows, a key of `attention.KV_ITEMSIZE`.
    """

    def __init__(
        self, config: ModelConfig, num_pages: Sequence[int], block_size: int, dtype: str, device: torch.device
    ) -> None:
        self.page_groups = config.page_groups
        counts = [num_pages[group] for group in config.page_groups]
        specs = config.kv_specs(dtype)
        sizes = [count * block_size * spec.bytes_per_token for count, spec in zip(counts, specs, strict=True)]
        self._kept = _zeros(sum(sizes), device)
        make = _quantized_layer if dtype in DTYPES else _plain_layer
        self._layers = [
            make(layer.attention, kept, count, block_size, dtype)
            for layer, kept, count in zip(config.layers, self._kept.split(sizes), counts, strict=True)
        ]
        self._bytes_PNX = [
            kept.view(1 if dtype in DTYPES or isinstance(layer.attention, LatentAttentionConfig) else 2, count, -1)
            for layer, kept, count in zip(config.layers, self._kept.split(sizes), counts, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy pages of a page group in all its layers, as if all sources were read before any target is written."""
        for group in {copy.group for copy in copies}:
            pairs = [(copy.source, copy.target) for copy in copies if copy.group == group]
            sources, targets = torch.tensor(pairs, device=self._kept.device).unbind(1)
            for own, bytes_PNX in zip(self.page_groups, self._bytes_PNX, strict=True):
                if own == group:
                    bytes_PNX[:, targets] = bytes_PNX[:, sources]


def _plain_layer(attention: AnyAttention, kept: Tensor, num_pages: int, block_size: int, dtype: str) -> LayerCache:
    shape = (num_pages, block_size, attention.num_kv_heads)
    kept = kept.view(getattr(torch, dtype))
    if isinstance(attention, LatentAttentionConfig):
        keys = kept.view(*shape, attention.key_size)
        return LayerCache(keys, keys[..., : attention.value_size])
    keys, values = kept.view(2, *shape, attention.head_dim)
    return LayerCache(keys, values)


def _quantized_layer(attention: AnyAttention, kept: Tensor, num_pages: int, block_size: int, dtype: str) -> LayerCache:
    heads = attention.num_kv_heads
    pages_NX, rows = kept.view(num_pages, -1), block_size * heads

    def shaped(part_NX: Tensor, dtype: torch.dtype, size: int) -> Tensor:
        return part_NX.view(dtype).view(num_pages, block_size, heads, size)

    key_size, value_size = attention.key_size, attention.value_size
    if isinstance(attention, LatentAttentionConfig):
        codes, scales = pages_NX.split((rows * key_size, rows * 2 * SCALE_BYTES), dim=1)
        keys, scale = shaped(codes, DTYPES[dtype], key_size), shaped(scales, torch.float32, 2)
        return LayerCache(keys, keys[..., :value_size], KVScales(scale, scale[..., :1]))
    sizes = (rows * key_size, rows * value_size, rows * SCALE_BYTES, rows * SCALE_BYTES)
    k_codes, v_codes, k_scales, v_scales = pages_NX.split(sizes, dim=1)
    return LayerCache(
        shaped(k_codes, DTYPES[dtype], key_size),
        shaped(v_codes, DTYPES[dtype], value_size),
        KVScales(shaped(k_scales, torch.float32, 1), shaped(v_scales, torch.float32, 1)),
    )


def _zeros(nbytes: int, device: torch.device) -> Tensor:
    """Zeros, uint8. On CPUs they are in huge pages, if available, which take no memory before their first use."""
    if device.type != "cpu":
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    ask_for_huge_pages(tensor)
    return tensor


def choose_num_pages(
    engine: EngineConfig, model: ModelConfig, dtype: str, device: torch.device, local_ranks: int
) -> tuple[int, ...]:
    """Pages of each page group that a rank reserves: the most that its sequences can use, within its memory limit.

    The limit is `kv_cache_memory_bytes` if given. Else it is half of the free memory, shared with the other ranks of
    the device or host, and on CPUs at most 4 GiB. `dtype` is that of the cache's rows.

    Raises:
        ValueError: the memory does not hold one sequence of `max_model_len`.
    """
    if engine.kv_cache_memory_bytes is not None:
        memory = engine.kv_cache_memory_bytes
    elif device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(device)[0] * FREE_MEMORY_SHARE)
    else:
        memory = default_kv_bytes(available_host_memory(), local_ranks)
    return num_cache_pages(engine, model, dtype, memory)
