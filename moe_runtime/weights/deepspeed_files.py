"""The files of a DeepSpeed-MoE checkpoint, as `DeepSpeedEngine.save_checkpoint` of deepspeed 0.19 writes them.

A folder given to `save_checkpoint` holds `latest`, a file with the name of the newest tag, and a sub-folder per tag
with `mp_rank_00_model_states.pt`, all weights but the experts', and `layer_{L}_expert_{E}_mp_rank_00_model_states.pt`,
one expert each. L counts the sparse layers, E the experts of a layer. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from moe_runtime.config.model import ModelConfig

FAMILIES = ("qwen3_moe", "mixtral")
MODEL_FILE = "mp_rank_00_model_states.pt"
ADVICE = (
    (r"zero_pp_rank_\d+_mp_rank_", "its weights are partitioned (ZeRO stage 3); save with stage 0, 1 or 2"),
    (r"(layer_\d+_expert_\d+_)?mp_rank_(?!00_)\d+_", "the model was split (tensor parallel); save it whole"),
    (r"layer_\d+-model_", "the model was split (pipeline parallel); save it without"),
    (r"expert_\d+_mp_rank_", "it is of an old layout; load and save it with deepspeed 0.19"),
)


@dataclass(frozen=True)
class DeepSpeedFiles:
    """One tag of a checkpoint.

    Attributes:
        folder: the folder of the tag's files.
        names: names of all its files with weights.
    """

    folder: Path
    names: frozenset[str]

    @classmethod
    def find(cls, path: Path) -> DeepSpeedFiles | None:
        """The checkpoint that `path` is or that its `latest` names. None if there is none, or there are safetensors.

        Raises:
            ValueError: `latest` names no folder with weights.
        """
        if any(path.glob("*.safetensors")):
            return None
        latest, folder = path / "latest", path
        if latest.is_file():
            tag = latest.read_text(errors="replace").strip()
            folder = path / tag
            if not tag or Path(tag).name != tag or not folder.is_dir():
                raise ValueError(f"model: {latest} names {tag!r}, which is no folder beside it")
        names = frozenset(file.name for file in folder.glob("*model_states.pt"))
        if not names and folder != path:
            raise ValueError(f"model: {folder} holds no *model_states.pt")
        return cls(folder, names) if names else None

    @property
    def model(self) -> Path:
        """The file with all weights but the experts'."""
        return self.folder / MODEL_FILE

    def expert(self, row: int, expert: int) -> Path:
        """The file of an expert of the sparse layer `row`, counted from 0 among the sparse layers."""
        return self.folder / f"layer_{row}_expert_{expert}_mp_rank_00_model_states.pt"

    def check(self, config: ModelConfig) -> None:
        """Compare the file names with `config`. Raises ValueError that names a foreign or a missing file."""
        num_layers, num_experts = len(config.moe_layers), config.moe.num_experts
        shape = f"{num_layers} sparse layers of {num_experts} experts"
        experts = {self.expert(row, expert).name for row in range(num_layers) for expert in range(num_experts)}
        expected = {MODEL_FILE} | experts
        for name in sorted(self.names - expected, key=_numbers):
            advice = next((text for pattern, text in ADVICE if re.match(pattern, name)), f"config.json means {shape}")
            raise ValueError(f"model: {self.folder / name} does not belong here: {advice}")
        for name in sorted(expected - self.names, key=_numbers):
            raise ValueError(f"model: {self.folder / name} is missing; config.json means {shape}")


def with_deepspeed_gate(config: ModelConfig) -> ModelConfig:
    """The configuration with the gate of `deepspeed.moe.sharded_moe.TopKGate`: softmax over gate logits in float32,
    weights divided by their sum for k of 2 and more, and not for k = 1.

    Raises:
        ValueError: `config.json` describes another family or another gate.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"model_type: {config.family!r} is not allowed with a DeepSpeed checkpoint; known: {FAMILIES}")
    if config.moe.normalize_topk != (config.moe.top_k > 1):
        need = "true" if config.moe.top_k > 1 else "false, which only qwen3_moe can be"
        raise ValueError(
            f"norm_topk_prob: does not fit num_experts_per_tok {config.moe.top_k} in config.json; "
            f"DeepSpeed's gate means {need}"
        )
    return replace(config, moe=replace(config.moe, gate_float32=True))


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
