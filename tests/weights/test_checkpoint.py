"""Checkpoints on disk: sharded, fused, tied, damaged; and each rank reads only its own experts."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from kernel_marks import needs_native_kernels
from rank_pool import PoolExecutor, RankPool
from safetensors.torch import load_file, save_file
from tiny_models import CASES, FAMILY, make_model, save

from moe_runtime import LLM
from moe_runtime.all2all.dispatch import make_dispatchers
from moe_runtime.balancer.placement import Placement
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.experts.slots import ExpertSlots
from moe_runtime.kernels.cpu import loader
from moe_runtime.kernels.cpu.blocks import AttentionCall, GateCall, SparseCall
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.gate import TorchGate
from moe_runtime.layers.moe import ExpertCounter, MoELayer
from moe_runtime.layers.native_kit import NativeKit
from moe_runtime.layers.native_layers import (
    NativeAttention,
    NativeDenseBlock,
    NativeEmbedding,
    NativeHead,
    NativeMLP,
    NativeNorm,
    NativeSparseBlock,
)
from moe_runtime.layers.torch_attention import TorchAttention, TorchHeadMatrices, TorchLatentAttention
from moe_runtime.layers.torch_kit import TorchKit
from moe_runtime.layers.torch_layers import (
    RMSNorm,
    TorchDenseBlock,
    TorchEmbedding,
    TorchHead,
    TorchLinear,
    TorchMLP,
)
from moe_runtime.memory.model_size import count_parameters
from moe_runtime.models.reader import ModelReader
from moe_runtime.models.registry import names_of, read_model_config, read_stored_config
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.weights.checkpoint import Checkpoint, RandomWeights, WeightSource, resolve_model

CPU = torch.device("cpu")


KITS = {
    "torch": lambda: TorchKit(torch.float32, CPU),
    "native": lambda: NativeKit(loader.load(), torch.float32),
}
EACH_KIT = ["torch", pytest.param("native", marks=needs_native_kernels)]


def build(
    path: Path, source: WeightSource, placement: Placement | None = None, rank: int = 0, kit: str = "torch"
) -> Decoder:
    config = read_model_config(path)
    placement = placement or Placement.even(config.moe_layers, config.moe.num_experts, 1)
    counter = ExpertCounter(len(config.moe_layers), config.moe.num_experts, CPU)
    kept = KITS[kit]()
    ways = make_dispatchers(None, placement.max_slots, kept.row_ops) if placement.num_ranks == 1 else {}
    slots = placement.max_slots
    return ModelReader(config, names_of(config.family), source, placement, rank, slots, ways, counter, kept).read(
        lambda: None
    )


def values(part: object) -> list[torch.Tensor]:
    """The weights of a part of a decoder, in the checkpoint's layout, whatever the kit."""
    match part:
        case PackedLinear():
            return [part.unpack()]
        case PackedExperts():
            return [tensor for slot in range(part.num_slots) for tensor in part.unpack(slot)]
        case ExpertSlots():
            whole = zip(part.w13_SGD, part.w2_SDF, strict=True)
            return [tensor for w13_GD, w2_DF in whole for tensor in (*w13_GD.chunk(2), w2_DF)]
        case TorchHeadMatrices():
            return [part.weight_HOI]
        case TorchLinear():
            return [part.weight]
        case TorchMLP():
            return [*part.gate_up.weight.chunk(2), part.down.weight]
        case TorchEmbedding():
            return [part.weight_VD]
        case TorchGate():
            return [part.weight_ED]
        case RMSNorm() | NativeNorm():
            return [part.weight_D]
        case None:
            return []
    parts = {
        TorchHead: ("linear",),
        NativeHead: ("linear",),
        NativeEmbedding: ("linear",),
        NativeMLP: ("experts",),
        GateCall: ("linear",),
        TorchAttention: ("qkv", "output", "next_norm"),
        TorchLatentAttention: ("down", "up", "key", "value", "output", "next_norm"),
        NativeAttention: ("call",),
        AttentionCall: ("qkv", "output"),
        TorchDenseBlock: ("mlp",),
        NativeDenseBlock: ("mlp",),
        NativeSparseBlock: ("call",),
        SparseCall: ("gate", "experts", "shared"),
        MoELayer: ("gate", "experts", "shared"),
    }
    return [tensor for name in parts[type(part)] for tensor in values(getattr(part, name))]


