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
    """What stands for a weight.

    INT4 and INT8 are integers, FP4 is E2M1, FP8 is E4M3 (arXiv:2310.10537, OCP's formats). CODED_BFLOAT16 is without
    loss; only native kernels have it (kernels/cpu/coded.h).
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    CODED_BFLOAT16 = "coded bfloat16"
    INT4 = "int4"
    FP4 = "fp4"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def bits(self) -> int:
        """Of one weight."""
        return {"float32": 32, "bfloat16": 16, "coded bfloat16": 12}.get(self.value) or int(self.value[-1])

    @property
    def native(self) -> int:
        """Its number in the native kernels."""
        return {"float32": 0, "coded bfloat16": 1, "int4": 2, "fp4": 3, "int8": 4, "fp8": 5}[self.value]


class Scale(Enum):
    """The type of scales.

    E8M0 is a power of two, 2^(byte - 127). E4M3 is multiplied by a float32 factor of each output, in float32.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    E8M0 = "e8m0"
    E4M3 = "e4m3"

    @property
    def dtype(self) -> str:
        """Its name in torch."""
        return {"e8m0": "uint8", "e4m3": "float8_e4m3fn"}.get(self.value, self.value)

    @property
    def nbytes(self) -> int:
        return {"float32": 4, "float16": 2, "bfloat16": 2}.get(self.value, 1)

    @property
    def native(self) -> int:
        """Its number in the native kernels."""
        return ["float32", "float16", "bfloat16", "e8m0", "e4m3"].index(self.value)


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
        return f"{self.code.value} g{self.group}" if self.is_quantized and self.group else self.code.value

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
