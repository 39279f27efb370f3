"""All layers of a decoder in one native call that runs beside its caller; see `layers.h`.

Shape suffixes are those of `native`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from moe_runtime.kernels.cpu import structs
from moe_runtime.kernels.cpu.blocks import AttentionCall, DenseCall, LayerPolicies, SparseCall
from moe_runtime.kernels.cpu.latent import LatentCall
from moe_runtime.kernels.cpu.native import check_arrived
from moe_runtime.kernels.cpu.native_step import NativeStep, pointer
from moe_runtime.kernels.cpu.structs import KVPages


class Layers:
    """All layers of a decoder in one call.

    Args:
        blocks: attention and MLP of each layer, each with the norm after it. Either all sparse blocks have an
            exchange, or none has.
        caches: keys and values of each layer, from `kv_pages`.
        groups: which of a step's inputs to attention each layer takes.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[AttentionCall | LatentCall, SparseCall | DenseCall]],
        caches: Sequence[KVPages],
        groups: Sequence[int],
    ) -> None:
        assert all(part.next_norm is not None for layer in blocks for part in layer)
        self._keep = (list(blocks), list(caches))
        sparse = [mlp for _, mlp in blocks if isinstance(mlp, SparseCall)]
        self._top_k = [mlp.gate.top_k for mlp in sparse]
        self.num_experts = max((mlp.gate.num_experts for mlp in sparse), default=0)
        self._has_exchange = any(mlp.has_exchange for mlp in sparse)
        assert self._has_exchange == all(mlp.has_exchange for mlp in sparse)
        self.num_sparse = len(self._top_k)
        self._library = blocks[0][0].kernels.library
        self._dtype = blocks[0][0].dtype
        self._element = blocks[0][0].element
        self._layers = (structs.LayerStruct * len(blocks))(
            *(
                structs.LayerStruct(
                    attention=attention.address if isinstance(attention, AttentionCall) else None,
                    latent=attention.address if isinstance(attention, LatentCall) else None,
                    sparse=mlp.address if isinstance(mlp, SparseCall) else None,
                    dense=mlp.address if isinstance(mlp, DenseCall) else None,
                    pages=ctypes.addressof(pages),
                    group=group,
                )
                for (attention, mlp), pages, group in zip(blocks, caches, groups, strict=True)
            )
        )
        self._address = ctypes.addressof(self._layers)

    def begin(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        steps: Sequence[NativeStep],
        num_decode: int,
        policies: Sequence[LayerPolicies] = (),
        spread: structs.SpreadStep | None = None,
    ) -> RunningLayers:
        """Start on `x_TD`, the normed rows before and after, and `residual_TD`, the residual rows, both in place.

        `steps` has one entry for each group of layers, which differ in their pages only. `policies` has one entry for
        each sparse layer, or is empty. An exchange needs `spread`.
        """
        assert not policies or len(policies) == self.num_sparse
        asked = [each.struct(len(x_TD), top_k) for each, top_k in zip(policies, self._top_k, strict=False)]
        structure = (structs.PoliciesStruct * len(asked))(*asked) if asked else None
        assert x_TD.dtype == residual_TD.dtype == self._dtype and x_TD.shape == residual_TD.shape
        assert self._has_exchange == (spread is not None)
        for step in steps:
            assert x_TD.shape[0] == step.layout.tokens
        groups = (structs.GroupStep * len(steps))(
            *(structs.GroupStep(step.address, step.heads_address) for step in steps)
        )
        call = structs.LayersCall(
            element=self._element,
            layers=self._address,
            count=len(self._layers),
            policies=None if structure is None else ctypes.addressof(structure),
            spread=structs.address(spread),
            steps=ctypes.addressof(groups),
            num_decode=num_decode,
            residual=pointer(residual_TD),
            x=pointer(x_TD),
        )
        return RunningLayers(
            self._library, call, spread, keep=(self, x_TD, residual_TD, steps, groups, policies, structure)
        )


class RunningLayers:
    """A call that a pool worker runs, if one is awake. `wait` helps to finish it.

    Args:
        spread: the `SpreadStep` in `call`.
        keep: other objects that `call` points to.
    """

    def __init__(
        self, library: ctypes.CDLL, call: structs.LayersCall, spread: structs.SpreadStep | None, keep: object
    ) -> None:
        self._library = library
        self._spread = spread
        self._keep: object | None = (call, keep)  # None once all has run
        self._address = ctypes.addressof(call)
        library.moe_layers_begin(self._address)

    def wait(self) -> None:
        """Return when all layers have run.

        Raises:
            TimeoutError: a rank did not come to the exchange in time.
        """
        if self._keep is None:
            return
        late = self._library.moe_layers_end(self._address)
        self._keep = None
        if self._spread is not None:
            check_arrived(late, self._spread.timeout_ns)

    def __del__(self) -> None:
        # A caller that gives up the step must not free the memory in which it runs.
        if self._keep is not None:
            self._library.moe_layers_end(self._address)
