"""The face of the kernels: what it offers, what it chooses, and what its use imports."""

import inspect
import subprocess
import sys

import pytest
import torch

from moe_runtime import kernels
from moe_runtime.kernels import invariant_ops, ops, quantized_ops, reference, torch_attention, torch_ops

OPS = set(ops.describe(torch.device("cpu")))


def test_describe_names_every_op_and_its_implementation():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert functions - {"describe"} == OPS
    assert set(ops.describe(torch.device("cpu")).values()) == {"torch"}
    on_cuda = ops.describe(torch.device("cuda"))
    assert set(on_cuda) == OPS and set(on_cuda.values()) == {"triton"}


def test_invariant_forms_have_the_signatures_of_the_face():
    for name in ("grouped_mlp", "paged_attention"):
        assert inspect.signature(getattr(invariant_ops, name)) == inspect.signature(getattr(ops, name))


def test_triton_forms_take_what_the_face_gives():
    from moe_runtime.kernels.triton import attention, dense_gemm, gate, group, grouped_gemm, norms, rotary

    for module in (attention, dense_gemm, gate, group, grouped_gemm, norms, rotary):
        for name in OPS & set(vars(module)):
            asked = list(inspect.signature(getattr(ops, name)).parameters.values())
            assert list(inspect.signature(getattr(module, name)).parameters.values())[: len(asked)] == asked, name


@pytest.mark.parametrize("module", [torch_ops, torch_attention, quantized_ops, reference], ids=lambda m: m.__name__)
def test_twins_have_the_signatures_of_the_face(module):
    twins = {name: function for name, function in vars(module).items() if name in OPS}
    assert twins
    for name, function in twins.items():
        assert inspect.signature(function) == inspect.signature(getattr(ops, name)), name


def test_package_holds_a_docstring_and_nothing_else():
    code = compile(inspect.getsource(kernels), "kernels", "exec")
    assert set(code.co_names) <= {"__doc__"}


def test_on_the_cpu_the_face_loads_no_triton_kernel():
    program = """
import sys, torch
from moe_runtime.kernels import ops
ops.topk_gate(torch.randn(3, 8), top_k=2, scoring="softmax", normalize=True)
ops.grouped_mlp(torch.randn(3, 4), None, torch.tensor([1, 2]), torch.randn(2, 10, 4), torch.randn(2, 4, 5))
print([name for name in sys.modules if name.startswith("moe_runtime.kernels.triton")])
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
