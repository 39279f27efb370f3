"""Reading `config.json`: old and new spellings, defaults, and fields that are refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import BASE, CASES, CLASSES, EXPERTS, FAMILY, edit_config, make_model, save

from moe_runtime.config.attention import AttentionConfig
from moe_runtime.layers.rotary import RotaryEmbedding
from moe_runtime.models.inert_keys import is_inert
from moe_runtime.models.registry import read_default_sampling, read_model_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}


def write(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def plain(family: str, **changes: Any) -> dict[str, Any]:
    base = {key: value for key, value in BASE.items() if key != "initializer_range"}
    config = {"model_type": family, **base, **FAMILY[family], **changes}
    return {key: value for key, value in config.items() if value is not ...}


# Settings for which these classes have no default, or one that makes no model.
NEEDED: dict[str, dict[str, int]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "glm4_moe": {"head_dim": 128},
}


@pytest.mark.parametrize("family", FAMILY)
def test_absent_keys_have_the_defaults_of_transformers(tmp_path: Path, family: str) -> None:
    """A file that says nothing means what transformers' class writes for it; its token ids are no part of a pass."""
    needed = NEEDED.get(family, {})
    getattr(transformers, CLASSES[family][0])(**needed).save_pretrained(tmp_path)
    whole = read_model_config(tmp_path)
    bare = read_model_config(write(tmp_path, {"model_type": family, **needed}))
    assert dataclasses.replace(bare, eos_token_ids=()) == dataclasses.replace(whole, eos_token_ids=())


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_writes_is_read(tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    config = getattr(transformers, CLASSES[family][0])(**{**BASE, **FAMILY[family], **settings})
    config.save_pretrained(tmp_path)
    model = read_model_config(tmp_path)
    assert (model.family, model.hidden_size, model.num_layers) == (
        family,
        config.hidden_size,
        config.num_hidden_layers,
    )
    kv_heads = 1 if hasattr(config, "kv_lora_rank") else config.num_key_value_heads
    assert model.layers[0].attention.num_kv_heads == kv_heads
    assert model.moe.num_experts == getattr(config, EXPERTS[family])
    assert model.tie_word_embeddings == config.tie_word_embeddings
    assert model.eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 123.0, "factor": 2.0}},
        ),
        (
            {
                "rope_theta": 9.0e3,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
            },
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 9.0e3,
                    "factor": 4.0,
                    "original_max_position_embeddings": 24,
                }
            },
        ),
        ({"rope_theta": 77.0, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("family", FAMILY)
def test_old_and_new_spellings_mean_the_same(
    tmp_path: Path, family: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    parameters = getattr(transformers, CLASSES[family][0])().rope_parameters
    if parameters["rope_type"] != "default" and old.get("rope_scaling", ...) is None:
        return  # without rope parameters the family extends its context
    first = read_model_config(write(tmp_path, plain(family, **old)))
    assert first == read_model_config(write(tmp_path, plain(family, **new)))


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}, "rope_scaling": YARN},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}, "rope_scaling": YARN, "rope_theta": 7e3},
        {"rope_parameters": {**YARN, "rope_theta": 5e3}, "rope_scaling": {}, "rope_theta": 7e3},
        {"rope_parameters": {**YARN, "rope_theta": 5e3}, "rope_scaling": None},
        {"rope_scaling": YARN, "original_max_position_embeddings": 48},
        {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 4.0}},
        {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0},
    ],
)
def test_two_spellings_of_rope_mean_what_they_mean_in_transformers(
    tmp_path: Path, family: str, keys: dict[str, Any]
) -> None:
    rotates_whole_heads = family not in ("glm4_moe", "minimax_m2")
    if family == "mistral4" or ("partial_rotary_factor" in keys and rotates_whole_heads):
        return  # transformers' own models of these configurations do not run
    write(tmp_path, plain(family, **keys))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = getattr(transformers, CLASSES[family][1].replace("ForCausalLM", "Model"))(config)
    expected = model.rotary_emb
    found = RotaryEmbedding(read_model_config(tmp_path).rope, torch.device("cpu"))
    torch.testing.assert_close(found.inv_freq, expected.inv_freq, rtol=1e-6, atol=0)


def other_names(family: str) -> list[str]:
    """The names besides the usual one that transformers takes for the number of experts."""
    names = getattr(transformers, CLASSES[family][0]).attribute_map
    both = {name for pair in names.items() if EXPERTS[family] in pair for name in pair}
    return sorted(both - {EXPERTS[family]})


