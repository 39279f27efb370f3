"""How a weight matrix is held. Slots, native packing, Triton, migrations and budgets share this type. No torch.

A quantised weight is (code - zero) * scale + offset, with a scale for each output and each group of inputs, and a zero
or an offset where the format has them. See `kernels/quantized.py` for the tensors that hold one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PANEL = 64  # outputs of a panel of a packed matrix; see kernels/cpu/gemm.h
TABLE_BYTES = 64  # of a coded panel's table; see kernels/cpu/coded.h
STEP_BYTES = 256  # codes of a step of a quantised panel; see kernels/cpu/quantized.h
SUPER_GROUP = 256  # inputs that share the factor of INT8 scales, as in the K-quants of GGUF


class Code(Enum):
    """What stands for a weight.

    INT4 (from -8 to 7), UINT4 (from 0 to 15) and INT8 are integers, FP4 is E2M1, FP8 is E4M3 (arXiv:2310.10537, OCP's
    formats). CODED_BFLOAT16 is without loss; only native kernels have it (kernels/cpu/coded.h).
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    CODED_BFLOAT16 = "coded bfloat16"
    INT4 = "int4"
    UINT4 = "uint4"
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
        return {"float32": 0, "coded bfloat16": 1, "int4": 2, "fp4": 3, "int8": 4, "fp8": 5, "uint4": 6}[self.value]


class Scale(Enum):
    """The type of scales.

    E8M0 is a power of two, 2^(byte - 127). E4M3 and INT8 are multiplied by a factor, in float32: E4M3 by a float32 of
    each output, INT8 by a float16 of each output and `SUPER_GROUP` inputs.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    E8M0 = "e8m0"
    E4M3 = "e4m3"
    INT8 = "int8"

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
        return ["float32", "float16", "bfloat16", "e8m0", "e4m3", "int8"].index(self.value)

    @property
    def factor(self) -> Scale | None:
        """The type of the factors of such scales; None: they have none."""
        return {"e4m3": Scale.FLOAT32, "int8": Scale.FLOAT16}.get(self.value)


@dataclass(frozen=True)
class WeightFormat:
    """A format of matrices.

    Attributes:
        code: of a weight.
        scale: type of the scales; None for weights that are not quantised.
        group: inputs that share a scale, a multiple of 8; None: all inputs of an output.
        has_zero: whether each group has a zero, an integer that is subtracted from its codes.
        has_offset: whether each group has an offset, of the same type as its scale, that is added to its weights. If
            scales have factors, offsets have their own.
    """

    code: Code
    scale: Scale | None = None
    group: int | None = None
    has_zero: bool = False
    has_offset: bool = False

    def __post_init__(self) -> None:
        assert self.scale is not Scale.INT8 or (self.group and SUPER_GROUP % self.group == 0), self
        assert not (self.has_zero and self.has_offset) and (self.code is not Code.UINT4 or self.has_offset), self

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

    def num_factors(self, inputs: int) -> int:
        """Factors of the scales of a row of `inputs` weights; 0 if they have none."""
        if self.scale is None or self.scale.factor is None:
            return 0
        return -(-inputs // SUPER_GROUP) if self.scale is Scale.INT8 else 1

    def nbytes(self, outputs: int, inputs: int, native: bool = False) -> int:
        """Bytes of a matrix `[outputs, inputs]`, without escapes; `native`: in panels of the native kernels."""
        if self.scale is None:
            return self._dense_bytes(outputs, inputs, native)
        numbers = 1 + self.has_offset
        factors = self.num_factors(inputs) * self.scale.factor.nbytes * numbers if self.scale.factor else 0
        of_group = self.scale.nbytes * numbers + self.has_zero
        if not native:
            return outputs * (-(-inputs * self.code.bits // 8) + self.num_groups(inputs) * of_group + factors)
        step = STEP_BYTES * 8 // self.code.bits // PANEL  # inputs of a step
        group = self.group or inputs
        whole, rest = divmod(inputs, group)
        steps = whole * -(-group // step) + -(-rest // step)
        panel = steps * STEP_BYTES + PANEL * (self.num_groups(inputs) * of_group + factors)
        return -(-outputs // PANEL) * panel

    def _dense_bytes(self, outputs: int, inputs: int, native: bool) -> int:
        if not native:
            return outputs * inputs * self.code.bits // 8
        panels = -(-outputs // PANEL)
        if self.code is Code.CODED_BFLOAT16:  # inputs are in pairs
            return panels * (TABLE_BYTES + -(-inputs // 2) * 2 * PANEL * self.code.bits // 8)
        return panels * PANEL * inputs * self.code.bits // 8


@dataclass(frozen=True)
class BlockFormats:
    """How the matrices of an attention, an MLP or each expert of a layer are held; None: in the model's dtype.

    Attributes:
        input: all but the last: queries, keys and values, or what makes them; gate and up projections.
        output: the last: the output of attention, the down projection.
    """

    input: WeightFormat | None = None
    output: WeightFormat | None = None

    @property
    def all(self) -> tuple[WeightFormat | None, ...]:
        return self.input, self.output

    def of(self, part: str) -> WeightFormat | None:
        """Of an expert's matrix: "gate", "up" or "down"."""
        return self.output if part == "down" else self.input


DENSE = BlockFormats()
