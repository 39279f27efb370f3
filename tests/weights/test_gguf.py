"""GGUF files are served as their checkpoints are: the same configuration, logits and tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from engines import Pools
from fakes import CHAT_TEMPLATE, SPECIAL, save_byte_tokenizer
from gguf import GGMLQuantizationType as Kind
from gguf_models import edited, read_bpe, write, write_gguf
from gguf_runs import PROMPTS, logits
from safetensors.torch import load_file
from tiny_models import VOCAB, make_model, rope, save

from moe_runtime import LLM, SamplingParams
from moe_runtime.cli.main import main
from moe_runtime.models import registry
from moe_runtime.models.registry import open_weights, read_default_sampling, read_model_config
from moe_runtime.weights.checkpoint import resolve_model
from moe_runtime.weights.gguf_file import Gguf

YARN = {"factor": 4.0, "original_max_position_embeddings": 24, "mscale": 0.7, "mscale_all_dim": 0.7}
# Cases of tiny_models, with the settings that llama.cpp has no other values of.
CASES: dict[str, dict[str, Any]] = {
    "qwen3 bias, tied": {"norm_topk_prob": True},
    "qwen3 yarn": {"norm_topk_prob": True},
    "qwen2": {"mlp_only_layers": []},
    "olmoe": {},
    "mixtral linear": {},
    "granite": {},
    "granite shared": {},
    "dots1": {},
    "ernie": {},
    "hunyuan": {},
    "minimax": {},
    "glm4 groups": {"norm_topk_prob": True},
    "glm4 norm, bias": {},
    "gpt-oss": {"swiglu_limit": 7.0},
    "deepseek3": rope("yarn", **YARN),
    "deepseek2 groups": {},
    "deepseek2": rope("yarn", **YARN),
    "glm4 lite": {"attention_bias": False},
}
SAME = {"glm4_moe_lite": "deepseek_v3"}  # families that llama.cpp does not tell apart


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_checkpoint(case: str, tmp_path: Path, rank_pool: Pools) -> None:
    folder = save(make_model(case, **CASES[case]), tmp_path / "model")
    file = write_gguf(folder, tmp_path / "model.gguf")
    ours, theirs = read_model_config(file), read_model_config(folder)
    family = SAME.get(theirs.family, theirs.family)
    turned = dataclasses.replace(theirs.rope, interleaved=ours.rope.interleaved)
    assert ours == dataclasses.replace(theirs, family=family, rope=turned, dtype="float32")
    for mine, other in zip(logits(rank_pool, file), logits(rank_pool, folder), strict=True):
        assert torch.equal(mine, other)


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in bfloat16 and its GGUF file in parts."""
    folder = tmp_path_factory.mktemp("bfloat16")
    model = make_model("qwen3 normalised", hidden_size=64, moe_intermediate_size=32).bfloat16()
    write_gguf(save(model, folder / "model"), folder / "model.gguf", lambda name: Kind.BF16, split_max_tensors=20)
    first, *others = sorted(folder.glob("model-*.gguf"))
    assert others
    return folder / "model", first


def test_tokens_are_those_of_the_checkpoint(bfloat16: tuple[Path, Path]) -> None:
    def generate(path: Path, **options: Any) -> list[list[int]]:
        with LLM(path, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4, device="cpu", **options) as llm:
            prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            outs = llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0), False)
        return [out.outputs[0].token_ids for out in outs]

    checkpoint, file = bfloat16
    assert read_model_config(file).dtype == "bfloat16"
    assert generate(file) == generate(checkpoint)