@pytest.mark.parametrize("family", FAMILY)
def test_spellings_of_the_number_of_experts(tmp_path: Path, family: str) -> None:
    one = EXPERTS[family]
    first = read_model_config(write(tmp_path, plain(family)))
    for other in other_names(family):
        assert first == read_model_config(write(tmp_path, plain(family, **{one: ..., other: FAMILY[family][one]})))


@pytest.mark.parametrize("family", FAMILY)
def test_two_numbers_of_experts_mean_what_they_mean_in_transformers(tmp_path: Path, family: str) -> None:
    for other in other_names(family):
        for first, second in ((12, 8), (8, 12)):
            write(tmp_path, plain(family, **{EXPERTS[family]: first, other: second}))
            expected = getattr(transformers.AutoConfig.from_pretrained(tmp_path), EXPERTS[family])
            assert read_model_config(tmp_path).moe.num_experts == expected


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({"use_sliding_window": True, "sliding_window": None}, None),
        ({"use_sliding_window": True, "sliding_window": ...}, 4096),
        ({"use_sliding_window": True, "sliding_window": 7}, 7),
        ({"use_sliding_window": False, "sliding_window": 7}, None),
        ({"sliding_window": 7}, None),
    ],
)
def test_the_window_of_qwen3_is_that_of_transformers(tmp_path: Path, keys: dict[str, Any], window: int | None) -> None:
    write(tmp_path, plain("qwen3_moe", **keys))
    assert transformers.AutoConfig.from_pretrained(tmp_path).sliding_window == window
    assert read_model_config(tmp_path).layers[0].attention.sliding_window == window


# What a full `to_dict()` of transformers 4 writes beside the model's own keys.
GENERATION_KEYS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": True,
    "early_stopping": False,
    "num_beams": 4,
    "num_beam_groups": 1,
    "diversity_penalty": 0.5,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.9,
    "typical_p": 1.0,
    "repetition_penalty": 1.1,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": [[3]],
    "num_return_sequences": 1,
    "output_scores": True,
    "return_dict_in_generate": True,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [5, 1.1],
    "suppress_tokens": [4],
    "begin_suppress_tokens": [4],
}
OTHER_KEYS: dict[str, Any] = {
    "architectures": ["SomeForCausalLM"],
    "_name_or_path": "somebody/model",
    "auto_map": {"AutoConfig": "x.Y"},
    "transformers_version": "4.51.0",
    "unsloth_fixed": True,
    "unsloth_version": "2026.1",
    "finetuning_task": "chat",
    "task_specific_params": {"chat": {"max_length": 3}},
    "prefix": "x",
    "use_cache": True,
    "tf_legacy_loss": True,
    "pruned_heads": {},
    "is_decoder": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "layer_types": ["full_attention"] * BASE["num_hidden_layers"],
}


@pytest.mark.parametrize("family", FAMILY)
def test_keys_that_cannot_change_a_forward_pass_are_ignored_in_one_line(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read_model_config(
        write(tmp_path, plain(family, dtype="bfloat16", layer_types=OTHER_KEYS["layer_types"]))
    )
    whole = getattr(transformers, CLASSES[family][0])(**plain(family), **GENERATION_KEYS, **OTHER_KEYS).to_dict()
    whole |= plain(family, dtype="bfloat16") | GENERATION_KEYS | OTHER_KEYS
    caplog.clear()
    with caplog.at_level("INFO", "moe_runtime.models"):
        assert read_model_config(write(tmp_path, whole)) == expected
    (record,) = caplog.records
    message = record.getMessage()
    assert "ignored" in message and "\n" not in message
    named = message.rpartition(": ")[2].split(", ")
    written = [*GENERATION_KEYS, *OTHER_KEYS]
    empty = ("min_length", "early_stopping", "encoder_no_repeat_ngram_size", "pruned_heads", "is_encoder_decoder")
    empty += ("add_cross_attention", "cross_attention_hidden_size")  # they say nothing
    assert set(written) - set(named) == {*empty, "layer_types"}  # layer_types was read


@pytest.mark.parametrize("family", FAMILY)
@settings(deadline=None, max_examples=50)
@given(key=st.from_regex(r"[a-z][a-z_]{2,20}", fullmatch=True), value=st.sampled_from([True, 2, 0.5, "yes", [1]]))
def test_unknown_keys_are_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, family: str, key: str, value: object
) -> None:
    if is_inert(key) or key in plain(family):
        return
    path = write(tmp_path_factory.mktemp("model"), plain(family, **{key: value}))
    with pytest.raises(ValueError, match=f"^{key}: "):
        read_model_config(path)


