"""Checkpoints that a real DeepSpeed engine wrote: DeepSpeed's outputs on any number of ranks; refused checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from deepspeed_ranks import NUM_EXPERTS, train_and_save
from places import SCRIPTS
from rank_pool import PoolExecutor, RankPool
from tiny_models import BASE, edit_config
from torch import Tensor

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.models.registry import open_weights, read_model_config
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.weights.checkpoint import Checkpoint
from moe_runtime.weights.deepspeed import DeepSpeedCheckpoint

NUM_TOKENS = 12
TAG = "global_step3"


@dataclass(frozen=True)
class Trained:
    """A checkpoint, and what DeepSpeed itself answers with it."""

    path: Path
    prompts: list[list[int]]
    logits: list[Tensor]
    outputs: list[list[int]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Trained]]:
    """`trained(case)` gives a checkpoint of two ranks; each is made once."""
    made: dict[str, Trained] = {}
    pools: list[RankPool] = []

    def get(case: str) -> Trained:
        if case not in made:
            if not pools:
                pools.append(RankPool(2))
            path = tmp_path_factory.mktemp("deepspeed")
            prompts = [torch.randint(2, BASE["vocab_size"], (length,)).tolist() for length in (5, 17, 30)]
            seed = int(torch.randint(1 << 30, ()))
            (logits, outputs), (others, _) = pools[0].run(train_and_save, case, seed, path, prompts, NUM_TOKENS)
            torch.testing.assert_close(logits, others)  # both ranks of DeepSpeed have one model
            made[case] = Trained(path, prompts, logits, outputs)
        return made[case]

    yield get
    for pool in pools:
        pool.close()


@pytest.fixture
def checkpoint(trained: Callable[[str], Trained], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(trained("qwen3_moe").path, tmp_path / "copy")


def open_it(path: Path) -> DeepSpeedCheckpoint:
    source = open_weights(path, read_model_config(path))
    assert isinstance(source, DeepSpeedCheckpoint)
    return source


def edit_state(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def expert_file(path: Path, row: int, expert: int) -> Path:
    return path / TAG / f"layer_{row}_expert_{expert}_mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("case", "ep_size"), [("qwen3_moe", 1), ("qwen3_moe", 4), ("qwen3_moe top 1", 2), ("mixtral", 2)]
)
def test_outputs_are_deepspeeds_own(
    trained: Callable[[str], Trained], rank_pool: Callable[[int], RankPool], case: str, ep_size: int
) -> None:
    model = trained(case)
    config = EngineConfig(str(model.path), ep_size=ep_size, dtype="float32", skip_tokenizer_init=True, device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, prompt_logprobs=20)
    engine = build_engine(config, lambda config, model, path: PoolExecutor(rank_pool(ep_size), config, model, path))
    try:
        for index, prompt in enumerate(model.prompts):
            engine.add_request(str(index), prompt, params)
        outputs: list[list[int]] = [[] for _ in model.prompts]
        prompt_logprobs: list[list[Any]] = [[] for _ in model.prompts]
        while engine.has_work:
            for delta in engine.step():
                outputs[int(delta.request_id)] += delta.token_ids
                prompt_logprobs[int(delta.request_id)] += delta.prompt_logprobs or []
    finally:
        engine.close()
    assert outputs == model.outputs
    for entries, logits in zip(prompt_logprobs, model.logits, strict=True):
        exact, scale = logits.log_softmax(-1), logits.abs().max().item()
        assert len(entries) == len(logits)
        for row, entry in enumerate(entries[1:]):
            assert set(exact[row].topk(20).indices.tolist()) <= set(entry)
            for token, found in entry.items():
                assert found.logprob == pytest.approx(exact[row, token].item(), abs=2e-4 * scale)


def test_deepspeed_itself_is_not_needed(trained: Callable[[str], Trained]) -> None:
    model = trained("mixtral")
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from moe_runtime import LLM, SamplingParams\n"
        f"params = SamplingParams(temperature=0, max_tokens={NUM_TOKENS}, ignore_eos=True)\n"
        f"with LLM({str(model.path)!r}, skip_tokenizer_init=True, device='cpu') as llm:\n"
        f"    outs = llm.generate({{'prompt_token_ids': {model.prompts[0]}}}, params, use_tqdm=False)\n"
        "print(outs[0].outputs[0].token_ids)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == model.outputs[0]


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = SCRIPTS / "import_deepspeed.py"
    command = [sys.executable, script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("case", "max_shard_bytes"), [("qwen3_moe", 100_000), ("qwen3_moe top 1", 1 << 30), ("mixtral", 1 << 30)]
)
def test_the_converted_checkpoint_is_transformers_model(
    trained: Callable[[str], Trained], tmp_path: Path, case: str, max_shard_bytes: int
) -> None:
    model = trained(case)
    done = run_script(model.path, tmp_path / "hf", "--max-shard-bytes", max_shard_bytes)
    assert done.returncode == 0, done.stderr
    num_files = len(list((tmp_path / "hf").glob("*.safetensors")))
    assert f"wrote {num_files} file(s)" in done.stdout and (num_files > 2) == (max_shard_bytes == 100_000)
    transformers.utils.logging.disable_progress_bar()
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    for prompt, logits in zip(model.prompts, model.logits, strict=True):
        with torch.no_grad():
            found = theirs(torch.tensor([prompt])).logits[0]
        assert (found - logits).abs().max() / logits.abs().max() < 1e-4
    converted, source = Checkpoint(tmp_path / "hf"), open_it(model.path)
    for name in source.names:
        tensor = source.read_any(name)
        assert torch.equal(converted.read(name, tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("damage", ["missing", "damaged or truncated"])
def test_the_script_says_what_is_wrong_in_one_line(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    file = expert_file(checkpoint, 1, 3)
    file.unlink() if damage == "missing" else file.write_bytes(b"not a file of torch")
    done = run_script(checkpoint, tmp_path / "hf")
    assert done.returncode == 2 and not (tmp_path / "hf").exists()
    assert f"{file.name} is {damage}" in done.stderr and done.stderr.count("\n") == 1


def test_the_script_writes_into_a_new_folder_only(checkpoint: Path, tmp_path: Path) -> None:
    for path, output, message in (
        (checkpoint, tmp_path, f"output: {tmp_path} exists"),
        (tmp_path / "nothing", tmp_path / "hf", "is no directory"),
    ):
        done = run_script(path, output)
        assert done.returncode == 2 and message in done.stderr


def test_ranks_of_an_engine_read_only_their_own_experts(
    trained: Callable[[str], Trained], rank_pool: Callable[[int], RankPool]
) -> None:
    path = trained("qwen3_moe").path
    model = read_model_config(path)
    executor = PoolExecutor(rank_pool(4), EngineConfig(str(path), ep_size=4, dtype="float32"), model, path)
    source = open_it(path)
    for name in source.names:
        source.read_any(name)
    experts = 3 * model.hidden_size * model.moe.intermediate_size * 4 * len(model.moe_layers) * NUM_EXPERTS
    assert executor.bytes_read() == [source.bytes_read - experts + experts // 4] * 4
    executor.close()


def test_files_of_experts_that_nobody_asks_for_are_not_opened(checkpoint: Path) -> None:
    model = read_model_config(checkpoint)
    own = {0, 5}
    for row in range(2):
        for expert in set(range(NUM_EXPERTS)) - own:
            expert_file(checkpoint, row, expert).write_bytes(b"of another rank")
    source = open_it(checkpoint)
    shape = (model.moe.intermediate_size, model.hidden_size)
    for layer in model.moe_layers:
        for expert in own:
            assert source.read(f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", shape).isfinite().all()
    with pytest.raises(ValueError, match=r"layer_1_expert_3_mp_rank_00_model_states\.pt is damaged or truncated"):
        source.read("model.layers.2.mlp.experts.3.gate_proj.weight", shape)


def test_a_file_of_an_expert_that_changes_is_not_read_any_more(checkpoint: Path) -> None:
    """It may be read while serving, so it is never mapped."""
    model = read_model_config(checkpoint)
    source = open_it(checkpoint)
    shape = (model.moe.intermediate_size, model.hidden_size)
    file = expert_file(checkpoint, 1, 3)
    kept = source.read("model.layers.2.mlp.experts.2.gate_proj.weight", shape)
    assert "layer_1_expert_" not in Path("/proc/self/maps").read_text()
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"layer_1_expert_3_\S+ has changed since it was opened \(.*\); restart"):
        source.read("model.layers.2.mlp.experts.3.gate_proj.weight", shape)
    assert kept.isfinite().all()


def test_what_is_read_is_a_copy(checkpoint: Path) -> None:
    source = open_it(checkpoint)
    found = source.read_any("model.norm.weight")
    before = found.clone()
    content = bytearray((checkpoint / TAG / "mp_rank_00_model_states.pt").read_bytes())
    (checkpoint / TAG / "mp_rank_00_model_states.pt").write_bytes(bytes(len(content)))
    assert torch.equal(found, before)


def test_a_tag_can_be_served_by_itself(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "config.json", checkpoint / TAG)
    ours, other = open_it(checkpoint / TAG), open_it(checkpoint)
    assert ours.names == other.names
    assert torch.equal(ours.read_any("lm_head.weight"), other.read_any("lm_head.weight"))


def test_safetensors_files_come_first(checkpoint: Path) -> None:
    """A trainer may write both; then the gate is the family's own."""
    (checkpoint / "model.safetensors").touch()
    assert not read_model_config(checkpoint).moe.gate_float32


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "layer_1_expert_6_mp_rank_00_model_states.pt"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / TAG / name).unlink()
    with pytest.raises(ValueError, match=rf"{TAG}/{name} is missing; config\.json means 2 sparse layers of 8 experts"):
        open_it(checkpoint)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("layer_0_expert_8_mp_rank_00_model_states.pt", "config.json means 2 sparse layers of 8 experts"),
        ("layer_2_expert_0_mp_rank_00_model_states.pt", "config.json means 2 sparse layers of 8 experts"),
        ("layer_0_expert_0_mp_rank_01_model_states.pt", "tensor parallel"),
        ("mp_rank_01_model_states.pt", "tensor parallel"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "ZeRO stage 3"),
        ("layer_01-model_00-model_states.pt", "pipeline parallel"),
        ("expert_3_mp_rank_00_model_states.pt", "old layout"),
        ("other_model_states.pt", "config.json means 2 sparse layers of 8 experts"),
    ],
)
def test_a_foreign_file_is_named(checkpoint: Path, name: str, why: str) -> None:
    (checkpoint / TAG / name).touch()
    with pytest.raises(ValueError, match=rf"{TAG}/{name} does not belong here: .*{why}"):
        open_it(checkpoint)


