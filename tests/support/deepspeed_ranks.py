"""Functions for ranks with a real DeepSpeed: train a small model, save it, generate with it; run one MoE layer.

They run in a pool of their own, since deepspeed does not clean up its process groups and settings.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rank_pool import RankContext
from tiny_models import BASE
from torch import Tensor, nn

NUM_EXPERTS, INNER = 8, 24
CONFIGS: dict[str, dict[str, Any]] = {
    # The experts' attribute names are those of Hugging Face; a dense layer is between the sparse ones.
    "qwen3_moe": {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": INNER,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    # One expert per token, whose weight is its score.
    "qwen3_moe top 1": {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": INNER,
        "norm_topk_prob": False,
    },
    # The model wrapped by the training script, the MoE layer wrapped by a block, experts with Mixtral's names.
    "mixtral": {
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "intermediate_size": INNER,
        "sliding_window": 20,
    },
}
MOE_OPTIONS: dict[str, Any] = {
    "drop_tokens": False,
    "min_capacity": 0,
    "use_rts": False,
    "top2_2nd_expert_sampling": False,
}


class SwiGLU(nn.Module):
    """An expert with the names of its three matrices, in order gate, up, down."""

    def __init__(self, hidden_size: int, intermediate_size: int, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        for name, sizes in zip(
            names, ((hidden_size, intermediate_size),) * 2 + ((intermediate_size, hidden_size),), strict=True
        ):
            linear = nn.Linear(*sizes, bias=False)
            nn.init.normal_(linear.weight, std=0.2)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(nn.functional.silu(gate(x)) * up(x))


class Wrapped(nn.Module):
    """A training script's own module around the language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.lm = model

    def forward(self, **inputs: Any) -> Any:
        return self.lm(**inputs)


def build_model(case: str, ep_size: int) -> nn.Module:
    """A Hugging Face model whose sparse blocks are DeepSpeed's MoE layers."""
    from deepspeed.moe.layer import MoE

    class Block(MoE):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class Holder(nn.Module):
        def __init__(self, moe: nn.Module) -> None:
            super().__init__()
            self.moe = moe

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(x)[0]

    settings = CONFIGS[case]
    options = {"num_experts": NUM_EXPERTS, "ep_size": ep_size, "k": settings["num_experts_per_tok"], **MOE_OPTIONS}
    hidden = BASE["hidden_size"]
    if case == "mixtral":
        config = transformers.MixtralConfig(**{**BASE, **settings})
        model = transformers.MixtralForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp = Holder(MoE(hidden, SwiGLU(hidden, INNER, ("w1", "w3", "w2")), **options))
    else:
        config = transformers.Qwen3MoeConfig(**{**BASE, **settings})
        model = transformers.Qwen3MoeForCausalLM(config)
        for index, layer in enumerate(model.model.layers):
            if index not in config.mlp_only_layers:
                layer.mlp = Block(hidden, SwiGLU(hidden, INNER, ("gate_proj", "up_proj", "down_proj")), **options)
    for name, tensor in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.normal_(tensor, 1.0, 0.2)
        if name.endswith("gate.wg.weight"):
            nn.init.normal_(tensor, std=0.8)  # clear choices, so that rounding does not flip an expert
        if ".deepspeed_experts." in name:
            nn.init.normal_(tensor, std=0.2)  # deepspeed initializes all experts as copies of one
    return Wrapped(model) if case == "mixtral" else model


def train_and_save(
    context: RankContext, case: str, seed: int, folder: Path, prompts: list[list[int]], num_tokens: int
) -> tuple[list[Tensor], list[list[int]]]:
    """Train three steps and save a checkpoint; return the logits of each prompt, and its greedy output."""
    engine, config = _engine(context, case, seed)
    vocab = BASE["vocab_size"]
    for _ in range(3):
        tokens = torch.randint(0, vocab, (2, 16))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder))
    if context.rank == 0:
        config.save_pretrained(folder)
    engine.eval()
    logits, outputs = [], []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(num_tokens):
                last = engine(input_ids=torch.tensor([ids])).logits[0]
                if len(ids) == len(prompt):
                    logits.append(last.clone())
                ids.append(int(last[-1].argmax()))
            outputs.append(ids[len(prompt) :])
    return logits, outputs


def _engine(context: RankContext, case: str, seed: int) -> tuple[Any, Any]:
    os.environ["LOCAL_RANK"] = str(context.rank)
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    # deepspeed compiles this op on first use, and nothing here calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(seed + context.rank)  # the engine makes all weights except the experts equal
    deepspeed.init_distributed("gloo")
    model = build_model(case, context.num_ranks)
    config = model.lm.config if case == "mixtral" else model.config
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    settings = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0}
    if case == "mixtral":
        settings |= {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine, config
