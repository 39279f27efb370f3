"""Layer shapes of open models, and random experts per token with a chosen imbalance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One sparse layer with its attention. `num_experts` experts are held here; each token uses `top_k` of them."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in 16 bits."""
        return 3 * self.hidden * self.intermediate * 2

    def within(self, nbytes: float) -> Shape:
        """The same shape with the number of experts halved until they fit; its name shows it."""
        count = self.num_experts
        while count * self.expert_bytes > nbytes and count > self.top_k:
            count = max(self.top_k, count // 2)
        name = self.name if count == self.num_experts else f"{self.name} ({count} of {self.num_experts} experts)"
        return replace(self, name=name, num_experts=count)


SHAPES = (
    Shape("Mixtral-8x7B", 8, 2, 4096, 14336, 32, 8, 128),
    Shape("Qwen3-30B-A3B", 128, 8, 2048, 768, 32, 4, 128),
    Shape("DeepSeek-V3", 256, 8, 7168, 2048, 128, 128, 128),
    Shape("gpt-oss-120b", 128, 4, 2880, 2880, 64, 8, 64),
)
SMALL_SHAPES = (Shape("small", 8, 2, 64, 48, 4, 2, 16), Shape("odd", 7, 3, 40, 36, 3, 1, 20))
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
SMALL_TOKENS = (1, 9, 64)
SKEWS = ("balanced", "zipf")


def route(shape: Shape, num_tokens: int, skew: str, device: torch.device, seed: int = 0) -> Tensor:
    """Experts of each token, `[T, K]`, all different: balanced, or expert `i` with a weight of `1 / (i + 1)`."""
    generator = torch.Generator().manual_seed(seed)
    weight_E = torch.ones(shape.num_experts)
    if skew == "zipf":
        weight_E /= torch.arange(1, shape.num_experts + 1)
    # The K first arrivals of exponential races at these rates are a draw without replacement.
    race_TE = torch.empty(num_tokens, shape.num_experts).exponential_(generator=generator) / weight_E
    return race_TE.topk(shape.top_k, dim=1, largest=False).indices.to(device)


def group(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`(token of each grouped row, rows of each expert)`."""
    flat = experts_TK.flatten()
    return flat.argsort(stable=True) // experts_TK.shape[1], torch.bincount(flat, minlength=num_experts)
