"""From the settings of each method of quantisation to a `Scheme`. No torch.

Settings that only concern activations, the KV cache or how weights were quantised are not read: only weights are held
quantised.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from moe_runtime.models.compressed_tensors import compressed_tensors
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.quantization_settings import (
    END,
    EVERY,
    HEAD,
    INTEGERS,
    bits,
    block_size,
    globs,
    group_size,
    module_names,
    plain_name,
    regex,
    skipped,
)
from moe_runtime.types.weight_format import Code, Scale, WeightFormat
from moe_runtime.weights.scheme import FP8, MXFP4, MXFP8, NVFP4, Layout, Rule, Scheme, Storage


def fp8(hf: HFConfig, dtype: str) -> Scheme:
    """FP8 with scales of blocks (DeepSeek, Qwen, MiniMax), or of whole matrices."""
    if hf.get("weight_block_size") is None:
        return _fp8(hf, FP8)
    rows, group = block_size(hf, "weight_block_size")
    is_mx = (rows, group, hf.get("scale_fmt")) == (1, MXFP8.group, "ue8m0")
    return _fp8(hf, MXFP8 if is_mx else WeightFormat(Code.FP8, Scale.FLOAT32, group), rows)


def mxfp8(hf: HFConfig, dtype: str) -> Scheme:
    """FP8 with E8M0 scales of 32 inputs."""
    hf.require("weight_block_size", ([1, MXFP8.group],), [1, MXFP8.group])
    return _fp8(hf, MXFP8)


def _fp8(hf: HFConfig, format: WeightFormat, block_rows: int = 1) -> Scheme:
    hf.require("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    hf.require("expert_dtype", ("fp8",), "fp8")
    hf.require("modules_to_convert", ([],), [])
    storage = Storage(Layout.SCALED, format, scales="weight_scale_inv", block_rows=block_rows)
    return Scheme((HEAD, skipped(hf, "modules_to_not_convert", "ignored_layers"), Rule(storage, patterns=EVERY)))


def mxfp4(hf: HFConfig, dtype: str) -> Scheme:
    """MXFP4 of gpt-oss, of experts alone."""
    storage = Storage(Layout.MXFP4_BLOCKS, MXFP4, "weight_blocks", "weight_scales")
    return Scheme((skipped(hf, "modules_to_not_convert"), Rule(storage, patterns=(rf".*\.experts{END}",))))


def awq(hf: HFConfig, dtype: str) -> Scheme:
    """AWQ in the layout "gemm" (arXiv:2306.00978)."""
    hf.require("version", ("gemm", "GEMM"), "gemm")
    hf.require("zero_point", (True,), True)
    bits(hf, (4,), "bits", "w_bit")
    format = WeightFormat(Code.INT4, Scale.FLOAT16, group_size(hf, "group_size", "q_group_size"), has_zero=True)
    storage = Storage(Layout.AWQ, format, "qweight", "scales")
    return Scheme((HEAD, skipped(hf, "modules_to_not_convert"), Rule(storage, patterns=EVERY)))


def gptq(hf: HFConfig, dtype: str) -> Scheme:
    """GPTQ (arXiv:2210.17323); `dynamic` of gptqmodel has other settings for some modules, or leaves them out."""
    layouts = {"gptq": Layout.GPTQ, "gptq_v2": Layout.GPTQ_V2}
    layout = layouts[hf.require("checkpoint_format", tuple(layouts), "gptq")]
    hf.require("is_marlin_format", (False,), False)

    def storage(settings: HFConfig) -> Storage:
        code, group = INTEGERS[bits(settings, (4, 8), "bits")], group_size(settings, "group_size")
        format = WeightFormat(code, Scale.FLOAT16, group, has_zero=not settings.flag("sym", True))
        act_order = settings.flag("desc_act", False) and group is not None
        return Storage(layout, format, "qweight", "scales", act_order=act_order)

    dynamic = hf.get("dynamic", default={})
    if not isinstance(dynamic, dict) or not all(isinstance(value, dict) for value in dynamic.values()):
        raise hf.refusal("dynamic", dynamic, "an object of objects")
    rules = [] if hf.flag("lm_head", False) else [HEAD]
    for key, changes in dynamic.items():
        pattern = regex(hf, "dynamic", re.sub(r"^[-+]:", "", key))
        settings = HFConfig(hf.values | changes, hf.family, f"dynamic[{key!r}] of {hf.where}")
        rules.append(Rule(None if key.startswith("-:") else storage(settings), patterns=(pattern,)))
    named = module_names(hf, "modules_in_block_to_quantize")
    patterns = tuple(rf".*\.{re.escape(name)}$" for name in named) or EVERY
    return Scheme((*rules, Rule(storage(hf), patterns=patterns)))


def modelopt(hf: HFConfig, dtype: str) -> Scheme:
    """FP8 and NVFP4 of NVIDIA's ModelOpt, or a method for each layer."""
    excluded = globs(hf, "exclude_modules", "ignore")
    if hf.get("quant_algo") != "MIXED_PRECISION":
        return Scheme((excluded, Rule(_modelopt_storage(hf), patterns=EVERY)))
    layers = hf.get("quantized_layers")
    if not isinstance(layers, dict) or not all(isinstance(value, dict) for value in layers.values()):
        raise hf.refusal("quantized_layers", layers, "an object that gives each layer a quant_algo")
    names: dict[Storage, set[str]] = {}
    for name, settings in layers.items():
        storage = _modelopt_storage(HFConfig(settings, hf.family, f"quantized_layers[{name!r}] of {hf.where}"))
        names.setdefault(storage, set()).add(plain_name(name))
    return Scheme((excluded, *(Rule(storage, frozenset(found)) for storage, found in names.items())))


def _modelopt_storage(hf: HFConfig) -> Storage:
    storages = {
        "FP8": Storage(Layout.SCALED, FP8),
        "FP8_PER_CHANNEL_PER_TOKEN": Storage(Layout.SCALED, FP8),
        "MXFP8": Storage(Layout.SCALED, MXFP8),
        "NVFP4": Storage(Layout.NVFP4, NVFP4),
        "W4A16_NVFP4": Storage(Layout.NVFP4, NVFP4),
    }
    storage = storages[hf.require("quant_algo", tuple(storages), None)]
    if storage.format.group is not None:
        hf.require("group_size", (storage.format.group,), storage.format.group)
    return storage


METHODS: dict[str, Callable[[HFConfig, str], Scheme]] = {
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "gptq": gptq,
    "modelopt": modelopt,
    "modelopt_fp4": modelopt,
    "modelopt_mixed": modelopt,
    "mxfp4": mxfp4,
    "mxfp8": mxfp8,
}
