"""The Triton products with quantised weights against their twins: interpreted, and on a GPU if there is one."""

import torch
from quantized_matrices import FORMATS, name_of, random_matrix, random_slots
from triton_cases import Case, assert_near, kernel_tests, run_cases

from moe_runtime.kernels import quantized_ops, reference
from moe_runtime.kernels.quantized_slots import QuantizedSlots, dense
from moe_runtime.kernels.swiglu import SwiGLU
from moe_runtime.types.weight_format import Code, Scale, WeightFormat

MXFP4 = WeightFormat(Code.FP4, Scale.E8M0, 32)
INT4_ZEROS = WeightFormat(Code.INT4, Scale.BFLOAT16, 32, has_zero=True)
FP8 = WeightFormat(Code.FP8, Scale.FLOAT32, 128)
# With groups that are no powers of two, and MXFP8.
ALL_FORMATS = (
    *FORMATS,
    WeightFormat(Code.INT4, Scale.FLOAT16, 48),
    WeightFormat(Code.INT8, Scale.FLOAT32, 24),
    WeightFormat(Code.FP8, Scale.E8M0, 32),
)
# Rows of each slot, input rows (None: in grouped order), hidden and intermediate size.
Shape = tuple[list[int], int | None, int, int]
SHAPES: list[Shape] = [
    ([3, 0, 17, 1, 0], 9, 150, 41),  # ends within a byte, a group and a tile
    ([0, 2], None, 64, 192),  # whole tiles of inputs
    ([30, 20, 33], 50, 70, 24),  # more rows a tile
    ([2, 1], 3, 300, 40),  # more than a super-group
]


def slots_on(device: torch.device, slots: QuantizedSlots) -> QuantizedSlots:
    return QuantizedSlots(slots.matrix.to(device), slots.num_outputs)


def make_groups(shape: Shape, format: WeightFormat, device: torch.device, dtype: torch.dtype) -> list:
    counts, num_inputs, hidden, intermediate = shape
    num_rows = sum(counts)
    row = None if num_inputs is None else torch.randint(num_inputs, (num_rows,), device=device)
    x = torch.randn(num_inputs or num_rows, hidden, device=device).to(dtype)
    w13 = slots_on(device, random_slots(format, len(counts), 2 * intermediate, hidden))
    w2 = slots_on(device, random_slots(format, len(counts), hidden, intermediate))
    return [x, row, torch.tensor(counts, device=device), w13, w2]


def grouped_case(format: WeightFormat) -> Case:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        from moe_runtime.kernels.triton import grouped_gemm

        shape = SHAPES[int(torch.randint(len(SHAPES), ()))]
        operands = make_groups(shape, format, device, dtype)
        assert_near(grouped_gemm.grouped_mlp(*operands), reference.grouped_mlp(*operands))

    return check


def decoded_exactly(format: WeightFormat) -> Case:
    """Rows of the unit matrix give the weights themselves, which must have the twin's bits."""

    def check(device: torch.device, dtype: torch.dtype) -> None:
        from moe_runtime.kernels.triton import dense_gemm

        outputs, inputs = 37, 300 if format.scale is Scale.INT8 else 100
        weight = random_matrix(format, outputs, inputs).to(device)
        unit = torch.eye(inputs, device=device, dtype=dtype)
        assert torch.equal(dense_gemm.quantized_linear(unit, weight), dense(weight, dtype).T)

    return check


def every_tile_biases_and_a_limit(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import grouped_gemm, tiles

    x, row, counts, w13, w2 = make_groups(SHAPES[0], MXFP4, device, dtype)
    biases = {"b13_SG": torch.randn(w13.shape[:2]), "b2_SD": torch.randn(w2.shape[:2])}
    options = {name: bias.to(device, dtype) for name, bias in biases.items()}
    options["swiglu"] = SwiGLU(alpha=1.702, limit=0.9, offset=1.0)
    expected = reference.grouped_mlp(x, row, counts, w13, w2, **options)
    for tile in tiles.tiles_that_fit(dtype, tiles.chip_of(device)):
        assert_near(grouped_gemm.grouped_mlp(x, row, counts, w13, w2, **options, tile=tile), expected)


def rows_do_not_depend_on_their_neighbours(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import dense_gemm, grouped_gemm, tiles

    x, row, counts, w13, w2 = make_groups(SHAPES[0], INT4_ZEROS, device, dtype)
    tile = tiles.invariant_tile(dtype)
    together = grouped_gemm.grouped_mlp(x, row, counts, w13, w2, tile=tile)
    one = torch.zeros_like(counts)
    one[2] = 1
    for place in (3, 19):  # the first and the last row of slot 2
        alone = grouped_gemm.grouped_mlp(x, row[place : place + 1], one, w13, w2, tile=tile)
        assert torch.equal(alone[0], together[place])
    product = dense_gemm.linear(x, w13[1])
    assert torch.equal(dense_gemm.linear(x[4:5], w13[1])[0], product[4])


def linear_gives_what_its_twin_gives(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import dense_gemm

    for num_rows, inputs, outputs in ((0, 8, 8), (1, 33, 5), (70, 130, 40)):
        x, bias = torch.randn(num_rows, inputs, device=device).to(dtype), torch.randn(outputs, device=device).to(dtype)
        weight = random_matrix(FP8, outputs, inputs).to(device)
        for each in (bias, None):
            wide_bias = None if each is None else each.double()
            expected = torch.nn.functional.linear(x.double(), dense(weight, dtype).double(), wide_bias).to(dtype)
            assert_near(dense_gemm.quantized_linear(x, weight, each), expected)
            assert_near(dense_gemm.linear(x, weight, each), expected)
            assert_near(quantized_ops.quantized_linear(x, weight, each), expected)


def nan_and_the_smallest_scales_are_kept(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import dense_gemm

    fp8 = random_matrix(WeightFormat(Code.FP8, Scale.FLOAT32), 3, 16).to(device)
    fp8.codes[1, 5], fp8.codes[2, 5] = 0x7F, 0xFF
    fp8.codes[0] = torch.arange(16)  # zero and the subnormal numbers
    unit = torch.eye(16, device=device, dtype=dtype)
    actual, expected = dense_gemm.quantized_linear(unit, fp8).T, dense(fp8, dtype)
    assert torch.equal(actual[0], expected[0]) and actual[1:].isnan().all() and expected[1:, 5].isnan().all()
    tiny = random_matrix(MXFP4, 2, 32).to(device)
    tiny.scales_NG[0], tiny.scales_NG[1] = 0, 1
    rows = torch.eye(32, device=device)
    assert torch.equal(dense_gemm.quantized_linear(rows, tiny), dense(tiny, torch.float32).T)
    assert tiny.dequantize()[1].abs().max() > 0


CASES: dict[str, Case] = {
    **{f"grouped, {name_of(format)}": grouped_case(format) for format in FORMATS},
    **{f"decoded, {name_of(format)}": decoded_exactly(format) for format in ALL_FORMATS},
    **{
        check.__name__: check
        for check in (
            every_tile_biases_and_a_limit,
            rows_do_not_depend_on_their_neighbours,
            linear_gives_what_its_twin_gives,
            nan_and_the_smallest_scales_are_kept,
        )
    },
}


interpreted, test_interpreted, test_on_gpu = kernel_tests(__file__, CASES)


if __name__ == "__main__":
    run_cases(CASES)
