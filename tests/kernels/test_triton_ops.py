"""The Triton ops of the sparse block against their twins: interpreted, and on a GPU if there is one."""

import warnings

import pytest
import torch
from torch.nn import functional as F
from triton_cases import TOLERANCE, Case, assert_near, kernel_tests, run_cases

from moe_runtime.kernels import ops, reference, torch_ops
from moe_runtime.kernels.swiglu import SwiGLU

GATES = {
    "mixtral": (8, {"top_k": 2, "scoring": "softmax", "normalize": True}),
    "qwen3": (128, {"top_k": 8, "scoring": "softmax", "normalize": True}),
    "softmax not normalised": (60, {"top_k": 4, "scoring": "softmax", "normalize": False}),
    "sigmoid": (160, {"top_k": 8, "scoring": "sigmoid", "normalize": True, "scale": 2.5}),
    "groups": (256, {"top_k": 8, "scoring": "sigmoid", "normalize": True, "num_groups": 8, "topk_groups": 4}),
    "odd groups": (21, {"top_k": 5, "scoring": "sigmoid", "normalize": False, "num_groups": 3, "topk_groups": 2}),
    "softmax groups": (40, {"top_k": 3, "scoring": "softmax", "normalize": True, "num_groups": 5, "topk_groups": 1}),
    "groups by best": (
        24,
        {
            "top_k": 4,
            "scoring": "softmax",
            "normalize": False,
            "num_groups": 6,
            "topk_groups": 2,
            "groups_by_best": True,
        },
    ),
    "many experts": (512, {"top_k": 10, "scoring": "softmax", "normalize": True}),
    "all experts": (6, {"top_k": 6, "scoring": "softmax", "normalize": True, "scale": 0.5}),
    "one expert": (1, {"top_k": 1, "scoring": "sigmoid", "normalize": False}),
}
# x, row, counts, w13 and w2 of `grouped_mlp`.
Operands = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]
# Name -> rows of each slot, input rows (None: in grouped order), hidden and intermediate size.
GROUPS = {
    "one row": ([1], 1, 16, 16),
    "one row among empty slots": ([0, 0, 1, 0], 5, 40, 24),
    "ragged": ([3, 0, 17, 1, 16, 0, 2], 11, 33, 19),
    "tile of 32": ([30, 20, 33], 50, 64, 48),
    "tile of 64": ([64, 0, 65, 63], 128, 50, 70),
    "tile of 128": ([130, 127], None, 24, 40),
    "one giant slot": ([0, 0, 150, 0], 40, 20, 16),
    "grouped order": ([5, 2, 0, 9], None, 48, 32),
    "many slots": ([i % 3 for i in range(70)], 20, 16, 16),
    "features of one": ([2, 3], 4, 1, 1),
}


def expected_scores(logits: torch.Tensor, options: dict[str, object]) -> torch.Tensor:
    return logits.float().softmax(1) if options["scoring"] == "softmax" else logits.float().sigmoid()


def gate_case(name: str) -> Case:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        from moe_runtime.kernels.triton import gate

        num_experts, options = GATES[name]
        for has_bias in (False, True):
            bias = torch.randn(num_experts, device=device) if has_bias else None
            logits = torch.randn(9, num_experts, device=device, dtype=dtype)
            weights, experts = gate.topk_gate(logits, correction_bias_E=bias, **options)
            expected_weights, expected_experts = torch_ops.topk_gate(logits, correction_bias_E=bias, **options)
            # Where two choices differ by rounding alone, either may come first.
            choice = expected_scores(logits, options) if bias is None else expected_scores(logits, options) + bias
            torch.testing.assert_close(choice.gather(1, experts), choice.gather(1, expected_experts), rtol=0, atol=1e-6)
            same = (experts == expected_experts).all(1)
            assert same.float().mean() > 0.5, (experts, expected_experts)
            torch.testing.assert_close(weights[same], expected_weights[same], rtol=1e-5, atol=1e-7)

    return check


