"""Which matrices of a checkpoint are quantised, and how they are stored. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property

from moe_runtime.types.weight_format import Code, Scale, WeightFormat

FP8, MXFP8 = WeightFormat(Code.FP8, Scale.FLOAT32), WeightFormat(Code.FP8, Scale.E8M0, 32)
MXFP4, NVFP4 = WeightFormat(Code.FP4, Scale.E8M0, 32), WeightFormat(Code.FP4, Scale.E4M3, 16)
WEIGHT = "weight"
# Parts of a module's name that say that it is plain in every checkpoint, as are norms.
PLAIN = {"embed_tokens", "gate", "router", "shared_expert_gate"}
FUSED = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")


class Layout(Enum):
    """How the tensors of a quantised matrix are packed. The modules of `weights/formats/` read them."""

    SCALED = auto()  # codes of 8 bits
    PACKED = auto()  # integers of compressed-tensors
    MXFP4 = auto()  # compressed-tensors
    MXFP4_BLOCKS = auto()  # gpt-oss
    NVFP4 = auto()  # ModelOpt: scales are multiplied by that of the tensor
    NVFP4_DIVIDED = auto()  # compressed-tensors: scales are divided by that of the tensor
    AWQ = auto()
    GPTQ = auto()  # zeros are stored less 1
    GPTQ_V2 = auto()


@dataclass(frozen=True)
class Storage:
    """How a checkpoint stores a matrix.

    Attributes:
        format: in which it is held. The type of scales of integers is a guess; the file knows.
        codes, scales: what stands in place of `weight` in the name of the tensor with the codes, with the scales.
        block_rows: outputs that share scales.
        act_order: inputs of a group are not adjacent, so it is only read dequantised.
    """

    layout: Layout
    format: WeightFormat
    codes: str = WEIGHT
    scales: str = "weight_scale"
    block_rows: int = 1
    act_order: bool = False


@dataclass(frozen=True)
class Rule:
    """Modules that are stored alike.

    Attributes:
        storage: None: they are not quantised.
        names: of modules; those below them are meant too.
        patterns: regular expressions, which match the beginning of a module's name.
    """

    storage: Storage | None
    names: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        return re.compile("|".join(f"(?:{pattern})" for pattern in self.patterns)) if self.patterns else None

    def matches(self, module: str) -> bool:
        parts = module.split(".")
        if any(".".join(parts[:count]) in self.names for count in range(1, len(parts) + 1)):
            return True
        return self._pattern is not None and self._pattern.match(module) is not None


@dataclass(frozen=True)
class Scheme:
    """What a configuration says of all matrices. The first rule that matches counts; without one, nothing is quantised.

    Names are those of the plain model, as `model.layers.0.mlp.experts.3.down_proj.weight`.
    """

    rules: tuple[Rule, ...]

    def storage_of(self, name: str) -> Storage | None:
        """How a tensor is stored if it is quantised; a checkpoint may have left it as it was."""
        module = _module_of(name)
        if module is None:
            return None
        return next((rule.storage for rule in self.rules if rule.matches(module)), None)

    def format_of(self, name: str) -> WeightFormat | None:
        """How a matrix is held; None: not quantised, or only read dequantised."""
        storage = self.storage_of(name)
        return None if storage is None or storage.act_order else storage.format


def part_name(name: str, part: str) -> str:
    """The name of a tensor that stores a part of a matrix.

    `a.weight` has the parts `a.weight_scale` and `a.qweight`; `experts.down_proj`, all experts in one tensor, has
    `experts.down_proj_scale`.
    """
    return name + part.removeprefix(WEIGHT) if part.startswith(WEIGHT) else name.removesuffix(WEIGHT) + part


def _module_of(name: str) -> str | None:
    """The module of a tensor that may be quantised."""
    module = name.removesuffix(f".{WEIGHT}")
    parts = module.split(".")
    if parts[-1].endswith("norm") or PLAIN.intersection(parts):
        return None
    return module if module != name or FUSED.fullmatch(name) else None