def tensors(model: Decoder) -> list[torch.Tensor]:
    found = values(model.embed) + values(model.first_norm) + values(model.head)
    for layer in model.layers:
        found += values(layer.attention) + values(layer.mlp)
    return found


def fuse_experts(path: Path, config: ModelConfig) -> None:
    """Rewrite a checkpoint with all experts of a layer in one tensor, as newer ones have it."""
    file = path / "model.safetensors"
    state = load_file(file)
    for layer in config.moe_layers:
        for block, names in (("mlp", ("gate_proj", "up_proj", "down_proj")), ("block_sparse_moe", ("w1", "w3", "w2"))):
            prefix = f"model.layers.{layer}.{block}"
            if f"{prefix}.experts.0.{names[0]}.weight" not in state:
                continue
            experts = [
                [state.pop(f"{prefix}.experts.{e}.{name}.weight") for name in names]
                for e in range(config.moe.num_experts)
            ]
            fused = f"model.layers.{layer}.mlp.experts"
            state[f"{fused}.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
            state[f"{fused}.down_proj"] = torch.stack([down for _, _, down in experts])
            for name in [name for name in state if name.startswith(f"{prefix}.") and block != "mlp"]:
                state[name.replace(f".{block}.", ".mlp.")] = state.pop(name)
    save_file(state, file)


@pytest.mark.parametrize("kit", EACH_KIT)
@pytest.mark.parametrize("case", ["qwen3 bias, tied", "mixtral", "glm4"])
def test_sharded_and_fused_hold_the_same_as_one_file(tmp_path: Path, case: str, kit: str) -> None:
    model = make_model(case)
    whole = save(model, tmp_path / "whole")
    sharded = save(model, tmp_path / "sharded", max_shard_size="100KB")
    fused = save(model, tmp_path / "fused")
    fuse_experts(fused, read_model_config(fused))
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = tensors(build(whole, Checkpoint(whole)))
    assert sum(tensor.numel() for tensor in expected) > 0.9 * sum(weight.numel() for weight in model.parameters())
    for path in (whole, sharded, fused):
        found = tensors(build(path, Checkpoint(path), kit=kit))
        if kit == "native":  # its blocks hold the norm behind them as a bare pointer and tensor
            expected_here = [tensor for tensor in expected if tensor.ndim == 2]
            found = [tensor for tensor in found if tensor.ndim == 2]
        else:
            expected_here = expected
        for ours, theirs in zip(found, expected_here, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILY)
def test_a_rank_reads_only_its_own_experts(tmp_path: Path, family: str, fused: bool) -> None:
    case = next(name for name, (of, _) in CASES.items() if of == family)
    path = save(make_model(case), tmp_path)
    config = read_model_config(path)
    if fused:
        fuse_experts(path, config)
    placement = Placement.even(config.moe_layers, config.moe.num_experts, 3)
    expert_bytes = 4 * count_parameters(config).expert
    one = Checkpoint(path)
    build(path, one)
    rest = one.bytes_read - expert_bytes * config.moe.num_experts * len(config.moe_layers)
    for rank in range(3):
        source = Checkpoint(path)
        build(path, source, placement, rank)
        own = int((placement.slots[:, rank] >= 0).sum())
        assert source.bytes_read == rest + own * expert_bytes


def test_ranks_of_an_engine_read_only_their_own_experts(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    path = save(make_model("qwen3"), tmp_path)
    config = read_model_config(path)
    whole = Checkpoint(path)
    build(path, whole)
    expert_bytes = 3 * config.hidden_size * config.moe.intermediate_size * 4 * len(config.moe_layers)
    executor = PoolExecutor(rank_pool(4), EngineConfig(str(path), ep_size=4), config, path)
    dense = whole.bytes_read - 7 * expert_bytes
    assert executor.bytes_read() == [dense + own * expert_bytes for own in (2, 2, 2, 1)]
    executor.close()


def test_dummy_weights_do_not_depend_on_the_placement(tmp_path: Path) -> None:
    path = save(make_model("mixtral"), tmp_path)
    config = read_model_config(path)
    whole = build(path, RandomWeights(3))
    placement = Placement.even(config.moe_layers, config.moe.num_experts, 2)
    first = placement.slots[0, 0]
    for rank in range(2):
        part = build(path, RandomWeights(3), placement, rank)
        assert torch.equal(*values(part.head), *values(whole.head))
        ours, all_of_them = part.layers[0].mlp, whole.layers[0].mlp
        assert isinstance(ours, MoELayer) and isinstance(all_of_them, MoELayer)
        slots, experts = values(ours.experts), values(all_of_them.experts)
        for slot, expert in enumerate(placement.slots[0, rank].tolist()):
            if expert >= 0:
                for mine, theirs in zip(slots[3 * slot :][:3], experts[3 * expert :][:3], strict=True):
                    assert torch.equal(mine, theirs)
    assert len(first) == 3
    assert not torch.equal(*values(whole.embed), *values(build(path, RandomWeights(4)).embed))


def test_dummy_weights_that_were_dropped_are_given_back() -> None:
    """Also from between small things that are kept, as lists of escapes are."""
    script = """
from pathlib import Path
from moe_runtime.weights.checkpoint import RandomWeights

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

source = RandomWeights(0)
source.read("the first is freed", (1024, 1024))  # so that others of its size lie in the heap
tensors, kept = [], []
for index in range(100):
    tensors.append(source.read(str(index), (512, 512)))
    kept.append(bytes(3000))
full = resident()
tensors.clear()
source.release_all()
print((full - resident()) >> 20)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert int(found.stdout) > 80, "of 100 MiB"


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    path = save(make_model("qwen3"), tmp_path / "a", max_shard_size="100KB")
    shards = sorted(path.glob("*.safetensors"))
    content = shards[1].read_bytes()

    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"{shards[1].name} is missing"):
        Checkpoint(path)
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{shards[1].name} is damaged or truncated"):
        Checkpoint(path)
    shards[1].write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{shards[1].name} is damaged or truncated"):
        Checkpoint(path)
    shards[1].write_bytes(content)
    index = path / "model.safetensors.index.json"
    listing = json.loads(index.read_text())
    del listing["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=r"no tensor 'model\.norm\.weight'"):
        build(path, Checkpoint(path))
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json.*weight_map"):
        Checkpoint(path)


def test_what_a_file_holds_must_fit_the_configuration(tmp_path: Path) -> None:
    path = save(make_model("qwen3"), tmp_path)
    state = load_file(path / "model.safetensors")
    norm = state["model.norm.weight"]
    save_file(state | {"model.norm.weight": norm[:-1]}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has shape \[47\].*\[48\]"):
        build(path, Checkpoint(path))
    save_file(state | {"model.norm.weight": norm.to(torch.float8_e4m3fn)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has dtype F8_E4M3, which is not supported"):
        build(path, Checkpoint(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        Checkpoint(path)


def test_where_a_model_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    for name in (str(tmp_path / "nothing"), "./nothing", "nothing"):
        with pytest.raises(ValueError, match="is no directory"):
            resolve_model(name)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is no directory"):
        resolve_model(str(file))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="the hub does not give it"):
        resolve_model("somebody/no-such-model")


def test_files_that_are_not_the_models_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("qwen3")
    for path in (save(model, tmp_path / "one"), save(model, tmp_path / "many", max_shard_size="100KB")):
        expected = tensors(build(path, Checkpoint(path)))
        (path / "optimizer-ema.safetensors").write_bytes(b"not even a safetensors file")
        state = {name: value + 1 for name, value in load_file(next(path.glob("model*.safetensors"))).items()}
        save_file(state, path / "zzz.safetensors")
        caplog.clear()
        with caplog.at_level("INFO", "moe_runtime.weights"):
            found = tensors(build(path, Checkpoint(path)))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        (record,) = caplog.records
        assert record.getMessage().endswith("not the model's: optimizer-ema.safetensors, zzz.safetensors")


def test_a_tensor_in_two_files_that_count_is_refused_by_name(tmp_path: Path) -> None:
    path = save(make_model("qwen3"), tmp_path)
    (path / "model.safetensors").rename(path / "first.safetensors")
    build(path, Checkpoint(path))
    save_file({"model.norm.weight": torch.ones(48)}, path / "second.safetensors")
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' twice, in first\.safetensors and second\.safetensors"):
        Checkpoint(path)


def test_a_tied_model_with_a_head_of_its_own_keeps_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As transformers does."""
    path = save(make_model("qwen3 bias, tied"), tmp_path)
    file, config = path / "model.safetensors", read_model_config(path)
    state = load_file(file)
    assert "lm_head.weight" not in state and read_stored_config(path) == config
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file)
    assert read_stored_config(path) == config and not caplog.records
    head = torch.randn_like(state["model.embed_tokens.weight"])
    save_file(state | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    found = read_stored_config(path)
    assert found == dataclasses.replace(config, tie_word_embeddings=False)
    (record,) = caplog.records
    assert "lm_head.weight and model.embed_tokens.weight differ" in record.getMessage()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    assert torch.equal(theirs.lm_head.weight, head)
    prompt = torch.randint(2, 97, (20,)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM(path, skip_tokenizer_init=True, dtype="float32", device="cpu") as llm:
        ours = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0].token_ids
    with torch.inference_mode():
        expected = theirs.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=8, max_new_tokens=8)
    assert ours == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, fused: bool) -> None:
    path = save(make_model("qwen3"), tmp_path)
    options = {"skip_tokenizer_init": True, "check_weights": True, "device": "cpu"}
    LLM(path, **options).close()
    if fused:
        fuse_experts(path, read_model_config(path))
    file = path / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.experts.gate_up_proj" if fused else "model.layers.1.mlp.experts.4.up_proj.weight"
    place = (4, 24 + 7, 5) if fused else (7, 5)
    state[name][place] = value
    save_file(state, file)
    with pytest.raises(ValueError, match=re.escape(f"tensor {name!r} is damaged: 1 of {24 * 48} values")) as error:
        LLM(path, **options)
    assert str(error.value).endswith(f"the first at {list(place)}")