def gate_breaks_ties_by_number(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import gate

    for options in (options | {"num_experts": count} for count, options in GATES.values()):
        num_experts = options.pop("num_experts")
        logits = torch.randint(-1, 2, (6, num_experts), device=device).to(dtype)
        logits[0] = 0
        found = gate.topk_gate(logits, **options)[1]
        assert torch.equal(found, torch_ops.topk_gate(logits, **options)[1]), options
        assert found[0].tolist() == list(range(options["top_k"])), options
        if "num_groups" not in options:
            for row, experts in zip(logits.tolist(), found.tolist(), strict=True):
                assert experts == sorted(range(num_experts), key=lambda e, row=row: (-row[e], e))[: options["top_k"]]


def gate_keeps_expert_numbers_valid(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import gate

    for num_experts, options in GATES.values():
        logits = torch.full((3, num_experts), float("nan"), device=device, dtype=dtype)
        logits[1, ::2] = 1.0
        logits[2] = float("-inf")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy, which interprets, complains of NaN
            experts = gate.topk_gate(logits, **options)[1]
        assert experts.min() >= 0 and experts.max() < num_experts, experts
        assert all(len(set(row)) == options["top_k"] for row in experts.tolist()), experts


def gate_of_no_tokens(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import gate

    weights, experts = gate.topk_gate(
        torch.empty(0, 8, device=device, dtype=dtype), top_k=2, scoring="softmax", normalize=True
    )
    assert weights.shape == experts.shape == (0, 2) and experts.dtype == torch.int64


def random_groups(name: str, device: torch.device, dtype: torch.dtype) -> Operands:
    return make_groups(*GROUPS[name], device, dtype)


def make_groups(
    counts: list[int], num_inputs: int | None, hidden: int, intermediate: int, device: torch.device, dtype: torch.dtype
) -> Operands:
    num_rows, num_slots = sum(counts), len(counts)
    x = torch.randn(num_inputs or num_rows, hidden, device=device).to(dtype)
    row = None if num_inputs is None else torch.randint(num_inputs, (num_rows,), device=device)
    w13 = (torch.randn(num_slots, 2 * intermediate, hidden, device=device) * hidden**-0.5).to(dtype)
    w2 = (torch.randn(num_slots, hidden, intermediate, device=device) * intermediate**-0.5).to(dtype)
    return x, row, torch.tensor(counts, device=device), w13, w2


def grouped_case(name: str) -> Case:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        from moe_runtime.kernels.triton import grouped_gemm, tiles

        operands = random_groups(name, device, dtype)
        expected = reference.grouped_mlp(*operands)
        assert_near(grouped_gemm.grouped_mlp(*operands), expected)
        if sum(GROUPS[name][0]) < 100:  # the interpreter's time goes with the tiles
            return
        for tile in (tiles.invariant_tile(dtype), tiles.shipped_tiles(dtype)[-1]):
            assert_near(grouped_gemm.grouped_mlp(*operands, tile=tile), expected)

    return check


def random_counts_and_sizes(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import grouped_gemm, tiles

    for _ in range(4):
        num_slots, hidden, intermediate = torch.randint(1, 40, (3,)).tolist()
        counts = (torch.randint(0, 12, (num_slots,)) * torch.randint(0, 2, (num_slots,))).tolist()
        operands = make_groups(counts, 7, hidden, intermediate, device, dtype)
        some = tiles.shipped_tiles(dtype)
        tile = some[int(torch.randint(len(some), ()))]
        if tile in tiles.tiles_that_fit(dtype, tiles.chip_of(device)):
            assert_near(grouped_gemm.grouped_mlp(*operands, tile=tile), reference.grouped_mlp(*operands))


def all_tiles_give_the_same(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import grouped_gemm, tiles

    operands = random_groups("ragged", device, dtype)
    expected = reference.grouped_mlp(*operands)
    for tile in tiles.tiles_that_fit(dtype, tiles.chip_of(device)):
        assert_near(grouped_gemm.grouped_mlp(*operands, tile=tile), expected)


def random_biases(operands: Operands) -> dict[str, torch.Tensor]:
    x, _, _, w13, w2 = operands
    names = {"b13_SG": w13.shape[:2], "b2_SD": w2.shape[:2]}
    return {name: torch.randn(shape, device=x.device).to(x.dtype) for name, shape in names.items()}


def experts_with_biases_and_a_limit(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import grouped_gemm, tiles

    operands = random_groups("ragged", device, dtype)
    biases, swiglu = random_biases(operands), SwiGLU(alpha=1.702, limit=0.9, offset=1.0)
    for options in ({"swiglu": swiglu}, {"b13_SG": biases["b13_SG"]}, {"b2_SD": biases["b2_SD"]}):
        assert_near(grouped_gemm.grouped_mlp(*operands, **options), reference.grouped_mlp(*operands, **options))
    options = biases | {"swiglu": swiglu}
    expected = reference.grouped_mlp(*operands, **options)
    unlimited = reference.grouped_mlp(*operands, **biases, swiglu=SwiGLU(alpha=1.702, offset=1.0))
    assert ((unlimited - expected).abs().amax(1) > 0).all(), "nothing beyond the limit"
    for tile in (tiles.shipped_tiles(dtype)[0], tiles.invariant_tile(dtype)):
        assert_near(grouped_gemm.grouped_mlp(*operands, **options, tile=tile), expected)


def a_limit_hides_no_nan(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import grouped_gemm

    x, _, counts, w13, w2 = random_groups("grouped order", device, dtype)
    x[3, 5] = float("nan")
    actual = grouped_gemm.grouped_mlp(x, None, counts, w13, w2, swiglu=SwiGLU(limit=0.9))
    is_nan = torch.zeros(len(x), dtype=torch.bool, device=device)
    is_nan[3] = True
    assert torch.equal(actual.isnan().all(1), is_nan) and torch.equal(actual.isnan().any(1), is_nan)


def rows_do_not_depend_on_their_neighbours(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import grouped_gemm, tiles

    x, row, counts, w13, w2 = random_groups("ragged", device, dtype)
    tile = tiles.invariant_tile(dtype)
    before = grouped_gemm.grouped_mlp(x, row, counts, w13, w2, tile=tile)
    starts = (counts.cumsum(0) - counts).tolist()
    order = torch.cat([start + torch.randperm(n) for start, n in zip(starts, counts.tolist(), strict=True)])
    order = order.to(device)
    after = grouped_gemm.grouped_mlp(x, row[order], counts, w13, w2, tile=tile)
    assert torch.equal(after, before[order])
    slot = int(counts.argmax())
    alone = row[starts[slot] : starts[slot] + 1]
    one = torch.zeros_like(counts)
    one[slot] = 1
    assert torch.equal(grouped_gemm.grouped_mlp(x, alone, one, w13, w2, tile=tile)[0], before[starts[slot]])


def rows_without_a_slot_are_left_alone(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import grouped_gemm, tiles

    x, row, counts, w13, w2 = random_groups("ragged", device, dtype)
    padded = torch.cat((row, torch.randint(len(x), (13,), device=device)))
    for tile in (tiles.shipped_tiles(dtype)[0], tiles.invariant_tile(dtype)):
        actual = grouped_gemm.grouped_mlp(x, padded, counts, w13, w2, tile=tile)
        assert actual.shape[0] == len(row) + 13
        assert_near(actual[: len(row)], reference.grouped_mlp(x, row, counts, w13, w2))


def group_gives_what_its_twin_gives(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import group

    for num_rows, num_slots in ((0, 3), (1, 1), (10, 4), (63, 5), (64, 300), (1100, 7)):
        for lowest in (-1, 0, num_slots - 1):  # some rows without a slot, none, all in one slot
            slot = torch.randint(lowest, num_slots, (num_rows,), device=device)
            actual = group.group_by_slot_padded(slot, num_slots)
            expected = torch_ops.group_by_slot_padded(slot, num_slots)
            assert all(map(torch.equal, actual, expected)), (num_rows, num_slots, lowest)
            exact = group.group_by_slot(slot, num_slots)
            assert all(map(torch.equal, exact, torch_ops.group_by_slot(slot, num_slots)))


def combine_gives_the_bits_of_its_twin(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import group

    for num_tokens, top_k, hidden in ((0, 2, 16), (1, 1, 1), (5, 8, 37), (3, 2, 1030)):
        y = torch.randn(num_tokens, top_k, hidden, device=device).to(dtype)
        weights = torch.rand(num_tokens, top_k, device=device)
        assert torch.equal(group.combine_topk(y, weights), torch_ops.combine_topk(y, weights))
        place = torch.randint(-1, max(1, num_tokens), (num_tokens, top_k), device=device)
        rows = y[:, 0].contiguous()
        actual = group.combine_grouped(rows, place, weights)
        assert torch.equal(actual, torch_ops.combine_grouped(rows, place, weights))


def linear_gives_what_torch_gives(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import dense_gemm

    for num_rows, inputs, outputs in ((0, 8, 8), (1, 33, 5), (70, 64, 130), (130, 19, 40)):
        x = torch.randn(num_rows, inputs, device=device).to(dtype)
        weight = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(dtype)
        bias = torch.randn(outputs, device=device).to(dtype)
        for each in (bias, None):
            actual = dense_gemm.linear(x, weight, each)
            wide_bias = None if each is None else each.double()
            assert_near(actual, F.linear(x.double(), weight.double(), wide_bias).to(dtype))
            if num_rows:
                alone = dense_gemm.linear(x[-1:], weight, each)
                assert torch.equal(alone[0], actual[-1])


def grouped_of_no_rows(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import grouped_gemm

    x, _, counts, w13, w2 = random_groups("ragged", device, dtype)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    assert grouped_gemm.grouped_mlp(x, empty, torch.zeros_like(counts), w13, w2).shape == (0, x.shape[1])


def unfit_operands_are_refused(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import gate, grouped_gemm

    x, row, counts, w13, w2 = random_groups("ragged", device, dtype)
    with pytest.raises(ValueError, match=r"x_ND: strides .* contiguous"):
        grouped_gemm.grouped_mlp(x.T.contiguous().T, row, counts, w13, w2)
    with pytest.raises(ValueError, match=r"dtype: torch\.float64 is not allowed"):
        grouped_gemm.grouped_mlp(x.double(), row, counts, w13.double(), w2.double())
    with pytest.raises(ValueError, match="w13_SGD: shape"):
        grouped_gemm.grouped_mlp(x, row, counts, w13[:, 1:], w2)
    with pytest.raises(ValueError, match=r"b2_SD: strides .* contiguous"):
        grouped_gemm.grouped_mlp(x, row, counts, w13, w2, b2_SD=w2[:, :, 0])
    with pytest.raises(ValueError, match="logits_TE: strides"):
        gate.topk_gate(torch.randn(8, 4, device=device).T, top_k=2, scoring="softmax", normalize=True)
    with pytest.raises(ValueError, match="top_k: 9 is not allowed"):
        gate.topk_gate(torch.randn(4, 8, device=device), top_k=9, scoring="softmax", normalize=True)


CASES: dict[str, Case] = {
    **{f"gate, {name}": gate_case(name) for name in GATES},
    **{f"grouped, {name}": grouped_case(name) for name in GROUPS},
    **{
        check.__name__: check
        for check in (
            gate_breaks_ties_by_number,
            gate_keeps_expert_numbers_valid,
            gate_of_no_tokens,
            random_counts_and_sizes,
            all_tiles_give_the_same,
            experts_with_biases_and_a_limit,
            a_limit_hides_no_nan,
            rows_do_not_depend_on_their_neighbours,
            rows_without_a_slot_are_left_alone,
            group_gives_what_its_twin_gives,
            combine_gives_the_bits_of_its_twin,
            linear_gives_what_torch_gives,
            grouped_of_no_rows,
            unfit_operands_are_refused,
        )
    },
}


interpreted, test_interpreted, test_on_gpu = kernel_tests(__file__, CASES)


@pytest.mark.gpu
def test_face_uses_triton_on_gpu() -> None:
    device = torch.device("cuda")
    assert set(ops.describe(device).values()) == {"triton"}
    operands = random_groups("ragged", device, torch.bfloat16)
    expected = torch_ops.grouped_mlp(*operands).float()
    error = (ops.grouped_mlp(*operands).float() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[torch.bfloat16]


if __name__ == "__main__":
    run_cases(CASES)
