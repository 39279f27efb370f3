"""How a weight matrix is held. Slots, native packing, Triton, migrations and budgets share this type. No torch.

A quantised weight is (code - zero) * scale, with a scale for each output and each group of inputs. See
`kernels/quantized.py` for the tensors that hold one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PANEL = 64  # outputs of a panel of a packed matrix; see kernels/cpu/gemm.h
TABLE_BYTES = 64  # of a coded panel's table; see kernels/cpu/coded.h
STEP_BYTES = 256  # codes of a step of a quantised panel; see kernels/cpu/quantized.h


class Code(Enum):
    """What stands for a weight: its name in `/health`, its bits, its number in the native kernels.

    INT4 and INT8 are integers, FP4 is E2M1, FP8 is E4M3 (arXiv:2310.10537, OCP's formats). CODED_BFLOAT16 is without
    loss; only native kernels have it (kernels/cpu/coded.h).
    """

    FLOAT32 = ("float32", 32, 0)
    BFLOAT16 = ("bfloat16", 16, None)
    CODED_BFLOAT16 = ("bfloat16", 12, 1)
    INT4 = ("int4", 4, 2)
    FP4 = ("fp4", 4, 3)
    INT8 = ("int8", 8, 4)
    FP8 = ("fp8", 8, 5)

    def __init__(self, label: str, bits: int, native: int | None) -> None:
        self.label, self.bits, self.native = label, bits, native


class Scale(Enum):
    """The type of scales: its name in torch, its bytes, its number in the native kernels.

    E8M0 is a power of two, 2^(byte - 127). E4M3 is multiplied by a float32 factor of each output, in float32.
    """

    FLOAT32 = ("float32", 4, 0)
    FLOAT16 = ("float16", 2, 1)
    BFLOAT16 = ("bfloat16", 2, 2)
    E8M0 = ("uint8", 1, 3)
    E4M3 = ("float8_e4m3fn", 1, 4)

    def __init__(self, dtype: str, nbytes: int, native: int) -> None:
        self.dtype, self.nbytes, self.native = dtype, nbytes, native


@dataclass(frozen=True)
class WeightFormat:
    """A format of matrices.

    Attributes:
        code: of a weight.
        scale: type of the scales; None for weights that are not quantised.
        group: inputs that share a scale, a multiple of 8; None: all inputs of an output.
        has_zero: whether each group has a zero, an integer that is subtracted from its codes.
    """

    code: Code
    scale: Scale | None = None
    group: int | None = None
    has_zero: bool = False

    @classmethod
    def of(cls, dtype: str, native: bool = False) -> WeightFormat:
        """The format of matrices of a dtype that are not quantised; `native` if native kernels hold them.

        Raises:
            ValueError: matrices of this dtype are not supported.
        """
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: {dtype} is not allowed; it must be float32 or bfloat16")
        if dtype == "float32":
            return cls(Code.FLOAT32)
        return cls(Code.CODED_BFLOAT16 if native else Code.BFLOAT16)

    @property
    def is_quantized(self) -> bool:
        return self.scale is not None

    @property
    def name(self) -> str:
        """As `/health` shows it: the code, and the size of a group."""
        return f"{self.code.label} g{self.group}" if self.is_quantized and self.group else self.code.label

    def num_groups(self, inputs: int) -> int:
        """Groups of a row of `inputs` weights; the last may be shorter."""
        return -(-inputs // (self.group or inputs))

    def nbytes(self, outputs: int, inputs: int, native: bool = False) -> int:
        """Bytes of a matrix `[outputs, inputs]`, without escapes; `native`: in panels of the native kernels."""
        if self.scale is None:
            return self._dense_bytes(outputs, inputs, native)
        factor = 4 if self.scale is Scale.E4M3 else 0
        of_group = self.scale.nbytes + self.has_zero
        if not native:
            return outputs * (-(-inputs * self.code.bits // 8) + self.num_groups(inputs) * of_group + factor)
        step = STEP_BYTES * 8 // self.code.bits // PANEL  # inputs of a step
        group = self.group or inputs
        whole, rest = divmod(inputs, group)
        steps = whole * -(-group // step) + -(-rest // step)
        panel = steps * STEP_BYTES + PANEL * (self.num_groups(inputs) * of_group + factor)
        return -(-outputs // PANEL) * panel

    def _dense_bytes(self, outputs: int, inputs: int, native: bool) -> int:
        if not native:
            return outputs * inputs * self.code.bits // 8
        panels = -(-outputs // PANEL)
        if self.code is Code.CODED_BFLOAT16:  # inputs are in pairs
            return panels * (TABLE_BYTES + -(-inputs // 2) * 2 * PANEL * self.code.bits // 8)
        return panels * PANEL * inputs * self.code.bits // 8
