"""How a weight matrix is stored. Slots, native packing, Triton, migrations and budgets share this type. No torch."""

from __future__ import annotations

from enum import Enum

PANEL = 64  # outputs of a panel of a packed matrix; see kernels/cpu/gemm.h
TABLE_BYTES = 64  # of a coded panel's table; see kernels/cpu/coded.h


class WeightFormat(Enum):
    """A format of matrices.

    Attributes:
        dtype: of the values.
        bits: of one weight.
        native: its number in the native kernels; None if they do not support it.
    """

    FLOAT32 = ("float32", 32, None)
    BFLOAT16 = ("bfloat16", 16, None)
    PACKED_FLOAT32 = ("float32", 32, 0)  # in panels
    CODED_BFLOAT16 = ("bfloat16", 12, 1)  # in panels, high bytes coded, without loss; see kernels/cpu/coded.h

    def __init__(self, dtype: str, bits: int, native: int | None) -> None:
        self.dtype, self.bits, self.native = dtype, bits, native

    @classmethod
    def of(cls, dtype: str, native: bool = False) -> WeightFormat:
        """The format of matrices of a dtype; `native` if native kernels store them.

        Raises:
            ValueError: matrices of this dtype are not supported.
        """
        for format in cls:
            if format.dtype == dtype and (format.native is not None) == native:
                return format
        raise ValueError(f"dtype: {dtype} is not allowed; it must be float32 or bfloat16")

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix `[outputs, inputs]`, without escapes."""
        if self.native is None:
            return outputs * inputs * self.bits // 8
        panels = -(-outputs // PANEL)
        if self is WeightFormat.CODED_BFLOAT16:  # inputs are in pairs
            return panels * (TABLE_BYTES + -(-inputs // 2) * 2 * PANEL * self.bits // 8)
        return panels * PANEL * inputs * self.bits // 8
