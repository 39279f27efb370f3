"""Settings of compressed-tensors (llm-compressor): groups of modules, each stored in a way of its own. No torch."""

from __future__ import annotations

from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.quantization_settings import EVERY, INTEGERS, bits, block_size, group_size, targets
from moe_runtime.types.weight_format import Code, Scale, WeightFormat
from moe_runtime.weights.scheme import MXFP4, MXFP8, NVFP4, Layout, Rule, Scheme, Storage

PACKED = "weight_packed"
ANY_SCALES = ("tensor", "channel", "group", "block")
# Strategies, bits and type of the codes.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[int, ...], str]] = {
    "pack-quantized": (("channel", "group"), (4, 8), "int"),
    "float-quantized": (ANY_SCALES, (8,), "float"),
    "int-quantized": (ANY_SCALES, (8,), "int"),
    "nvfp4-pack-quantized": (("tensor_group",), (4,), "float"),
    "mxfp4-pack-quantized": (("group",), (4,), "float"),
    "mxfp8-quantized": (("group",), (8,), "float"),
}
OF_ONE_GROUP = {
    "nvfp4-pack-quantized": Storage(Layout.NVFP4_DIVIDED, NVFP4, PACKED),
    "mxfp4-pack-quantized": Storage(Layout.MXFP4, MXFP4, PACKED),
    "mxfp8-quantized": Storage(Layout.SCALED, MXFP8),
}
SCALES = {"float32": Scale.FLOAT32, "float16": Scale.FLOAT16, "bfloat16": Scale.BFLOAT16}


def compressed_tensors(hf: HFConfig, dtype: str) -> Scheme:
    """The scheme of settings; `dtype` is the model's."""
    for name in ("sparsity_config", "transform_config"):
        value = hf.get(name)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise hf.refusal(name, value, "absent")
    groups = hf.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise hf.refusal("config_groups", groups, "an object of objects")
    rules = []
    for name, settings in groups.items():
        group = HFConfig(settings, hf.family, f"config_groups.{name} of {hf.where}")
        rules.append(targets(group, "targets", _storage(group, group.get("format") or hf.get("format"), dtype)))
    # A module's name counts more than a pattern, and a pattern more than the class.
    named = [Rule(rule.storage, rule.names) for rule in rules]
    by_pattern = [Rule(rule.storage, patterns=tuple(filter(None, rule.patterns))) for rule in rules]
    by_class = [Rule(rule.storage, patterns=EVERY) for rule in rules if "" in rule.patterns]
    return Scheme((targets(hf, "ignore", None), *named, *by_pattern, *by_class))


def _storage(group: HFConfig, format: object, dtype: str) -> Storage | None:
    """How the weights of a group are stored; None: they are not quantised."""
    settings = group.get("weights")
    if settings is None or format == "dense":
        return None
    if not isinstance(settings, dict):
        raise group.refusal("weights", settings, "an object")
    hf = HFConfig(settings, group.family, f"weights of {group.where}")
    if format == "naive-quantized":
        format = f"{hf.get('type')}-quantized"
    if not isinstance(format, str) or format not in FORMATS:
        raise group.refusal("format", format, f"one of {', '.join(FORMATS)}")
    strategies, allowed_bits, kind = FORMATS[format]
    hf.require("type", (kind,), "int")
    num_bits = bits(hf, allowed_bits, "num_bits")
    rows, inputs = 1, group_size(hf, "group_size")
    usual = "tensor" if hf.get("group_size") is None else "channel" if inputs is None else "group"
    strategy = hf.require("strategy", strategies, usual)
    if strategy == "block":
        rows, inputs = block_size(hf, "block_structure")
    elif strategy in ("tensor", "channel"):
        inputs = None
    if format == "pack-quantized":
        hf.require("actorder", (None, False, "weight", "static"), None)
        has_zero = not hf.flag("symmetric", True)
        scale = SCALES.get(dtype, Scale.FLOAT32)
        return Storage(Layout.PACKED, WeightFormat(INTEGERS[num_bits], scale, inputs, has_zero), PACKED)
    hf.require("symmetric", (True,), True)
    if format in OF_ONE_GROUP:
        storage = OF_ONE_GROUP[format]
        hf.require("group_size", (storage.format.group,), None)
        return storage
    code = Code.FP8 if kind == "float" else Code.INT8
    return Storage(Layout.SCALED, WeightFormat(code, Scale.FLOAT32, inputs), block_rows=rows)
