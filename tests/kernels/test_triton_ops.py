"""The Triton ops against their twins: in the interpreter on the CPU, and on a GPU where there is one.

The interpreter is chosen before triton is imported and lasts for the process, so its cases run in a child: this file
run as a script, which prints what went wrong with each case. The GPU runs the same cases in this process.
"""

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_runtime.kernels import ops, reference, torch_ops

Case = Callable[[torch.device, torch.dtype], None]

INTERPRETED_DTYPES = (torch.float32, torch.float16)  # the interpreter multiplies bfloat16 wrongly
GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Largest difference of an output to the reference, over the largest output. Twin and kernel round the product and the
# output to the dtype, half a unit in the last place each, and the rounded products are summed.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

GATES = {
    "mixtral": (8, {"top_k": 2, "scoring": "softmax", "normalize": True}),
    "qwen3": (128, {"top_k": 8, "scoring": "softmax", "normalize": True}),
    "softmax not normalised": (60, {"top_k": 4, "scoring": "softmax", "normalize": False}),
    "sigmoid": (160, {"top_k": 8, "scoring": "sigmoid", "normalize": True, "scale": 2.5}),
    "groups": (256, {"top_k": 8, "scoring": "sigmoid", "normalize": True, "num_groups": 8, "topk_groups": 4}),
    "odd groups": (21, {"top_k": 5, "scoring": "sigmoid", "normalize": False, "num_groups": 3, "topk_groups": 2}),
    "softmax groups": (40, {"top_k": 3, "scoring": "softmax", "normalize": True, "num_groups": 5, "topk_groups": 1}),
    "many experts": (512, {"top_k": 10, "scoring": "softmax", "normalize": True}),
    "all experts": (6, {"top_k": 6, "scoring": "softmax", "normalize": True, "scale": 0.5}),
    "one expert": (1, {"top_k": 1, "scoring": "sigmoid", "normalize": False}),
}
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
        logits = torch.randint(-1, 2, (16, num_experts), device=device).to(dtype)
        logits[0] = 0
        expected = torch_ops.topk_gate(logits, **options)[1]
        assert torch.equal(gate.topk_gate(logits, **options)[1], expected), options


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


def random_groups(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    counts, num_inputs, hidden, intermediate = GROUPS[name]
    num_rows, num_slots = sum(counts), len(counts)
    x = torch.randn(num_inputs or num_rows, hidden, device=device).to(dtype)
    row = None if num_inputs is None else torch.randint(num_inputs, (num_rows,), device=device)
    w13 = (torch.randn(num_slots, 2 * intermediate, hidden, device=device) * hidden**-0.5).to(dtype)
    w2 = (torch.randn(num_slots, hidden, intermediate, device=device) * intermediate**-0.5).to(dtype)
    return x, row, torch.tensor(counts, device=device), w13, w2


def grouped_case(name: str) -> Case:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        from moe_runtime.kernels.triton import grouped_gemm

        operands = random_groups(name, device, dtype)
        actual = grouped_gemm.grouped_mlp(*operands)
        expected = reference.grouped_mlp(*operands)
        assert actual.dtype == dtype and actual.shape == expected.shape
        error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error <= TOLERANCE[dtype], float(error)

    return check


def rows_do_not_depend_on_their_neighbours(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import grouped_gemm

    x, row, counts, w13, w2 = random_groups("ragged", device, dtype)
    before = grouped_gemm.grouped_mlp(x, row, counts, w13, w2)
    order = torch.cat(
        [start + torch.randperm(n) for start, n in zip(counts.cumsum(0) - counts, counts.tolist(), strict=True)]
    )
    order = order.to(device)
    after = grouped_gemm.grouped_mlp(x, row[order], counts, w13, w2)
    assert torch.equal(after, before[order])


def tiles_are_chosen_by_rows_per_slot(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import grouped_gemm

    sizes = [grouped_gemm.choose_tile(rows, 4, dtype).block_m for rows in (1, 64, 65, 256, 512, 513, 100_000)]
    assert sizes == ([16, 16, 64, 64, 64, 64, 64] if dtype == torch.float32 else [16, 16, 32, 64, 128, 128, 128])


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
            rows_do_not_depend_on_their_neighbours,
            tiles_are_chosen_by_rows_per_slot,
            grouped_of_no_rows,
            unfit_operands_are_refused,
        )
    },
}


def interpret_all() -> dict[str, str]:
    """Seed and traceback of each case, empty where it passed; in a process whose triton interprets."""
    errors = {}
    for name, check in CASES.items():
        for dtype in INTERPRETED_DTYPES:
            seed = torch.seed()
            try:
                check(torch.device("cpu"), dtype)
                errors[f"{name} {dtype}"] = ""
            except Exception:  # noqa: BLE001 (every kind of failure is a result to report)
                errors[f"{name} {dtype}"] = f"seed {seed}\n{traceback.format_exc()}"
    return errors


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-W", "error", __file__], env=env, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_interpreted(interpreted: dict[str, str], case: str, dtype: torch.dtype) -> None:
    error = interpreted[f"{case} {dtype}"]
    if error:
        pytest.fail(error, pytrace=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_on_gpu(case: str, dtype: torch.dtype) -> None:
    CASES[case](torch.device("cuda"), dtype)


@pytest.mark.gpu
def test_face_uses_triton_on_gpu() -> None:
    device = torch.device("cuda")
    described = ops.describe(device)
    assert described["grouped_mlp"] == described["topk_gate"] == "triton"
    operands = random_groups("ragged", device, torch.bfloat16)
    expected = torch_ops.grouped_mlp(*operands).float()
    torch.testing.assert_close(ops.grouped_mlp(*operands).float(), expected, rtol=0, atol=1.6e-2 * expected.abs().max())


if __name__ == "__main__":
    json.dump(interpret_all(), sys.stdout)