def test_an_expert_in_the_wrong_file_is_refused(checkpoint: Path) -> None:
    first, second = (expert_file(checkpoint, 0, expert) for expert in (1, 2))
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=rf"{first.name} holds \[.*deepspeed_experts\.2\."):
        open_it(checkpoint).read_any("model.layers.0.mlp.experts.1.up_proj.weight")


@pytest.mark.parametrize("length", [0, 0.5, 0.999])
def test_a_truncated_file_is_named(checkpoint: Path, length: float) -> None:
    file = checkpoint / TAG / "mp_rank_00_model_states.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * length)])
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt is damaged or truncated"):
        open_it(checkpoint)


def test_nothing_in_a_file_is_run(checkpoint: Path) -> None:
    """Pickles can call anything when they are read; only plain data is."""
    edit_state(checkpoint / TAG / "mp_rank_00_model_states.pt", lambda state: state.update(args=Namespace(lr=0.1)))
    with pytest.raises(ValueError, match=r"more than tensors and plain values \(argparse\.Namespace\)"):
        open_it(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("module"), r"has no 'module'"),
        (lambda state: state.update(num_experts=[8, 4]), r"num_experts \[8, 4\], but config\.json means \[8, 8\]"),
        (
            lambda state: state["module"].pop("model.layers.2.mlp.deepspeed_moe.gate.wg.weight"),
            r"DeepSpeed-MoE blocks .* in layers \[0\], but config\.json means layers \[0, 2\]",
        ),
        (
            lambda state: state["module"].update({"model.layers.2.mlp.coefficient.weight": torch.randn(2, 48)}),
            r"'model\.layers\.2\.mlp\.coefficient\.weight', which is not supported in a sparse layer",
        ),
        (lambda state: state["module"].pop("model.embed_tokens.weight"), r"must have one tensor"),
        (lambda state: state["module"].update(step=3), r"'step', which is no tensor"),
    ],
)
def test_a_state_of_another_model_is_refused(checkpoint: Path, change: Callable[..., object], message: str) -> None:
    edit_state(checkpoint / TAG / "mp_rank_00_model_states.pt", change)
    with pytest.raises(ValueError, match=rf"mp_rank_00_model_states\.pt .*{message}"):
        open_it(checkpoint)


