"""How a checkpoint's quantised matrices are held: as they are stored, where all matrices of a part agree. No torch.

The matrices of `BlockFormats.input` are one part, those of `output` another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from moe_runtime.config.model import LayerConfig, LayerFormats, ModelConfig
from moe_runtime.models.names import SwiGLUNames, TensorNames
from moe_runtime.types.weight_format import DENSE, BlockFormats, WeightFormat

logger = logging.getLogger(__name__)

FormatOf = Callable[[str], WeightFormat | None]


def with_stored_formats(model: ModelConfig, names: TensorNames, format_of: FormatOf) -> ModelConfig:
    """The configuration with the formats in which the parts of its layers are stored.

    A part whose matrices are stored in different formats is held in the model's dtype; a log line names it.

    Args:
        format_of: a matrix's format by its name in a checkpoint of the family, None if it is not quantised.
    """
    reader = _Reader(model, names, format_of)
    layers = tuple(
        replace(layer, formats=reader.layer(layer, names.layer.format(index)))
        for index, layer in enumerate(model.layers)
    )
    if reader.mixed:
        logger.warning(
            "quantization: %d parts are held in the model's dtype, because their matrices are stored in different "
            "formats, the first %s",
            len(reader.mixed),
            reader.mixed[0],
        )
    head = None if model.tie_word_embeddings else format_of(names.head)
    return replace(model, layers=layers, head_format=head)


class _Reader:
    """Attributes: `mixed`, the names of parts whose matrices have different formats."""

    def __init__(self, model: ModelConfig, names: TensorNames, format_of: FormatOf) -> None:
        self.model, self.names, self.format_of = model, names, format_of
        self.mixed: list[str] = []

    def layer(self, layer: LayerConfig, prefix: str) -> LayerFormats:
        """The formats of a layer whose tensors' names begin with `prefix`."""
        names, has_shared = self.names, self.model.moe.shared_intermediate_size > 0
        projections = names.projections(layer.attention, self.model.hidden_size)
        *inputs, output = (f"{prefix}.{part}.weight" for part, _, _ in projections)
        attention = self._block(inputs, [output])
        if not layer.is_sparse:
            return LayerFormats(attention, self._swiglu(f"{prefix}.{names.dense}", names.dense_parts))
        shared = self._swiglu(f"{prefix}.{names.shared}", names.shared_parts) if has_shared else DENSE
        return LayerFormats(attention, shared, self._experts(prefix))

    def _experts(self, prefix: str) -> BlockFormats:
        """Of all experts, stored one by one or in one tensor, under the family's name or the usual one."""
        names = self.names
        places: list[tuple[list[str], list[str]]] = []  # gate and up, down
        if names.fused_gate_up:
            places.append(([f"{prefix}.{names.fused_gate_up}"], [f"{prefix}.{names.fused_down}"]))
        for block in dict.fromkeys((f"{prefix}.{names.sparse}", f"{prefix}.{names.dense}")):
            fused, single = f"{block}.experts", f"{block}.{names.expert}"
            places += [([f"{fused}.gate_up_proj{end}"], [f"{fused}.down_proj{end}"]) for end in ("", ".weight")]
            experts = [single.format(expert) for expert in range(self.model.moe.num_experts)]
            places.append(_matrices(experts, names.expert_parts))
        return next((found for place in places if any((found := self._block(*place)).all)), DENSE)

    def _swiglu(self, prefix: str, parts: SwiGLUNames) -> BlockFormats:
        return self._block(*_matrices([prefix], parts))

    def _block(self, inputs: Iterable[str], outputs: Iterable[str]) -> BlockFormats:
        return BlockFormats(self._common(inputs), self._common(outputs))

    def _common(self, names: Iterable[str]) -> WeightFormat | None:
        listed = list(names)
        found = {self.format_of(name) for name in listed}
        if len(found) > 1:
            self.mixed.append(listed[0])
        return found.pop() if len(found) == 1 else None


def _matrices(prefixes: Iterable[str], parts: SwiGLUNames) -> tuple[list[str], list[str]]:
    """Names of the gate and up projections of the SwiGLUs under some prefixes, and of their down projections."""
    listed = list(prefixes)
    gate_up = [f"{prefix}.{part}.weight" for prefix in listed for part in parts.up_matrices]
    return gate_up, [f"{prefix}.{parts.down}.weight" for prefix in listed]
