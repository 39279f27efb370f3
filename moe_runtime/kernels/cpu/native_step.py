"""What the attention of a step needs beside the model, as the native library takes it. Shapes are those of `native`."""

from __future__ import annotations

import ctypes
from array import array

import torch
from torch import Tensor

from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.cpu.structs import StepHeads, StepLayout
from moe_runtime.kernels.torch_ops import check_contiguous


def pointer(tensor: Tensor | None) -> int | None:
    """Where the data of a contiguous CPU tensor begin.

    Raises:
        ValueError: it is not contiguous.
    """
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        check_contiguous(operand=tensor)
    return tensor.data_ptr()


class NativeStep:
    """What one step's attention needs beside the model, held as the library takes it; built once per step.

    Args:
        meta: the step's sequences.
        cache_position_T: int64, where each token's key and value go; None where nothing is written.
        cos_Nr, sin_Nr: float32 angles; a row per token, or a table.
        rope_row_T: int64, the row of the table for each token; None if they have a row each.
        query_scale_T: float32, factor on each token's queries, in latent attention; None: no factor.
    """

    def __init__(
        self,
        meta: AttentionMetadata,
        cache_position_T: Tensor | None = None,
        cos_Nr: Tensor | None = None,
        sin_Nr: Tensor | None = None,
        rope_row_T: Tensor | None = None,
        query_scale_T: Tensor | None = None,
    ) -> None:
        for index in (cache_position_T, rope_row_T):
            assert index is None or (index.dtype == torch.int64 and len(index) == meta.num_tokens)
        for angle in (cos_Nr, sin_Nr, query_scale_T):
            assert angle is None or angle.dtype == torch.float32
        num_seqs = len(meta.context_len)
        ints = array("q", meta.query_start + meta.context_len)  # a tensor takes longer than all the rest of this
        table = meta.page_table.contiguous()
        start, _ = ints.buffer_info()
        self.layout = StepLayout(
            num_seqs, meta.num_tokens, table.shape[1], start, start + 8 * (num_seqs + 1), table.data_ptr()
        )
        self.address = ctypes.addressof(self.layout)
        rotated = 0 if cos_Nr is None else cos_Nr.shape[1]
        self.heads = StepHeads(
            rotated=rotated,
            cos=pointer(cos_Nr),
            sin=pointer(sin_Nr),
            rope_row=pointer(rope_row_T),
            cache_position=pointer(cache_position_T),
            query_scale=pointer(query_scale_T),
        )
        self.heads_address = ctypes.addressof(self.heads)
        self._keep = (ints, table, cache_position_T, cos_Nr, sin_Nr, rope_row_T, query_scale_T)
