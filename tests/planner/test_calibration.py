"""Calibration: temperatures and thresholds are correct, and the command writes files that the engine can read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tiny_models import VOCAB, make_model, save
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from moe_runtime import LLM, SamplingParams
from moe_runtime.build import fit_to_model
from moe_runtime.cli import main as cli
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.expert_policy import PolicyCalibration
from moe_runtime.models.registry import read_model_config
from moe_runtime.planner.calibration import Blocks, Observed, calibrate, find_candidates, fit_temperature
from moe_runtime.worker.worker import Worker


@pytest.fixture(params=["glm4 groups", "qwen3 normalised"])
def worker(request: pytest.FixtureRequest, tmp_path: Path) -> Worker:
    save(make_model(request.param), tmp_path)
    model = read_model_config(tmp_path)
    config = EngineConfig(str(tmp_path), dtype="float32", device="cpu", max_num_seqs=4, max_num_batched_tokens=128)
    return Worker(fit_to_model(config, model), model, tmp_path)


def test_the_temperature_that_made_the_shares_is_found() -> None:
    temperature = 10 ** float(torch.empty(()).uniform_(-2, 1))
    logits_TE = torch.randn(400, 16) * temperature
    experts_TK = torch.rand(400, 16).argsort(1)[:, :5]
    share_TK = (logits_TE.gather(1, experts_TK) / temperature).softmax(1)
    assert fit_temperature(logits_TE, experts_TK, share_TK.square()) == pytest.approx(temperature, rel=1e-3)


@torch.inference_mode()
def test_candidates_keep_what_they_are_for(worker: Worker) -> None:
    model = worker._model_config
    blocks = Blocks(worker, model)
    texts = [torch.randint(2, VOCAB, (90,)).tolist() for _ in range(4)]
    parts = [blocks.observe(text) for text in texts]
    observed = Observed(*(torch.cat([getattr(part, name) for part in parts], 1) for name in vars(parts[0])))
    assert observed.energy_LTK.sum(2).sub(1).abs().max() < 1e-5
    temperature = None
    if model.moe.scoring == "sigmoid":
        temperature = tuple(0.5 + index for index in range(len(model.moe_layers)))
    found = find_candidates(observed, model, [2.0, 1.5], temperature)
    kinds = ["top_k", "top_p", "threshold", "threshold", "top_p", "threshold", "threshold"]
    assert [candidate.kind for candidate in found] == kinds
    for candidate in found:
        # Fewer experts in one layer change what the next sees, and so its gates: about the target, not exactly.
        mean_k = sum(blocks.log_probs(text, candidate.policy)[1] for text in texts) / len(texts)
        assert mean_k == pytest.approx(candidate.target_k, abs=0.15), candidate


def test_the_full_model_is_its_own_measure(worker: Worker) -> None:
    model = worker._model_config
    texts = [torch.randint(2, VOCAB, (70,)).tolist() for _ in range(4)]
    calls: list[None] = []
    found, measured = calibrate(
        worker, model, "tiny", texts[:2], {"a": texts[2:3], "b": texts[3:]}, [2, 1], lambda: calls.append(None)
    )
    assert [row.text for row in measured] == [name for name in ("all", "a", "b") for _ in range(9)]
    assert len(calls) == 2 + 2 * 9
    full = measured[0]
    assert (full.kind, full.mean_k, full.kl) == ("full", model.moe.top_k, 0.0)
    with torch.inference_mode():
        losses = []
        for text in texts[2:]:
            logprobs, _ = Blocks(worker, model).log_probs(text, None)
            losses += [-float(logprobs[place, token]) for place, token in enumerate(text[1:])]
    assert full.perplexity == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-5)
    assert all(row.kl > 0 for row in measured if row.kind != "full")
    for row, a, b in zip(measured[:9], measured[9:18], measured[18:], strict=True):
        assert row.kl == pytest.approx((a.kl + b.kl) / 2)
    for name, target in (("balanced", 2), ("fast", 1)):
        best = min((row for row in measured[1:9] if row.target_k == target), key=lambda row: row.kl)
        assert found.classes[name] == best.policy
    assert (found.temperature is None) == (model.moe.scoring == "softmax")


def with_tokenizer(path: Path) -> None:
    """A token per word."""
    words = tokenizers.Tokenizer(WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)


def test_the_command_writes_what_the_engine_reads(tmp_path: Path, capsys: Any) -> None:
    save(make_model("glm4 groups"), tmp_path)
    with_tokenizer(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{index}" for index in torch.randint(0, VOCAB, (400,)).tolist()))
    outputs = [tmp_path / "routing_calibration.json", tmp_path / "plot.png"]
    words = ["calibrate", str(tmp_path), "--text", str(text), "--mean-k", "3,2", "--block-tokens", "48"]
    words += ["--max-tokens", "192", "--device", "cpu", "--max-num-seqs", "4"]
    assert cli.main([*words, *(word for path in outputs for word in ("-o", str(path)))]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 2 * 4
    assert rows[1].split()[1] == "full"
    assert outputs[1].read_bytes().startswith(b"\x89PNG")
    found = PolicyCalibration.load(outputs[0])
    assert len(found.measured) == 9
    with LLM(tmp_path, device="cpu") as llm:  # finds the file beside the model
        params = SamplingParams(max_tokens=8, temperature=0, routing="fast", return_routed_experts=True)
        experts = llm.generate("w5 w6 w7", params, use_tqdm=False)[0].outputs[0].routed_experts
    assert experts is not None
    assert (experts == 0xFF).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "text: missing"),
        (["--text", "x"], r"mean_k: \[\] is not allowed"),
        (["--text", "x", "--mean-k", "0.5"], r"mean_k: \[0.5\] is not allowed"),
        (["--text", "x", "--mean-k", "2", "-o", "x.txt"], "output: 'x.txt' is not allowed"),
        (["--text", "x", "--mean-k", "2", "--ep-size", "2"], "ep_size: 2 is not allowed"),
        (["--text", "x", "--mean-k", "2", "--capacity-factor", "2"], r"capacity_factor: 2\.0 is not allowed"),
        (["--text", "x", "--mean-k", "2", "--max-tokens", "600"], "max_tokens: 600 is not allowed"),
        (["--text", "x", "--mean-k", "9"], "mean_k: 9 is not allowed; the model uses 4 experts"),
        (["--text", "none.txt", "--mean-k", "2"], "none.txt"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, capsys: Any, words: list[str], message: str) -> None:
    save(make_model("glm4 groups"), tmp_path)
    with_tokenizer(tmp_path)
    assert cli.main(["calibrate", str(tmp_path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