def test_a_moving_expert_is_read_in_pieces(tmp_path: Path) -> None:
    """Between two steps a rank reads about as many bytes as it may, whatever the size of an expert."""
    path = save(make_model("qwen3", moe_intermediate_size=256), tmp_path)
    config, source = read_model_config(path), Checkpoint(path)
    kit = KITS["torch"]()
    placement = Placement.even(config.moe_layers, config.moe.num_experts, 1)
    counter = ExpertCounter(len(config.moe_layers), config.moe.num_experts, CPU)
    reader = ModelReader(config, names_of(config.family), source, placement, 0, placement.max_slots, {}, counter, kit)
    experts = kit.experts(1, config.hidden_size, config.moe)
    before, pieces = source.bytes_read, []
    for nbytes in reader.copy_expert(experts, 0, 1, 3, 8192):
        pieces.append(nbytes)
        assert source.bytes_read - before == sum(pieces), "nothing is read ahead"
    assert pieces == [64 * 48 * 4] * 8 + [48 * 256 * 4], "panels of 64 rows"
    state = load_file(path / "model.safetensors")
    prefix = f"model.layers.{config.moe_layers[1]}.mlp.experts.3"
    for found, part in zip(values(experts), ("gate", "up", "down"), strict=True):
        assert torch.equal(found, state[f"{prefix}.{part}_proj.weight"])


