"""The parts of a decoder on the native CPU kernels; `layers.torch_layers` has the same in torch.

`layers.native_kit` makes them. Blocks add to the residual rows in place.

Shape suffixes: T tokens, D hidden, E logical experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher
from moe_runtime.all2all.symmetric import SymmetricDispatcher
from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels.cpu.blocks import (
    AttentionCall,
    DenseCall,
    GateCall,
    LayerPolicies,
    NextNorm,
    SparseCall,
)
from moe_runtime.kernels.cpu.latent import LatentCall
from moe_runtime.kernels.cpu.layers import Layers
from moe_runtime.kernels.cpu.native import Kernels
from moe_runtime.kernels.cpu.native_step import NativeStep
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear
from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.layers.batch import Batch, StepPolicies
from moe_runtime.layers.decoder import LayerLoop
from moe_runtime.layers.kit import HiddenRows
from moe_runtime.layers.kv_cache import LayerCache
from moe_runtime.layers.moe import MoELayer, part_size
from moe_runtime.layers.sparse_form import SparseForm


@dataclass(frozen=True)
class NativeNorm:
    """See `ops.rms_norm`."""

    kernels: Kernels
    weight_D: Tensor
    eps: float
    residual_multiplier: float = 1.0

    @property
    def after(self) -> NextNorm:
        """The norm in the form that blocks take."""
        return NextNorm(self.weight_D, self.eps, self.residual_multiplier)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.kernels.rms_norm(x_TD, self.weight_D, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """See `layers.kit.Norm`."""
        return self.kernels.add_rms_norm(
            x_TD, residual_TD, self.weight_D, self.eps, self.residual_multiplier, in_place=True
        )


class NativeAttention:
    """See `TorchAttention`."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call

    @property
    def nbytes(self) -> int:
        return self.call.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: object, cache: LayerCache) -> tuple[Tensor, Tensor]:
        assert isinstance(step, NativeStep)
        rows = self.call(x_TD, step, cache.k_NBGd, cache.v_NBGe, residual_TD, kv_scales=cache.scales, in_place=True)
        return rows, residual_TD


class NativeLatentAttention:
    """See `TorchLatentAttention`."""

    def __init__(self, call: LatentCall) -> None:
        self.call = call

    @property
    def nbytes(self) -> int:
        return self.call.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: object, cache: LayerCache) -> tuple[Tensor, Tensor]:
        assert isinstance(step, NativeStep)
        rows = self.call(x_TD, step, cache.k_NBGd, residual_TD, kv_scales=cache.scales, in_place=True)
        return rows, residual_TD


class NativeMLP:
    """SwiGLU; its weights are put in like those of an expert in slot 0."""

    def __init__(self, experts: PackedExperts) -> None:
        self.experts = experts
        self._call = DenseCall(experts)

    @property
    def nbytes(self) -> int:
        return self.experts.nbytes

    def put(self, slot: int, part: ExpertPart, first_row: int, rows: Tensor | QuantizedMatrix) -> None:
        """Pack rows of a weight."""
        self.experts.put(slot, part, first_row, rows)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._call(x_TD)


class NativeDenseBlock:
    """An MLP and the norm after it, in one call."""

    def __init__(self, mlp: NativeMLP, next_norm: NativeNorm) -> None:
        self.mlp = mlp
        self.call = DenseCall(mlp.experts, next_norm.after)

    @property
    def nbytes(self) -> int:
        return self.mlp.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.call(x_TD, residual_TD), residual_TD


