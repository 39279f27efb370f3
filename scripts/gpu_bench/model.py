"""Whole-model tokens per second of one engine, as a separate process: `python -m gpu_bench.model ENGINE SHAPE ...`.

`ours` is `LLM` with dummy weights. `ours-batch-invariant` is the same with `batch_invariant`, and shows its cost.
`ours-eager` is the same with `enforce_eager`, and shows the gain of graphs. `transformers` has random weights in the
same shape and the fastest of its experts implementations. Prompts are random token ids, decoding is greedy. Prints one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

# Names are those of `config.json`. Fewer layers than the model has, so that random weights are made in time.
SHAPES: dict[str, dict[str, int]] = {
    "bench": {
        "num_hidden_layers": 12, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 64, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b-6-layers": {
        "num_hidden_layers": 6, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "vocab_size": 151936,
    },
    "tiny": {
        "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "vocab_size": 128,
    },
}  # fmt: skip
OURS: dict[str, dict[str, bool]] = {
    "ours": {},
    "ours-batch-invariant": {"batch_invariant": True},
    "ours-eager": {"enforce_eager": True},
}
ENGINES = (*OURS, "transformers")
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


def config_of(shape: str) -> dict[str, Any]:
    """The contents of `config.json`."""
    sizes = SHAPES[shape]
    return sizes | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "intermediate_size": sizes["moe_intermediate_size"] * sizes["num_experts_per_tok"],
        "max_position_embeddings": 4096,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
    }


def decode_bytes(shape: str, batch: int, context: int) -> float:
    """Bytes that a decode step must read: attention, gate, head, the experts a random batch uses, keys and values."""
    s = SHAPES[shape]
    D, d, E = s["hidden_size"], s["head_dim"], s["num_experts"]
    attention = D * d * (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"])
    used = E * (1 - (1 - s["num_experts_per_tok"] / E) ** batch)
    keys = 2 * batch * context * s["num_key_value_heads"] * d
    layer = attention + E * D + used * 3 * D * s["moe_intermediate_size"] + keys
    return 2.0 * (s["num_hidden_layers"] * layer + D * s["vocab_size"])


class Ours:
    """`LLM` in this process."""

    def __init__(self, shape: str, device: str, batch: int, length: int, **options: bool) -> None:
        from moe_runtime import LLM

        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(config_of(shape)))
        self.llm = LLM(
            folder, device=device, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True,
            max_num_seqs=batch, max_model_len=length, enable_prefix_caching=False, **options,
        )  # fmt: skip

    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        from moe_runtime import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        outs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(out.outputs[0].token_ids) for out in outs)


class Transformers:
    """The same shape in transformers."""

    def __init__(self, shape: str, device: str, batch: int, length: int) -> None:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        self.device = device
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            self.model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config_of(shape))).eval()
            torch.set_default_dtype(before)
        self.implementation = "eager"
        prompts = [[1 + i % 7 for i in range(8)]] * batch
        seconds = {}
        for implementation in IMPLEMENTATIONS:
            self.implementation = implementation
            try:
                self.generate(prompts, 2)
            except (ValueError, NotImplementedError, RuntimeError):  # an implementation that this machine cannot run
                continue
            begin = time.perf_counter()
            self.generate(prompts, 4)
            seconds[implementation] = time.perf_counter() - begin
        self.implementation = min(seconds, key=lambda name: seconds[name])

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        self.model.set_experts_implementation(self.implementation)
        tokens = torch.tensor(prompts, device=self.device)
        cache, count = None, 0
        for _ in range(new_tokens):
            out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            count += len(tokens)
        assert tokens.max() >= 0  # waits for the device
        return count


def measure(engine: str, shape: str, device: str, batch: int, prompt: int, new_tokens: int, repeats: int) -> Any:
    """Median tokens per second of prefill and decode; decode time is that of long outputs minus that of short ones."""
    length = prompt + new_tokens + 16
    made = (
        Transformers(shape, device, batch, length)
        if engine == "transformers"
        else Ours(shape, device, batch, length, **OURS[engine])
    )
    torch.manual_seed(0)
    vocab = SHAPES[shape]["vocab_size"]

    def seconds(count: int) -> float:
        prompts = torch.randint(vocab, (batch, prompt)).tolist()
        begin = time.perf_counter()
        assert made.generate(prompts, count) == batch * count
        return time.perf_counter() - begin

    seconds(2)
    short = statistics.median(seconds(1) for _ in range(repeats))
    long = statistics.median(seconds(new_tokens + 1) for _ in range(repeats))
    return {
        "engine": f"transformers {made.implementation}" if isinstance(made, Transformers) else engine,
        "shape": shape,
        "batch": batch,
        "prefill_tokens_per_s": batch * prompt / short,
        "decode_tokens_per_s": batch * new_tokens / max(long - short, 1e-9),
        "decode_bytes": decode_bytes(shape, batch, prompt + new_tokens // 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    for name, default in (("batch", 32), ("prompt", 128), ("new-tokens", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print(json.dumps(measure(**vars(args))))


if __name__ == "__main__":
    main()