def test_only_known_mappings_of_libraries_are_released() -> None:
    code = """
from pathlib import Path
from moe_runtime.system.pages import library_mappings, release_library_pages
import torch

def file_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:"))
    return int(line.split()[1]) * 1024

before = file_bytes()
release_library_pages(frozenset())
assert file_bytes() > 0.9 * before
release_library_pages(library_mappings())
assert file_bytes() < 0.5 * before, (before, file_bytes())
assert torch.ones(3).sum() == 3  # what is needed again comes back
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("model.language_model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("", "lm_head.weight"),
    ],
)
def test_a_model_within_a_larger_one_is_read(
    tmp_path: Path, prefix: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(make_model("glm4 groups"), tmp_path)
    expected = tensors(build(path, Checkpoint(path)))
    file = path / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    renamed = {
        head if name == "lm_head.weight" else name.replace("model.", prefix, 1): tensor
        for name, tensor in state.items()
    }
    if prefix:
        renamed["vision_tower.patch.weight"] = torch.ones(3)
        renamed["model.layers.3.eh_proj.weight"] = torch.ones(3)  # of multi-token prediction
    save_file(renamed, file)
    with caplog.at_level("INFO", "moe_runtime.weights"):
        found = tensors(build(path, Checkpoint(path)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert ("no part of the language model" in caplog.text) == bool(prefix)
