"""The parts of a decoder in torch, on any device; `layers.native_layers` has the same on the native CPU kernels.

`layers.torch_kit` makes them. Parts are plain callable objects that hold tensors; a step's data are arguments.

Shape suffixes: T tokens, D hidden, H query heads, G key/value heads, d head dim, r rotary dims, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from moe_runtime.config.model import AttentionConfig
from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels import ops
from moe_runtime.kernels.attention import DecodeRows
from moe_runtime.kernels.forms import USUAL, Forms
from moe_runtime.layers.batch import Batch
from moe_runtime.layers.kit import MLP, Norm
from moe_runtime.layers.kv_cache import LayerCache


class TorchLinear:
    """`x @ weight.T + bias` with the weight `[outputs, inputs]`, whose rows are put in piece by piece."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, forms: Forms = USUAL) -> None:
        self.weight = weight
        self.bias = bias
        self.forms = forms

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def put(self, first_row: int, weight_ND: Tensor) -> None:
        """Fill the outputs from `first_row` on."""
        self.weight[first_row : first_row + len(weight_ND)] = weight_ND

    def __call__(self, x: Tensor) -> Tensor:
        return self.forms.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class RMSNorm:
    """See `ops.rms_norm`."""

    weight_D: Tensor
    eps: float

    def __call__(self, x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, self.weight_D, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `residual + x`, and that sum."""
        return ops.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps)


class TorchMLP:
    """SwiGLU: `down(silu(gate(x)) * up(x))`, gate and up in one product; see `layers.kit.MLP`."""

    def __init__(self, gate_up: TorchLinear, down: TorchLinear) -> None:
        self.gate_up = gate_up
        self.down = down

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def put(self, slot: int, part: ExpertPart, first_row: int, rows: Tensor) -> None:
        """Copy rows of a weight."""
        assert slot == 0
        if part == "down":
            self.down.put(first_row, rows)
        else:
            self.gate_up.put(first_row + (self.down.weight.shape[1] if part == "up" else 0), rows)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.down(ops.silu_mul(self.gate_up(x_TD)))


class TorchDenseBlock:
    """An MLP and the norm after it."""

    def __init__(self, mlp: MLP, next_norm: Norm) -> None:
        self.mlp = mlp
        self.next_norm = next_norm

    @property
    def nbytes(self) -> int:
        return self.mlp.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.next_norm.add(self.mlp(x_TD), residual_TD)


@dataclass(frozen=True)
class AttentionStep:
    """A step's inputs to attention: angles in the model's dtype, cache positions, pages."""

    cos_Tr: Tensor
    sin_Tr: Tensor
    cache_position_T: Tensor
    metadata: ops.AttentionMetadata | DecodeRows


class TorchAttention:
    """Grouped-query attention over the paged cache, with optional norms on queries and keys.

    Args:
        config: of the layer.
        eps: of the norms on queries and keys.
        qkv: projection to `(H + 2 G) * d`; query rows, key rows, value rows.
        output: output projection.
        q_norm, k_norm: weights `[d]`, or None.
        next_norm: the norm after it.
        forms: of the attention itself.
    """

    def __init__(
        self,
        config: AttentionConfig,
        eps: float,
        qkv: TorchLinear,
        output: TorchLinear,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        next_norm: Norm,
        forms: Forms,
    ) -> None:
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.eps = eps
        self.sliding_window = config.sliding_window
        self.qkv = qkv
        self.output = output
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.next_norm = next_norm
        self.forms = forms

    @property
    def nbytes(self) -> int:
        return self.qkv.nbytes + self.output.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: object, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Attend from each token to its sequence so far; first writes the tokens' keys and values into the cache."""
        assert isinstance(step, AttentionStep)
        heads = self.qkv(x_TD).view(x_TD.shape[0], sum(self.heads), self.head_dim)
        q_THd, k_TGd, v_TGd = heads.split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THd = ops.rms_norm(q_THd, self.q_norm, self.eps)
            k_TGd = ops.rms_norm(k_TGd, self.k_norm, self.eps)
        pages = (cache.k_NBGd, cache.v_NBGd)
        q_THd = ops.rotary_store_kv(q_THd, k_TGd, v_TGd, step.cos_Tr, step.sin_Tr, *pages, step.cache_position_T)
        out_THd = self._attend(q_THd, *pages, step.metadata)
        return self.next_norm.add(self.output(out_THd.flatten(1)), residual_TD)

    def _attend(
        self, q_THd: Tensor, k_NBGd: Tensor, v_NBGd: Tensor, meta: ops.AttentionMetadata | DecodeRows
    ) -> Tensor:
        scale, window = self.head_dim**-0.5, self.sliding_window
        if isinstance(meta, DecodeRows):
            where = (meta.page_table, meta.sequence_T, meta.position_T)
            return ops.decode_attention(
                q_THd, k_NBGd, v_NBGd, *where, max_context=meta.max_context, scale=scale, sliding_window=window
            )
        return self.forms.paged_attention(q_THd, k_NBGd, v_NBGd, meta, scale=scale, sliding_window=window)


class TorchEmbedding:
    """Rows of a weight `[V, D]` by token id."""

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight_VD = weight_VD

    @property
    def nbytes(self) -> int:
        return self.weight_VD.nbytes

    def __call__(self, token_T: Tensor) -> Tensor:
        return F.embedding(token_T, self.weight_VD)


class TorchHead:
    """Logits in float32, computed and rounded in the model's dtype."""

    def __init__(self, linear: TorchLinear) -> None:
        self.linear = linear

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def tied_embedding(self) -> TorchEmbedding:
        """The embedding that shares this head's weight."""
        return TorchEmbedding(self.linear.weight)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.linear(x_TD).float()