@pytest.mark.parametrize(
    ("family", "facts"),
    [
        ("qwen3_moe", {"use_qk_norm": True, "scoring_func": "softmax", "qkv_bias": False, "n_shared_experts": 0}),
        ("mixtral", {"norm_topk_prob": True, "use_qk_norm": False, "decoder_sparse_step": 1}),
        ("glm4_moe", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}),
    ],
)
def test_what_a_family_always_does_may_be_said(tmp_path: Path, family: str, facts: dict[str, Any]) -> None:
    expected = read_model_config(write(tmp_path, plain(family)))
    assert read_model_config(write(tmp_path, plain(family, **facts))) == expected


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    qwen = read_model_config(write(tmp_path, {"model_type": "qwen3_moe"}))
    assert (qwen.moe.num_experts, qwen.moe.normalize_topk, qwen.layers[0].attention) == (
        128,
        False,
        AttentionConfig(32, 4, 64, qk_norm="head"),
    )
    mixtral = read_model_config(write(tmp_path, {"model_type": "mixtral"}))
    assert (mixtral.rope.theta, mixtral.moe.top_k, mixtral.moe.intermediate_size) == (1e6, 2, 14336)
    glm = read_model_config(write(tmp_path, {"model_type": "glm4_moe", "hidden_size": 96 * 128}))
    assert (glm.rope.rotary_dim, glm.moe_layers[0], glm.moe.shared_intermediate_size) == (64, 1, 1408)


def test_generation_config_gives_the_stop_ids(tmp_path: Path) -> None:
    write(tmp_path, plain("mixtral", eos_token_id=5))
    assert read_model_config(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_model_config(tmp_path).eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"model_type": "llama"}, ["model_type", "'llama'", "glm4_moe", "mixtral", "qwen3_moe"]),
        ("mixtral", {"model_type": ...}, ["model_type", "None"]),
        ("mixtral", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ("mixtral", {"quantization_config": {"quant_method": "hqq"}}, ["quantization_config", "hqq"]),
        (
            "mixtral",
            {"compression_config": {"quant_method": "compressed-tensors"}},
            ["compression_config", "config_groups"],
        ),
        ("mixtral", {"attn_logit_softcapping": 30.0}, ["attn_logit_softcapping", "30.0"]),
        ("mixtral", {"is_encoder_decoder": True}, ["is_encoder_decoder", "True"]),
        ("mixtral", {"norm_topk_prob": False}, ["norm_topk_prob", "False", "True"]),
        ("mixtral", {"num_key_value_heads": None}, ["num_key_value_heads", "None", "integer"]),
        ("mixtral", {"sliding_window": "7"}, ["sliding_window", "'7'", "null or an integer"]),
        ("mixtral", {"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan", "finite number"]),
        ("mixtral", {"rope_scaling": "yarn"}, ["rope_scaling", "'yarn'", "object"]),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor", "'2'", "number"]),
        ("mixtral", {"eos_token_id": "</s>"}, ["eos_token_id", "'</s>'", "token id"]),
        ("mixtral", {"strange": "x" * 10_000}, ["strange", "xxx...", "not supported"]),
        ("mixtral", {"sliding_window": 7, "layer_types": ["full_attention"] * 3}, ["layer_types", "sliding_attention"]),
        ("qwen3_moe", {"use_qk_norm": False}, ["use_qk_norm", "False", "True"]),
        ("qwen3_moe", {"mlp_only_layers": 2}, ["mlp_only_layers", "2", "list"]),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 2}, ["layer_types", "3 layers"]),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "longrope"}}, ["rope_type", "'longrope'", "yarn"]),
        ("qwen3_moe", {"rope_scaling": {"type": "yarn", "factor": 2.0, "odd": 1}}, ["odd", "'yarn'"]),
        ("qwen3_moe", {"rope_scaling": {"type": "linear"}}, ["factor", "missing", "'linear'"]),
        ("qwen3_moe", {"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ("qwen3_moe", {"num_hidden_layers": "many"}, ["num_hidden_layers", "'many'"]),
        ("qwen3_moe", {"num_key_value_heads": 4}, ["num_key_value_heads", "4", "divide"]),
        ("qwen3_moe", {"num_experts_per_tok": 8}, ["num_experts_per_tok", "8", "7"]),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, ["no sparse layer"]),
        ("glm4_moe", {"n_group": 5}, ["n_group", "5", "12"]),
        ("glm4_moe", {"n_group": 12}, ["n_group", "12", "at least 2"]),
        ("dots1", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "whole heads"]),
        ("dots1", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ("dots1", {"rope_theta": 0}, ["rope_theta", "0", "above 0"]),
        ("dots1", {"rope_theta": 1.0, "rope_scaling": YARN}, ["rope_theta", "1.0", "above 1"]),
        ("dots1", {"rope_scaling": {"type": "linear", "factor": 0}}, ["factor", "0", "above 0"]),
        ("dots1", {"rope_scaling": {**YARN, "beta_fast": -1.0}}, ["beta_fast", "-1.0", "above 0"]),
        ("dots1", {"rope_scaling": {**YARN, "original_max_position_embeddings": -64}}, ["original_max", "-64"]),
        ("dots1", {"rms_norm_eps": -1.0}, ["rms_norm_eps", "-1.0", "above 0"]),
        ("dots1", {"routed_scaling_factor": 0}, ["routed_scaling_factor", "0", "above 0"]),
        ("dots1", {"model_type": ["dots1"]}, ["model_type", "['dots1']", "known"]),
        ("dots1", {"num_hidden_layers": 10**30}, ["num_hidden_layers", "10000"]),
        ("hunyuan_v1_moe", {"head_dim": 2, "rope_scaling": {"type": "dynamic", "alpha": 3.0}}, ["alpha", "2 dims"]),
        ("mixtral", {"num_local_experts": 0}, ["num_local_experts", "0"]),
        ("ernie4_5_moe", {"moe_k": 0}, ["moe_k", "0"]),
        ("ernie4_5_moe", {"use_bias": True}, ["use_bias", "True"]),
        ("olmoe", {"clip_qkv": 8.0}, ["clip_qkv", "8.0"]),
        ("mistral4", {"head_dim": 8}, ["head_dim", "8", "20"]),
        ("deepseek_v3", {"scoring_func": "softmax"}, ["scoring_func", "'softmax'"]),
        ("glm4_moe", {"norm_topk_prob": "yes"}, ["norm_topk_prob", "'yes'", "true or false"]),
        ("glm4_moe", {"scoring_func": "softmax"}, ["scoring_func", "'softmax'", "sigmoid"]),
        ("glm4_moe", {"layer_types": ["sliding_attention"] * 3}, ["layer_types", "sliding_attention"]),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], words: list[str]
) -> None:
    write(tmp_path, plain(family, **changes))
    with pytest.raises(ValueError) as error:
        read_model_config(tmp_path)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "W4A8_AWQ"}}, ["quant_algo", "'W4A8_AWQ'", "NVFP4"]),
        ("quantize_config.json", {"bits": 2, "group_size": 128, "desc_act": False}, ["bits", "2", "4 or 8"]),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 3}, ["w_bit", "3", "4"]),
        ("quant_config.json", {"quant_method": "hqq"}, ["quantization: hqq", "not supported", "awq"]),
    ],
)
def test_what_another_file_tells_of_quantisation_is_named_if_it_is_not_read(
    tmp_path: Path, file: str, content: dict[str, Any], words: list[str]
) -> None:
    write(tmp_path, plain("mixtral"))
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        read_model_config(tmp_path)
    message = str(error.value)
    assert all(word in message for word in [*words, file]) and "\n" not in message, message


