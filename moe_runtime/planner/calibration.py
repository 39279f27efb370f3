"""Finds expert policies for a mean number of experts per token, and measures their loss against the full model.

Shape suffixes: T tokens, D hidden, V vocabulary, E logical experts, K experts per token, L sparse layers,
N computations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_runtime.config.expert_policy import PolicyCalibration
from moe_runtime.config.model import ModelConfig
from moe_runtime.kernels import ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.layers.batch import Batch, BatchPages, StepPolicies
from moe_runtime.layers.kit import SparseBlock
from moe_runtime.types.expert_policy import ExpertPolicy
from moe_runtime.worker.worker import Worker

GRID = 64  # thresholds that are tried in each layer
DIGITS = 6
ALL = "all"
SHARPNESS = (1e-3, 1e6)  # bounds of 1 / temperature, times the spread of the logits


@dataclass(frozen=True)
class Candidate:
    """A policy for a mean number of experts. `scope` is "global", or "per layer" where each layer has its own value."""

    kind: str
    scope: str
    target_k: float
    policy: ExpertPolicy


@dataclass(frozen=True)
class Measured:
    """Results of a policy on held-out text.

    Attributes:
        text: name of the held-out text; "all" for all together.
        kind, scope, target_k: of the candidate; "full": no policy, the model's own top k.
        mean_k: experts that a token really used, mean over tokens and layers.
        perplexity: of the next token.
        kl: mean divergence in nats of the next token's distribution from the full model's.
        policy: the policy's values.
    """

    text: str
    kind: str
    scope: str
    target_k: float
    mean_k: float
    perplexity: float
    kl: float
    policy: ExpertPolicy


@dataclass(frozen=True)
class Observed:
    """Gate and expert outputs of the full model on calibration text, in each sparse layer.

    Attributes:
        logits_LTE: gate logits, float32.
        experts_LTK: chosen experts, best first.
        energy_LTK: share of each in the squared norms of the token's weighted expert rows; sums to 1 over K.
    """

    logits_LTE: Tensor
    experts_LTK: Tensor
    energy_LTK: Tensor


class Blocks:
    """Runs blocks of text through one rank's model, each block as a separate sequence."""

    def __init__(self, worker: Worker, model: ModelConfig) -> None:
        self.worker, self.model = worker, model

    def batch(self, count: int, policies: StepPolicies | None) -> Batch:
        device, size = self.worker.device, self.worker.config.block_size
        pages = list(range(-(-count // size)))
        where_T = torch.arange(count, device=device)
        return Batch(
            position_T=where_T,
            num_prompt_T=torch.full_like(where_T, count),
            pages=[BatchPages(where_T, AttentionMetadata.build([count], [count], [pages], device))]
            * len(self.model.windows),
            num_decode=0,
            dispatcher="local",
            tokens_per_rank=[count],
            policies=policies,
        )

    def log_probs(self, token_ids: Sequence[int], policy: ExpertPolicy | None) -> tuple[Tensor, float]:
        """Log-probabilities `[T, V]` of the next token, and the mean number of experts used."""
        num_layers, top_k = len(self.model.moe_layers), self.model.moe.top_k
        device, count = self.worker.device, len(token_ids)
        chosen_LTK = torch.empty(num_layers, count, top_k, dtype=torch.int16, device=device)
        rows = [each.rows(num_layers, top_k) for each in (ExpertPolicy(), policy or ExpertPolicy())]
        policies_LP4 = torch.tensor(rows, device=device).transpose(0, 1).contiguous()
        which_T = torch.full((count,), int(policy is not None), device=device)
        batch = self.batch(count, StepPolicies(which_T, policies_LP4, chosen_LTK))
        hidden_TD = self.worker.run_batch(torch.tensor(token_ids, device=device), batch)
        mean_k = float((chosen_LTK >= 0).sum()) / (num_layers * count)
        return self.worker.model.logits(hidden_TD).log_softmax(-1), mean_k

    def observe(self, token_ids: Sequence[int]) -> Observed:
        """Run a block through the unchanged model, layer by layer, and record gate choices and expert outputs."""
        model, cache = self.worker.model, self.worker.cache
        batch = self.batch(len(token_ids), None)
        steps = model.attention_steps(batch, model.rope)
        residual_TD = model.embed(torch.tensor(token_ids, device=self.worker.device))
        x_TD = model.first_norm(residual_TD)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for index, (group, layer) in enumerate(zip(cache.page_groups, model.layers, strict=True)):
            x_TD, residual_TD = layer.attention(x_TD, residual_TD, steps[group], cache.layer(index))
            if index in self.model.moe_layers:
                found.append(self._observe_layer(model.sparse_blocks[len(found)], x_TD))
            x_TD, residual_TD = layer.mlp(x_TD, residual_TD, batch)
        return Observed(*(torch.stack(parts) for parts in zip(*found, strict=True)))

    def _observe_layer(self, block: SparseBlock, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights_TK, experts_TK, logits_TE = block.gate(x_TD, 0)
        # With one rank and no spare slots an expert's number is its slot's.
        order_N, counts_E = ops.group_by_slot(experts_TK.flatten(), self.model.moe.num_experts)
        y_ND = block.experts(x_TD, order_N // experts_TK.shape[1], counts_E)
        norm_N = torch.empty(len(order_N), device=y_ND.device)
        norm_N[order_N] = y_ND.float().norm(dim=1)
        energy_TK = (weights_TK * norm_N.view_as(weights_TK)).square()
        return logits_TE, experts_TK, energy_TK / energy_TK.sum(1, keepdim=True).clamp(min=1e-30)


def fit_temperature(logits_TE: Tensor, experts_TK: Tensor, energy_TK: Tensor) -> float:
    """The temperature at which the softmax over a token's chosen experts best predicts their shares of the output.

    The shares are `energy_TK`, from the norms of weighted expert rows. The temperature minimises the mean cross-entropy
    to these shares, which is convex in 1 / temperature.
    """
    z_TK = logits_TE.gather(1, experts_TK).double()
    z_TK = z_TK - z_TK.mean(1, keepdim=True)
    share_TK = energy_TK.double().sqrt()
    share_TK = share_TK / share_TK.sum(1, keepdim=True).clamp(min=1e-30)
    spread = float(z_TK.std()) or 1.0
    low, high = (bound / spread for bound in SHARPNESS)
    for _ in range(80):
        middle = (low * high) ** 0.5
        slope = (((z_TK * middle).softmax(1) - share_TK) * z_TK).sum(1).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(f"{1 / middle:.{DIGITS}g}")


def find_candidates(
    observed: Observed, model: ModelConfig, mean_k: Sequence[float], temperature: tuple[float, ...] | None
) -> list[Candidate]:
    """Policies of every kind for each mean number of experts, fitted to the gates' outputs on calibration text."""
    logits_LTE = observed.logits_LTE
    if temperature is not None:
        logits_LTE = logits_LTE / torch.tensor(temperature, device=logits_LTE.device)[:, None, None]
    probability_LTK = logits_LTE.softmax(-1).gather(2, observed.experts_LTK)
    ratio_LTK = probability_LTK / probability_LTK.amax(2, keepdim=True)
    mass_before_LTK = F.pad(probability_LTK.cumsum(2)[..., :-1], (1, 0))
    found = []
    for target in mean_k:
        share = target / model.moe.top_k
        if float(target).is_integer():
            found.append(Candidate("top_k", "global", target, ExpertPolicy(top_k=int(target))))
        top_p = 10**-DIGITS - _largest(-mass_before_LTK.flatten(), share)  # keeps an expert if the mass is below top_p
        policy = ExpertPolicy(top_p=_rounded(min(top_p, 1.0)), temperature=temperature)
        found.append(Candidate("top_p", "global", target, policy))
        policy = ExpertPolicy(threshold=_rounded(_largest(ratio_LTK.flatten(), share)), temperature=temperature)
        found.append(Candidate("threshold", "global", target, policy))
        per_layer = _thresholds_per_layer(ratio_LTK, observed.energy_LTK, share)
        policy = ExpertPolicy(threshold=[_rounded(value) for value in per_layer], temperature=temperature)
        found.append(Candidate("threshold", "per layer", target, policy))
    return found


def _largest(values: Tensor, share: float) -> float:
    """The value that the given share of the values reaches."""
    count = min(max(round(share * len(values)), 1), len(values))
    return float(values.kthvalue(len(values) - count + 1).values)


def _rounded(value: float) -> float:
    return round(value, DIGITS)


def _thresholds_per_layer(ratio_LTK: Tensor, energy_LTK: Tensor, share: float) -> list[float]:
    """A threshold for each layer; together they keep `share` of all choices and drop little energy.

    Every layer starts with one expert per token. In each step, the layer that gains most from more choices gets them.
    """
    num_layers, _, top_k = ratio_LTK.shape
    kept_G = torch.linspace(1 / top_k, 1.0, GRID, dtype=torch.float64)
    gained_LG, threshold_LG = [], []
    for ratio_TK, energy_TK in zip(ratio_LTK, energy_LTK, strict=True):
        ordered, order = ratio_TK.flatten().sort(descending=True)
        place_G = (kept_G * len(ordered)).round().long() - 1
        gained_LG.append(energy_TK.flatten()[order].double().cumsum(0).cpu()[place_G].tolist())
        threshold_LG.append(ordered.cpu()[place_G].tolist())
    step_L = [0] * num_layers
    for _ in range(round((share - 1 / top_k) / (1 - 1 / top_k) * (GRID - 1) * num_layers)):
        _, layer = max(
            (gained[step + 1] - gained[step], index)
            for index, (gained, step) in enumerate(zip(gained_LG, step_L, strict=True))
            if step + 1 < GRID
        )
        step_L[layer] += 1
    return [thresholds[step] for thresholds, step in zip(threshold_LG, step_L, strict=True)]


def measure(
    blocks: Blocks,
    texts: Mapping[str, Sequence[Sequence[int]]],
    candidates: Sequence[Candidate],
    progress: Callable[[], object],
) -> list[Measured]:
    """Perplexity and divergence from the full model of each candidate, the full model first.

    The results are for all texts together; with several texts, those of each text follow.
    """
    rows = [Candidate("full", "global", float(blocks.model.moe.top_k), ExpertPolicy()), *candidates]
    sums = {
        name: torch.stack([_sums(blocks, text, rows, progress) for text in parts]).sum(0)
        for name, parts in texts.items()
    }
    groups = {ALL: torch.stack(list(sums.values())).sum(0)} | (sums if len(sums) > 1 else {})
    return [
        Measured(
            name,
            candidate.kind,
            candidate.scope,
            candidate.target_k,
            mean_k=used / num_tokens,
            perplexity=math.exp(loss / num_predicted),
            kl=divergence / num_predicted,
            policy=candidate.policy,
        )
        for name, group in groups.items()
        for candidate, (loss, divergence, used, num_tokens, num_predicted) in zip(rows, group.tolist(), strict=True)
    ]


def _sums(blocks: Blocks, text: Sequence[int], rows: Sequence[Candidate], progress: Callable[[], object]) -> Tensor:
    """Sums over a block, for each row: loss, divergence from the first row, experts used, tokens, tokens predicted."""
    target_T1 = torch.tensor(text[1:], device=blocks.worker.device)[:, None]
    whole_TV: Tensor | None = None
    found = []
    for candidate in rows:
        logprob_TV, mean_k = blocks.log_probs(text, candidate.policy if candidate.policy.drops else None)
        logprob_TV = logprob_TV[:-1]
        whole_TV = logprob_TV if whole_TV is None else whole_TV
        loss = -logprob_TV.gather(1, target_T1).double().sum()
        divergence = (whole_TV.exp() * (whole_TV - logprob_TV)).double().sum()
        found.append([float(loss), float(divergence), mean_k * len(text), len(text), len(text) - 1])
        progress()
    return torch.tensor(found, dtype=torch.float64)


@torch.inference_mode()
def calibrate(
    worker: Worker,
    model: ModelConfig,
    name: str,
    calibration: Sequence[Sequence[int]],
    held_out: Mapping[str, Sequence[Sequence[int]]],
    mean_k: Sequence[float],
    progress: Callable[[], object],
) -> tuple[PolicyCalibration, list[Measured]]:
    """Find policies on blocks of calibration text and measure them on held-out blocks, given per text.

    "balanced" and "fast" become the policies that diverge least from the full model at the largest and at the smallest
    of `mean_k`. Calls `progress` after each run of a block.
    """
    blocks = Blocks(worker, model)
    observed = _observe(blocks, calibration, progress)
    temperature = None
    if model.moe.scoring == "sigmoid":
        parts = (observed.logits_LTE, observed.experts_LTK, observed.energy_LTK)
        temperature = tuple(fit_temperature(*layer) for layer in zip(*parts, strict=True))
    measured = measure(blocks, held_out, find_candidates(observed, model, mean_k, temperature), progress)
    classes = {}
    for class_name, target in (("balanced", max(mean_k)), ("fast", min(mean_k))):
        rows = [row for row in measured if row.text == ALL and row.kind != "full" and row.target_k == target]
        classes[class_name] = min(rows, key=lambda row: row.kl).policy
    moe = model.moe
    table = [{name: value for name, value in asdict(row).items() if name != "policy"} for row in measured]
    for row, values in zip(table, measured, strict=True):
        row["policy"] = {key: value for key, value in asdict(values.policy).items() if value and key != "temperature"}
    return (
        PolicyCalibration(
            name, len(model.moe_layers), moe.num_experts, moe.top_k, temperature, classes, measured=table
        ),
        measured,
    )


def _observe(blocks: Blocks, texts: Sequence[Sequence[int]], progress: Callable[[], object]) -> Observed:
    def runs() -> Iterator[Observed]:
        for text in texts:
            yield blocks.observe(text)
            progress()

    parts = zip(*((each.logits_LTE, each.experts_LTK, each.energy_LTK) for each in runs()), strict=True)
    return Observed(*(torch.cat(part, dim=1) for part in parts))