def test_gate_and_up_in_one_tensor_and_shared_experts_in_two(tmp_path: Path) -> None:
    folder = save(make_model("granite shared"), tmp_path / "model")
    file = write_gguf(folder, tmp_path / "m.gguf")
    plain = open_weights(file, config := read_model_config(file))
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(tmp_path / "f.gguf", "granitemoe")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    for layer in range(3):
        gate, up = (tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up"))
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = torch.cat((gate, up), dim=1)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    write(writer)
    assert read_model_config(tmp_path / "f.gguf") == config
    fused = open_weights(tmp_path / "f.gguf", config)
    inner, hidden = config.moe.intermediate_size, config.hidden_size
    for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        name = f"model.layers.1.block_sparse_moe.experts.4.{part}_proj.weight"
        assert torch.equal(fused.read(name, shape), plain.read(name, shape))
        assert torch.equal(fused.read(name, shape, rows=slice(3, 7)), plain.read(name, shape)[3:7])
    name, shape = "model.layers.2.shared_mlp.input_linear.weight", (2 * config.moe.shared_intermediate_size, hidden)
    expected = load_file(folder / "model.safetensors")[name]
    for rows in (slice(None), slice(20, 40), slice(30, 31), slice(0, 28)):
        assert torch.equal(plain.read(name, shape, rows=rows), expected[rows])
    assert torch.equal(plain.read(name, shape, index=31), expected[31])


def test_what_the_file_recommends(tmp_path: Path) -> None:
    folder = save(make_model("qwen3"), tmp_path / "model")
    file = edited(write_gguf(folder, tmp_path / "m.gguf"), {"general.sampling.temp": 0.6, "general.sampling.top_k": 20})
    assert read_default_sampling(file) == {"temperature": 0.6, "top_k": 20}
    assert read_default_sampling(tmp_path / "m.gguf") == {}
    bad = edited(tmp_path / "m.gguf", {"general.sampling.top_p": 7.0})
    with pytest.raises(ValueError, match=r"^top_p: 7.0 .*generation_config=none ignores"):
        read_default_sampling(bad)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"general.architecture": "qwen3"},
        r"^general.architecture: 'qwen3' in .* is not known; known: dee",
    ),
    "missing": ({"qwen3moe.block_count": None}, r"^qwen3moe.block_count: missing in "),
    "type": (
        {"qwen3moe.block_count": "three"},
        r"^qwen3moe.block_count: 'three' in .* is not supported; it must be an",
    ),
    "value": ({"qwen3moe.embedding_length": 0}, r"^hidden_size: 0 in config.json is not allowed; .*what .*edited.gguf"),
    "heads": ({"qwen3moe.attention.head_count": 0}, r"^num_attention_heads: 0 in config.json is not allowed"),
    "unknown key": (
        {"qwen3moe.attn_logit_softcapping": 3.0},
        r"^qwen3moe.attn_logit_softcapping: 3.0 in .* not know it",
    ),
    "window": ({"qwen3moe.attention.sliding_window": 8}, r"^qwen3moe.attention.sliding_window: 8 in .* not know it"),
    "rope": ({"qwen3moe.rope.scaling.type": "longrope"}, r"^qwen3moe.rope.scaling.type: 'longrope' in .* 'linear' or"),
    "rotation": ({"qwen3moe.rope.dimension_count": 8}, r"^qwen3moe.rope.dimension_count: 8 in .*; it must be 16$"),
    "value length": (
        {"qwen3moe.attention.value_length": 8},
        r"^qwen3moe.attention.value_length: 8 in .*; it must be 16$",
    ),
    "gate": ({"qwen3moe.expert_gating_func": 2}, r"^qwen3moe.expert_gating_func: 2 in .*; it must be 1$"),
    "more experts": ({"qwen3moe.expert_used_count": 8}, r"^num_experts_per_tok: 8 in config.json is not allowed"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_gguf(save(make_model("qwen3"), folder / "model"), folder / "tiny.gguf")


@pytest.mark.parametrize("name", BAD)
def test_metadata_that_is_refused(name: str, tiny: Path) -> None:
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        read_model_config(edited(tiny, changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["qwen3", "glm4", "granite shared", "deepseek3 odd sizes", "gpt-oss"])
def test_values_of_any_type_give_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(save(make_model(case), tmp_path / "model"), tmp_path / "m.gguf")
    gguf_file = Gguf(file)
    whole = dict(gguf_file.metadata)
    monkeypatch.setattr(registry, "Gguf", lambda path: gguf_file)
    for key in whole:
        for value in ("three", "", 0, -1, 2**40, 0.5, float("nan"), True, [], [1, 2], ["a"]):
            gguf_file.metadata = whole | {key: value}
            try:
                read_model_config(file)
            except ValueError as error:
                assert "\n" not in str(error)


def test_keys_that_say_nothing_are_ignored(tiny: Path) -> None:
    quiet = {
        "qwen3moe.attn_logit_softcapping": 0.0,
        "qwen3moe.vocab_size": VOCAB,
        "qwen3moe.rope.scaling.type": "none",
        "qwen3moe.expert_gating_func": 1,
        "qwen3moe.expert_group_count": 1,
        "qwen3moe.expert_weights_norm": True,
    }
    assert read_model_config(edited(tiny, quiet)) == read_model_config(tiny)


def test_tensors_that_are_refused(tiny: Path, tmp_path: Path) -> None:
    for extra in ("rope_freqs.weight", "blk.1.attn_sub_norm.weight"):
        with pytest.raises(ValueError, match=rf"^model: tensor '{extra}' of .*edited.gguf is not supported$"):
            read_model_config(edited(tiny, {}, extra=extra))
    config = read_model_config(tiny)
    source = open_weights(edited(tiny, {}, drop="blk.1.attn_q.weight"), config)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not source.has(name)
    with pytest.raises(ValueError, match=rf"^model: .* has no tensor for '{name}'$"):
        source.read(name, (96, 48))
    with pytest.raises(ValueError, match=r"has 'blk.0.attn_q.weight' of shape \[96, 48\], but .* of shape \[96, 50\]$"):
        source.read(name.replace("1", "0"), (96, 50))
    with pytest.raises(ValueError, match=r"has 'blk.0.ffn_up_exps.weight' of shape \[7, 24, 48\], but "):
        source.read("model.layers.0.mlp.experts.7.up_proj.weight", (24, 48))


def test_types_that_are_refused(tmp_path: Path) -> None:
    folder = save(make_model("qwen3", hidden_size=64, moe_intermediate_size=256), tmp_path / "model")
    file = write_gguf(folder, tmp_path / "m.gguf", lambda name: Kind.TQ2_0 if "down_exps" in name else Kind.F32)
    with pytest.raises(
        ValueError, match=r"^quantization: TQ2_0 of tensor 'blk.0.ffn_down_exps.weight' .* one of F32, F16"
    ):
        read_model_config(file)


def test_layers_of_multi_token_prediction_are_not_read(tmp_path: Path) -> None:
    folder = save(make_model("glm4"), tmp_path / "model")
    file = write_gguf(folder, tmp_path / "m.gguf")
    more = edited(file, {"glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}, extra="blk.3.nextn.enorm.weight")
    assert read_model_config(more) == read_model_config(file)


def test_names_of_models(tiny: Path) -> None:
    assert resolve_model(str(tiny)) == tiny
    with pytest.raises(ValueError, match=r"^model: 'models/none.gguf' is no directory or GGUF file"):
        resolve_model("models/none.gguf")


def test_text_and_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = save_byte_tokenizer(tmp_path / "model")
    folder = save(make_model("qwen3 normalised", vocab_size=theirs.vocab_size, eos_token_id=0), tmp_path / "model")

    def add_tokenizer(writer: gguf.GGUFWriter) -> None:
        tokens, types, merges = read_bpe(folder, SPECIAL)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_eos_token_id(0)
        writer.add_chat_template(CHAT_TEMPLATE)

    file = write_gguf(folder, tmp_path / "m.gguf", add_tokenizer=add_tokenizer)
    outputs = []
    for path in (file, folder):
        options = "--prompt", "The sea", "--max-tokens", "8", "--temperature", "0", "--max-model-len", "64"
        assert main(["generate", str(path), *options, "--device", "cpu"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""


def test_inspect(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "qwen3_moe" and found["dtype"] == "float32"
