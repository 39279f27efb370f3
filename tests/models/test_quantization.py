"""What configurations say of quantisation: methods, formats, modules that are left out; the rest is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quantized_files import ACT_ORDER, BLOCKS, CASES, GPT_OSS, compressed, of_gptq

from moe_runtime.models.quantization import read_scheme
from moe_runtime.models.registry import read_model_config
from moe_runtime.weights.scheme import Scheme

LAYER = "model.layers.0."
EXPERT, QUERY, GATE = f"{LAYER}mlp.experts.3.down_proj", f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.gate"
SHARED = f"{LAYER}mlp.shared_experts.up_proj"
MODULES = {
    "expert": EXPERT,
    "query": QUERY,
    "shared": SHARED,
    "head": "lm_head",
    "tenth": "model.layers.10.mlp.up_proj",
}


def scheme_of(path: Path, settings: object, **config: Any) -> Scheme:
    scheme = read_scheme(path, {"quantization_config": settings, "dtype": "bfloat16"} | config)
    assert scheme is not None
    return scheme


def names_of_formats(scheme: Scheme) -> dict[str, str]:
    """Format of each module of `MODULES` that is quantised."""
    found = {label: scheme.format_of(f"{module}.weight") for label, module in MODULES.items()}
    return {label: f"{format.name} {format.scale.name}" for label, format in found.items() if format and format.scale}


@pytest.mark.parametrize("label", CASES)
def test_the_format_follows_from_the_configuration(tmp_path: Path, label: str) -> None:
    case = CASES[label]
    found = scheme_of(tmp_path, case.settings).format_of(f"{EXPERT}.weight")
    assert found is not None and (found.name, found.has_zero) == (case.label[0], case.label[2])
    if "compressed" not in label:
        assert found.scale is not None and found.scale.name == case.label[1]


def test_scales_of_integers_are_expected_in_the_type_of_the_model(tmp_path: Path) -> None:
    settings = CASES["compressed int4"].settings
    for dtype, name in (("float16", "FLOAT16"), ("bfloat16", "BFLOAT16"), ("float32", "FLOAT32")):
        format = scheme_of(tmp_path, settings, dtype=dtype).format_of(f"{EXPERT}.weight")
        assert format is not None and format.scale is not None and format.scale.name == name


def test_act_order_is_held_dequantised(tmp_path: Path) -> None:
    for case in ACT_ORDER.values():
        scheme = scheme_of(tmp_path, case.settings)
        assert scheme.format_of(f"{EXPERT}.weight") is None and scheme.storage_of(f"{EXPERT}.weight") is not None


@pytest.mark.parametrize("label", CASES)
def test_embedding_norms_gate_and_biases_are_plain(tmp_path: Path, label: str) -> None:
    scheme = scheme_of(tmp_path, CASES[label].settings)
    plain = ["model.embed_tokens.weight", "model.norm.weight", f"{LAYER}input_layernorm.weight", f"{GATE}.weight"]
    plain += [f"{QUERY}.bias", f"{LAYER}self_attn.q_norm.weight", f"{LAYER}mlp.shared_expert_gate.weight"]
    plain += ["lm_head.weight", f"{LAYER}block_sparse_moe.router.layer.weight", f"{LAYER}mlp.gate.wg.weight"]
    assert [name for name in plain if scheme.format_of(name)] == []


def test_experts_of_gpt_oss_alone(tmp_path: Path) -> None:
    scheme = scheme_of(tmp_path, GPT_OSS)
    for name in (f"{LAYER}mlp.experts.gate_up_proj", f"{LAYER}mlp.experts.down_proj", f"{EXPERT}.weight"):
        assert scheme.format_of(name) is not None
    assert names_of_formats(scheme).keys() == {"expert"}
    assert scheme.format_of(f"{LAYER}mlp.experts.gate_up_proj_bias") is None


ALL = {"expert", "query", "shared", "tenth"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


def with_ignored(*names: str) -> dict[str, Any]:
    return compressed("pack-quantized", **INT4) | {"ignore": list(names)}


@pytest.mark.parametrize(
    ("settings", "quantized"),
    [
        (BLOCKS, ALL),
        (BLOCKS | {"modules_to_not_convert": ["model.layers.1", "lm_head"]}, ALL),
        (BLOCKS | {"modules_to_not_convert": ["model.layers.0"]}, {"tenth"}),
        (BLOCKS | {"modules_to_not_convert": ["model.language_model.layers.0.self_attn"]}, ALL - {"query"}),
        (BLOCKS | {"modules_to_not_convert": ["q_proj", r"model\.layers\.\d+\.mlp\.up_proj"]}, {"expert", "shared"}),
        (
            BLOCKS | {"fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
            ALL,
        ),
        (BLOCKS | {"ignored_layers": [QUERY], "modules_to_not_convert": None}, ALL - {"query"}),
        (of_gptq(lm_head=True), ALL | {"head"}),
        (of_gptq(modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj"]]), {"query", "tenth"}),
        (of_gptq(dynamic={r"-:.*\.self_attn\.": {}, "-:.*shared": {}}), {"expert", "tenth"}),
        (with_ignored(), ALL | {"head"}),
        (with_ignored("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"), {"expert", "tenth"}),
        (with_ignored("re:lm", "language_model.model.layers.10.mlp.up_proj"), ALL - {"tenth"}),
        (with_ignored("Linear"), set()),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}, ALL),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                "ignore": ["lm_head", "*.self_attn*", "model.layers.10"],
            },
            {"expert", "shared"},
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.1*"]},
            ALL - {"tenth"},
        ),
    ],
)
def test_modules_that_are_left_out(tmp_path: Path, settings: dict[str, Any], quantized: set[str]) -> None:
    assert names_of_formats(scheme_of(tmp_path, settings)).keys() == quantized


def test_groups_of_modules_with_settings_of_their_own(tmp_path: Path) -> None:
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
        "group_1": {"targets": ["re:.*self_attn.*"], "weights": fp8, "format": "float-quantized"},
        "group_2": {"targets": [SHARED], "weights": None},
    }
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    expected = {"expert": "int4 g32 BFLOAT16", "query": "fp8 FLOAT32", "head": "int4 g32 BFLOAT16"}
    assert names_of_formats(scheme_of(tmp_path, settings)) == expected | {"tenth": "int4 g32 BFLOAT16"}
    layers = {EXPERT: {"quant_algo": "NVFP4", "group_size": 16}, f"{LAYER}self_attn": {"quant_algo": "FP8"}}
    settings = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert names_of_formats(scheme_of(tmp_path, settings)) == {"expert": "fp4 g16 E4M3", "query": "fp8 FLOAT32"}
    dynamic = {r"+:.*\.experts\.": {"bits": 8, "group_size": -1}, ".*self_attn": {"group_size": 64}}
    expected = {"expert": "int8 FLOAT16", "query": "int4 g64 FLOAT16"}
    rest = dict.fromkeys(("shared", "tenth"), "int4 g16 FLOAT16")
    assert names_of_formats(scheme_of(tmp_path, of_gptq(dynamic=dynamic))) == expected | rest


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}, "fp4 g16 E4M3"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}, "fp8 FLOAT32"),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "int4 g128 FLOAT16"),
        (
            "quant_config.json",
            {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
            "int4 g64 FLOAT16",
        ),
    ],
)
def test_other_files_may_tell(tmp_path: Path, file: str, content: dict[str, Any], expected: str) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    scheme = read_scheme(tmp_path, {})
    assert scheme is not None and names_of_formats(scheme)["expert"] == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["quantization", "bitsandbytes", "awq, compressed"]),
        ({"bits": 4}, ["quantization", "'bits': 4"]),
        ("int4", ["quantization", "'int4'"]),
        (BLOCKS | {"fmt": "e5m2"}, ["fmt", "'e5m2'", "e4m3"]),
        (BLOCKS | {"expert_dtype": "fp4"}, ["expert_dtype", "'fp4'"]),
        (BLOCKS | {"weight_block_size": [128, 100]}, ["weight_block_size", "[128, 100]", "multiple of 8"]),
        (BLOCKS | {"weight_block_size": 128}, ["weight_block_size", "128", "list"]),
        (BLOCKS | {"modules_to_not_convert": "lm_head"}, ["modules_to_not_convert", "'lm_head'", "list"]),
        (BLOCKS | {"modules_to_not_convert": ["*.gate"]}, ["modules_to_not_convert", "'*.gate'", "regular expression"]),
        (of_gptq(bits=3), ["bits", "3", "4 or 8"]),
        (of_gptq(group_size=12), ["group_size", "12", "multiple of 8"]),
        (of_gptq(group_size=True), ["group_size", "True", "multiple of 8"]),
        (of_gptq(checkpoint_format="marlin"), ["checkpoint_format", "'marlin'", "gptq_v2"]),
        (of_gptq(dynamic={"+:(": {}}), ["dynamic", "'('", "regular expression"]),
        (of_gptq(dynamic={"+:a": {"bits": 2}}), ["bits", "2", "dynamic['+:a']"]),
        (CASES["awq"].settings | {"version": "gemv"}, ["version", "'gemv'", "gemm"]),
        (CASES["awq"].settings | {"bits": 8}, ["bits", "8", "be 4"]),
        (CASES["awq"].settings | {"zero_point": False}, ["zero_point", "False"]),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, ["quant_algo", "'NVFP4_AWQ'", "NVFP4"]),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, ["group_size", "32", "16"]),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, ["quantized_layers", "None"]),
        (compressed("pack-quantized", num_bits=3, group_size=32), ["num_bits", "3", "4 or 8"]),
        (compressed("pack-quantized", num_bits=4, group_size=20), ["group_size", "20", "multiple of 8"]),
        (compressed("pack-quantized", num_bits=4, group_size=32, actorder="group"), ["actorder", "'group'"]),
        (compressed("marlin-24", num_bits=4, group_size=32), ["format", "'marlin-24'", "pack-quantized"]),
        (compressed("float-quantized", num_bits=8, type="float", symmetric=False), ["symmetric", "False"]),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=32), ["strategy", "tensor_group"]),
        (CASES["awq"].settings | {"quant_method": "compressed-tensors"}, ["config_groups", "None"]),
        (compressed("int-quantized", num_bits=8) | {"transform_config": {"R1": {}}}, ["transform_config", "absent"]),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, settings: object, words: list[str]) -> None:
    config = {"model_type": "mixtral", "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        read_model_config(tmp_path)
    message = str(error.value)
    assert all(word in message for word in [*words, "quantization_config of config.json"]), message
    assert "\n" not in message
