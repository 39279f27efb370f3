"""The parts of a decoder in torch, on any device, but for attention (`layers.torch_attention`); `layers.native_layers`
has the same on the native CPU kernels.

`layers.torch_kit` makes them. Parts are plain callable objects that hold tensors; a step's data are arguments.

Shape suffixes: T tokens, D hidden, V vocabulary, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels import ops
from moe_runtime.kernels.forms import USUAL, Forms
from moe_runtime.kernels.quantized_slots import Matrix, put_rows
from moe_runtime.layers.batch import Batch
from moe_runtime.layers.kit import MLP, Norm


class TorchLinear:
    """`x @ weight.T + bias` with the weight `[outputs, inputs]`, whose rows are put in piece by piece."""

    def __init__(self, weight: Matrix, bias: Tensor | None = None, forms: Forms = USUAL) -> None:
        self.weight = weight
        self.bias = bias
        self.forms = forms

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def put(self, first_row: int, weight_ND: Matrix) -> None:
        """Fill the outputs from `first_row` on, in the weight's format."""
        put_rows(self.weight, first_row, weight_ND)

    def __call__(self, x: Tensor) -> Tensor:
        return self.forms.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class RMSNorm:
    """See `ops.rms_norm`."""

    weight_D: Tensor
    eps: float
    residual_multiplier: float = 1.0

    def __call__(self, x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, self.weight_D, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps, self.residual_multiplier)


class TorchMLP:
    """SwiGLU: `down(silu(gate(x)) * up(x))`, gate and up in one product; see `layers.kit.MLP`.

    Args:
        gate_D: see `layers.kit.Kit.mlp`.
    """

    def __init__(self, gate_up: TorchLinear, down: TorchLinear, gate_D: Tensor | None = None) -> None:
        self.gate_up = gate_up
        self.down = down
        self.gate_D = gate_D

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes + (0 if self.gate_D is None else self.gate_D.nbytes)

    def put(self, slot: int, part: ExpertPart, first_row: int, rows: Matrix) -> None:
        """Copy rows of a weight."""
        assert slot == 0 and part in ("gate", "up", "down"), part
        if part == "down":
            self.down.put(first_row, rows)
        else:
            self.gate_up.put(first_row + (len(self.gate_up.weight) // 2 if part == "up" else 0), rows)

    def __call__(self, x_TD: Tensor) -> Tensor:
        out_TD = self.down(ops.silu_mul(self.gate_up(x_TD)))
        return out_TD if self.gate_D is None else ops.scale_rows(out_TD, x_TD, self.gate_D)


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
        """The embedding that shares this head's weight, which must be dense."""
        assert isinstance(self.linear.weight, Tensor), "a quantised head shares no weight"
        return TorchEmbedding(self.linear.weight)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.linear(x_TD).float()