class NativeGate:
    """See `TorchGate`."""

    def __init__(self, call: GateCall, layer: int) -> None:
        self.call = call
        self.layer = layer

    @property
    def nbytes(self) -> int:
        return self.call.nbytes

    def __call__(
        self, x_TD: Tensor, num_decode: int, policies: StepPolicies | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.call(x_TD, num_decode, _of_layer(policies, self.layer))


def _of_layer(policies: StepPolicies | None, layer: int) -> LayerPolicies:
    if policies is None:
        return LayerPolicies()
    policies_LP4, chosen_LTK = policies.policies_LP4, policies.chosen_LTK
    return LayerPolicies(
        policies.policy_T,
        None if policies_LP4 is None else policies_LP4[layer],
        None if chosen_LTK is None else chosen_LTK[layer],
    )


class NativeSparseBlock:
    """The sparse block of a rank that holds all experts, and the norm after it, in one call."""

    def __init__(self, call: SparseCall, gate: NativeGate) -> None:
        self.call = call
        self.gate = gate
        self.experts = call.experts

    @property
    def nbytes(self) -> int:
        parts = (self.call.gate, self.call.experts, self.call.shared)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.dispatcher == "local"
        policies = _of_layer(batch.policies, self.gate.layer)
        return self.call(x_TD, batch.num_decode, residual_TD, policies), residual_TD

    def use_replicas(self, expert: int, slots: list[int]) -> None:
        raise AssertionError("a rank that holds all experts has no replicas")


class NativeMoELayer(MoELayer):
    """A sparse block whose rows go through shared memory, and the norm after it; `call` does the same in one call."""

    def __init__(
        self,
        gate: NativeGate,
        slot_E: Tensor,
        experts: PackedExperts,
        shared: NativeMLP | None,
        next_norm: NativeNorm,
        dispatchers: Mapping[str, Dispatcher],
    ) -> None:
        super().__init__(gate, slot_E, experts, shared, next_norm, dispatchers)
        dispatcher = dispatchers["symmetric"]
        assert isinstance(dispatcher, SymmetricDispatcher)
        shared_experts = None if shared is None else shared.experts
        slot_EP = self.slot_EP[:-1]  # which `use_replicas` changes
        self.call = SparseCall(gate.call, slot_EP, experts, shared_experts, next_norm.after, dispatcher.exchange)
        self.symmetric = dispatcher


class FusedLayers:
    """All layers in one call, if this rank has all experts or rows go through shared memory; see `kit.LayerRunner`.

    Args:
        layers: the call.
        form: of its sparse blocks, `WHOLE` or `EXCHANGE`; see `layers.sparse_form`.
        symmetric: the exchange of the layers, or None.
        loop: runs the layers in steps whose sparse blocks run in parts.
    """

    def __init__(
        self, layers: Layers, form: SparseForm, symmetric: SymmetricDispatcher | None, loop: LayerLoop
    ) -> None:
        self._layers = layers
        self._form = form
        self._symmetric = symmetric
        self._loop = loop

    def begin(self, x_TD: Tensor, residual_TD: Tensor, steps: Sequence[NativeStep], batch: Batch) -> HiddenRows:
        if self._form.in_step(batch) is SparseForm.PARTS:
            return self._loop.begin(x_TD, residual_TD, steps, batch)
        spread = None
        if self._symmetric is not None:
            tokens_per_rank = batch.tokens_per_rank
            size = part_size(tokens_per_rank, self._layers.num_experts, self._symmetric.top_k)
            spread = self._symmetric.step(tokens_per_rank, size)
        policies = batch.policies and [_of_layer(batch.policies, layer) for layer in range(self._layers.num_sparse)]
        running = self._layers.begin(x_TD, residual_TD, steps, batch.num_decode, policies or (), spread)

        def rows() -> Tensor:
            running.wait()
            return x_TD

        return rows


class NativeHead:
    """Logits in float32, never rounded to the model's dtype."""

    def __init__(self, linear: PackedLinear) -> None:
        self.linear = linear

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def tied_embedding(self) -> NativeEmbedding:
        """The embedding that shares this head's weight."""
        return NativeEmbedding(self.linear)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.linear(x_TD, float32=True)


class NativeEmbedding:
    """Rows of a packed weight `[V, D]` by token id."""

    def __init__(self, linear: PackedLinear) -> None:
        self.linear = linear

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def __call__(self, token_T: Tensor) -> Tensor:
        return self.linear.take_rows(token_T)