def test_a_quantisation_file_that_says_none_is_no_quantisation(tmp_path: Path) -> None:
    expected = read_model_config(write(tmp_path, plain("mixtral", quantization_config=None)))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    assert read_model_config(tmp_path) == expected


def test_sampling_defaults_of_the_model(tmp_path: Path) -> None:
    write(tmp_path, plain("mixtral"))
    assert read_default_sampling(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": None}))
    assert read_default_sampling(tmp_path) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    file.write_text(json.dumps({"repetition_penalty": 1.05, "max_new_tokens": 2048, "num_beams": 4, "min_p": 0.1}))
    assert read_default_sampling(tmp_path) == {"repetition_penalty": 1.05, "max_tokens": 2048, "min_p": 0.1}
    file.write_text(json.dumps({"do_sample": False}))
    assert read_default_sampling(tmp_path) == {}
    file.write_text(json.dumps({"top_p": 3}))
    with pytest.raises(ValueError, match=r"^top_p: 3 is not allowed.*generation_config\.json.*none") as error:
        read_default_sampling(tmp_path)
    assert "\n" not in str(error.value)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_model_config(tmp_path)
    with pytest.raises(ValueError, match="is no directory"):
        read_model_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold a JSON object"):
        read_model_config(tmp_path)


def test_a_configuration_without_a_dtype_has_that_of_the_weights(tmp_path: Path) -> None:
    path = save(make_model("qwen3").bfloat16(), tmp_path)
    edit_config(path, {"dtype": None, "torch_dtype": None})
    assert read_model_config(path).dtype == "bfloat16"
    (path / "model.safetensors").unlink()
    assert read_model_config(path).dtype == "float32"
