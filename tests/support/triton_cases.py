"""Runs cases of Triton kernels in the interpreter.

The interpreter must be chosen before triton is imported, and then applies to the whole process. So the cases run in a
child process: the test file as a script, which prints each case's failure. On a GPU they run in the test process.
"""

import json
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import row_products
import torch
from seeds import seed_for

Case = Callable[[torch.device, torch.dtype], None]

INTERPRETED_DTYPES = (torch.float32, torch.float16)  # the interpreter multiplies bfloat16 wrongly
GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Largest difference from the reference / largest output. Twin and kernel round the product and the output to the dtype,
# half a unit in the last place each, and the rounded products are summed.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same shape and dtype, and no difference above the tolerance of the dtype; NaN is never near."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (actual.dtype, actual.shape)
    if expected.numel():
        error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error <= TOLERANCE[actual.dtype], float(error)


def run_cases(cases: Mapping[str, Case]) -> None:
    """Print, as JSON, the traceback of each case, empty if it passed. The script's arguments are the seed and `both`
    or `one`: each case runs in both dtypes, or in a random one, since the interpreter is slow."""
    row_products.use_in_this_process()
    seed, num_dtypes = int(sys.argv[1]), {"both": 2, "one": 1}[sys.argv[2]]
    draw, errors = random.Random(seed), {}
    for name, check in cases.items():
        errors[name] = ""
        for dtype in draw.sample(INTERPRETED_DTYPES, num_dtypes):
            torch.manual_seed(seed_for(seed, f"{name} {dtype}"))
            try:
                check(torch.device("cpu"), dtype)
            except Exception:  # noqa: BLE001 (every kind of failure is a result to report)
                errors[name] += f"{dtype}\n{traceback.format_exc()}"
    json.dump(errors, sys.stdout)


def interpret(file: str, seed: int, num_dtypes: str) -> dict[str, str]:
    """The output of `run_cases` from a process that interprets kernels and runs this test file."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "error", file, str(seed), num_dtypes]
    child = subprocess.run(command, env=env, cwd=Path(file).parent, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    results: dict[str, str] = json.loads(child.stdout)
    return results


def kernel_tests(file: str, cases: Mapping[str, Case]) -> tuple[Any, Any, Any]:
    """A test file binds the result as `interpreted`, `test_interpreted` and `test_on_gpu`. The fixture runs all cases
    interpreted in one child process; the tests check each case interpreted, and on a GPU."""

    @pytest.fixture(scope="module")
    def interpreted(request: pytest.FixtureRequest) -> dict[str, str]:
        num_dtypes = "both" if request.config.getoption("full") else "one"
        return interpret(file, random.getrandbits(32), num_dtypes)

    @pytest.mark.parametrize("case", cases)
    def test_interpreted(interpreted: dict[str, str], case: str) -> None:
        if interpreted[case]:
            pytest.fail(interpreted[case], pytrace=False)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
    @pytest.mark.parametrize("case", cases)
    def test_on_gpu(case: str, dtype: torch.dtype) -> None:
        cases[case](torch.device("cuda"), dtype)

    return interpreted, test_interpreted, test_on_gpu
