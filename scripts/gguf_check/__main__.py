"""Compares log-probabilities of the runtime and of llama.cpp on the same GGUF files. See scripts/check_gguf."""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_models import write_gguf
from peers.drivers import Driver
from peers.environments import ensure_environment
from tiny_models import VOCAB, make_model, rope, save

from moe_runtime import LLM, SamplingParams

TOP = 20
PROMPT_LENGTHS = (5, 20, 60)
# llama.cpp keeps keys and values in float16: a thousandth of the logits, more where rounding changes an expert.
# A wrong order of rows or a missing factor gives 0.06 and more.
MOST = 0.03
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=24, mscale=0.7, mscale_all_dim=0.7)
# Of quantised weights: llama.cpp rounds rows to 8 bits for them.
MOST_QUANTIZED = 0.1
# Cases of tiny_models, with the settings that llama.cpp has no other values of.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2moe": ("qwen2", {"mlp_only_layers": [], "head_dim": 8}),
    "qwen3moe": ("qwen3 yarn", {"norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_key_value_heads": 6}),
    "llama": ("mixtral linear", {}),
    "granitemoe": ("granite", {"attention_bias": False}),
    "granitemoe, shared experts": ("granite shared", {}),
    "dots1": ("dots1", {"num_key_value_heads": 6, "attention_bias": False}),
    "ernie4_5-moe": ("ernie", {}),
    "hunyuan-moe": ("hunyuan", {"attention_bias": False}),
    "minimax-m2": ("minimax", {}),
    "glm4moe": ("glm4 groups", {"norm_topk_prob": True}),
    "glm4moe, q/k norm": ("glm4 norm, bias", {}),
    "gpt-oss": ("gpt-oss", {"swiglu_limit": 7.0, **rope("default")}),
    "deepseek2, softmax": ("deepseek2", YARN),
    "deepseek2, sigmoid": ("deepseek3", YARN),
}
# Types of all matrices of a `qwen3moe` with rows of 256 weights.
KINDS = (Kind.Q8_0, Kind.Q5_0, Kind.Q5_1, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
}


def ours(file: Path, prompts: list[list[int]]) -> list[list[dict[int, float]]]:
    """Log-probabilities of some tokens at every position from 1 on, by prompt."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=TOP)
    with LLM(file, skip_tokenizer_init=True, max_model_len=96, max_num_seqs=4, device="cpu") as llm:
        outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, False)
    return [
        [{token: entry.logprob for token, entry in (position or {}).items()} for position in out.prompt_logprobs[1:]]
        for out in outs
    ]


def theirs(python: Path, file: Path, prompts: list[list[int]]) -> list[list[dict[int, float]]]:
    """As `ours`, of llama.cpp."""
    options: dict[str, Any] = {"environment": {}, "log": file.with_suffix(".log"), "deadline_s": 120.0}
    with Driver("llama.cpp", python, "peers.llamacpp_engine", [str(file), "1"], **options) as driver:
        answers = driver.call("logprobs", prompts=prompts, top=TOP)
    return [[dict(zip(ids, values, strict=True)) for ids, values in positions] for positions in answers]


def differences(first: list[list[dict[int, float]]], second: list[list[dict[int, float]]]) -> np.ndarray:
    """Of the log-probabilities that both have."""
    pairs = [pair for one, other in zip(first, second, strict=True) for pair in zip(one, other, strict=True)]
    return np.array([abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()])


def _kind(kind: Kind, name: str) -> Kind:
    return Kind.F32 if "norm" in name else kind


def main() -> int:
    parser = argparse.ArgumentParser(prog="check_gguf", description="Compare GGUF files with llama.cpp.")
    parser.add_argument("--seed", type=int, default=0)
    torch.manual_seed(parser.parse_args().seed)
    python, failed = ensure_environment("llama.cpp-no-amx"), False
    print("| architecture | log-probabilities | mean difference | largest |\n|---|---:|---:|---:|")
    plain = [(name, case, settings, Kind.F32) for name, (case, settings) in CASES.items()]
    quantized = [(f"qwen3moe, {kind.name}", "qwen3 normalised", WIDE, kind) for kind in KINDS]
    for name, case, settings, kind in plain + quantized:
        prompts = [torch.randint(VOCAB, (length,)).tolist() for length in PROMPT_LENGTHS]
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = save(make_model(case, **settings), Path(folder) / "model")
            file = write_gguf(checkpoint, Path(folder) / "model.gguf", partial(_kind, kind))
            found = differences(ours(file, prompts), theirs(python, file, prompts))
        failed |= not (found.size > 0 and found.mean() < (MOST if kind is Kind.F32 else MOST_QUANTIZED))
        print(f"| {name} | {found.size} | {found.mean():.4f} | {found.max():.4f} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
