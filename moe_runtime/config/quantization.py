"""Quantising weights while they are loaded: which matrices, and into which format. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from moe_runtime.config.model import LayerFormats, ModelConfig
from moe_runtime.types.weight_format import DENSE, BlockFormats, Code, Scale, WeightFormat

# Scales in bfloat16 lose nothing: codes are chosen for the scale as it is stored.
METHODS = {
    "int8": WeightFormat(Code.INT8, Scale.BFLOAT16, 128),
    "int4": WeightFormat(Code.INT4, Scale.BFLOAT16, 32),
    "fp8": WeightFormat(Code.FP8, Scale.BFLOAT16, 128),
    "mxfp4": WeightFormat(Code.FP4, Scale.E8M0, 32),
}
PARTS = ("experts", "attention", "head")
GROUP_SIZES = (16, 32, 64, 128, 256)


def parse_parts(value: object) -> tuple[str, ...]:
    """The parts in a text such as "experts,head".

    Raises:
        ValueError: there is none, or one is unknown.
    """
    parts = tuple(value.split(",")) if isinstance(value, str) else ()
    if not parts or not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
        raise ValueError(
            f"quantization_parts: {value!r} is not allowed; it must be some of {','.join(PARTS)}, with commas between"
        )
    return parts


def check_quantization(method: object, parts: object, group_size: object) -> None:
    """Check the engine's options `quantization`, `quantization_parts` and `quantization_group_size`.

    Raises:
        ValueError: a value is not allowed.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"quantization: {method!r} is not allowed; it must be one of {list(METHODS)}")
    if method is None:
        for name, value in (("parts", None if parts == ",".join(PARTS) else parts), ("group_size", group_size)):
            if value is not None:
                raise ValueError(f"quantization_{name}: {value!r} is not allowed without quantization")
    parse_parts(parts)
    if group_size is None:
        return
    if group_size not in GROUP_SIZES or type(group_size) is not int:
        raise ValueError(
            f"quantization_group_size: {group_size!r} is not allowed; it must be one of {list(GROUP_SIZES)}"
        )
    if method == "mxfp4" and group_size != METHODS["mxfp4"].group:
        raise ValueError(f"quantization_group_size: {group_size} is not allowed with mxfp4; it must be 32")


def check_activations(model: ModelConfig, activations: str | None) -> None:
    """Raise ValueError if rows are to be rounded, but no matrix of the model is multiplied with such rows."""
    formats = [format for layer in model.layers for format in layer.formats.all] + [model.head_format]
    if activations is not None and not any(format and format.code is not Code.FP8 for format in formats):
        raise ValueError(
            f"activation_quantization: {activations!r} is not allowed without weights in int8, int4 or fp4; "
            f"the model has {model.formats}"
        )


def group_that_divides(method: str, group_size: int | None, inputs: Collection[int]) -> int:
    """The inputs that share a scale where they must divide the inputs of all matrices, as in compressed-tensors.

    Args:
        group_size: what was asked for; None takes the largest that divides them, and is not above the method's own.
        inputs: of the matrices.

    Raises:
        ValueError: it does not divide them, or none does.
    """
    own = METHODS[method].group
    assert own is not None
    allowed = (own,) if method == "mxfp4" else GROUP_SIZES
    dividing = [size for size in allowed if not any(count % size for count in inputs)]
    fitting = [size for size in dividing if size <= own] if group_size is None else dividing
    if not fitting or group_size not in (None, *dividing):
        raise ValueError(
            f"quantization_group_size: {own if group_size is None else group_size} is not allowed for this model; "
            f"groups must divide the inputs of all matrices, which are {sorted(inputs)}"
            + (f"; it must be one of {dividing}" if dividing else f", and none of {list(allowed)} does")
        )
    return group_size or max(fitting)


def quantized(model: ModelConfig, method: str | None, parts: str, group_size: int | None) -> ModelConfig:
    """The configuration of a model whose weights are quantised while they are loaded.

    Args:
        method: a name in `METHODS`; None changes nothing.
        parts: which matrices, as in "experts,attention,head". Dense MLPs and shared experts belong to the experts.
        group_size: inputs that share a scale; None takes the method's own.

    Raises:
        ValueError: weights of the checkpoint are quantised already.
    """
    if method is None:
        return model
    if stored := next((format for layer in model.layers for format in layer.formats.all if format), model.head_format):
        raise ValueError(
            f"quantization: {method!r} is not allowed; the checkpoint is quantised already ({stored.name}), "
            "and twice would lose twice"
        )
    format, chosen = METHODS[method], parse_parts(parts)
    if group_size is not None:
        format = replace(format, group=group_size)
    held = BlockFormats(format, format)
    experts, attention = (held if part in chosen else DENSE for part in ("experts", "attention"))
    layers = tuple(
        replace(layer, formats=LayerFormats(attention, experts, experts if layer.is_sparse else DENSE))
        for layer in model.layers
    )
    return replace(model, layers=layers, head_format=format if "head" in chosen else None)