def test_a_tensor_that_does_not_fit_is_refused(checkpoint: Path) -> None:
    file = checkpoint / TAG / "mp_rank_00_model_states.pt"
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' of .* has shape \[48\].*\[47\]"):
        open_it(checkpoint).read("model.norm.weight", (47,))
    with pytest.raises(ValueError, match=r"no tensor 'model\.nothing'"):
        open_it(checkpoint).read("model.nothing", (48,))
    edit_state(file, lambda state: state["module"].update({"model.norm.weight": torch.arange(48)}))
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' of .* has dtype torch\.int64"):
        open_it(checkpoint).read_any("model.norm.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, r"^norm_topk_prob: .* num_experts_per_tok 3 .* means true"),
        ({"num_experts_per_tok": 1}, r"^norm_topk_prob: .* num_experts_per_tok 1 .* means false"),
        ({"num_local_experts": 16, "num_experts": None}, r"layer_0_expert_8_.* is missing"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(checkpoint, changes)
    with pytest.raises(ValueError, match=message):
        open_it(checkpoint)


def test_a_family_that_no_deepspeed_gate_fits_is_refused(checkpoint: Path) -> None:
    config = {"model_type": "glm4_moe", "num_attention_heads": 8}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^model_type: 'glm4_moe' is not allowed with a DeepSpeed checkpoint"):
        read_model_config(checkpoint)


@pytest.mark.parametrize("tag", ["nothing", "../elsewhere", "/tmp", ""])
def test_a_wrong_latest_is_refused(checkpoint: Path, tag: str) -> None:
    (checkpoint / "latest").write_text(tag)
    with pytest.raises(ValueError, match=r"latest names .*, which is no folder beside it"):
        read_model_config(checkpoint)


def test_a_tag_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "empty").mkdir()
    (checkpoint / "latest").write_text("empty\n")
    with pytest.raises(ValueError, match=r"empty holds no \*model_states\.pt"):
        read_model_config(checkpoint)
