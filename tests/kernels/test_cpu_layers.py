"""All layers as one native call that runs in parallel with its caller, against single blocks, bit for bit."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_cases import DTYPES, cache_and_meta, experts_of, normal

from moe_runtime.kernels.cpu import native
from moe_runtime.kernels.cpu.blocks import AttentionCall, DenseCall, GateCall, NextNorm, SparseCall
from moe_runtime.kernels.cpu.kv_pages import kv_pages
from moe_runtime.kernels.cpu.layers import Layers
from moe_runtime.kernels.cpu.native_step import NativeStep
from moe_runtime.kernels.cpu.packed import PackedLinear

pytestmark = pytest.mark.usefixtures("threads")

HIDDEN, EXPERTS, TOKENS = 48, 6, 9


class Case:
    """A dense and two sparse layers, a step of one sequence, and what their blocks make of its rows."""

    def __init__(self, kernels, dtype):
        self.kernels, self.dtype = kernels, dtype
        mlps = [self.dense(), self.sparse(), self.sparse()]
        self.blocks = [(self.attention(), mlp) for mlp in mlps]
        _, _, meta, pages = cache_and_meta([TOKENS], [TOKENS], 1, 16, dtype)
        self.caches = [cache_and_meta([TOKENS], [TOKENS], 1, 16, dtype)[:2] for _ in mlps]
        slots = torch.tensor([pages[0][0] * 16 + row for row in range(TOKENS)])
        self.step = NativeStep(meta, slots, torch.randn(TOKENS, 16), torch.randn(TOKENS, 16))
        self.layers = Layers(self.blocks, [kv_pages(*cache) for cache in self.caches], [0] * len(self.blocks))
        self.x, self.residual = normal(TOKENS, HIDDEN, dtype=dtype), normal(TOKENS, HIDDEN, dtype=dtype)
        self.expected = self.one_by_one()

    def norm(self):
        return NextNorm(normal(HIDDEN, dtype=self.dtype), 1e-6)

    def attention(self):
        sizes = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 16, "scale": 0.25, "sliding_window": None}
        qkv, output = (normal(*shape, dtype=self.dtype) / 7 for shape in ((80, HIDDEN), (HIDDEN, 48)))
        weights = PackedLinear.pack(self.kernels, qkv), PackedLinear.pack(self.kernels, output)
        return AttentionCall(
            self.kernels, *weights, **sizes, qk_norm=None, q_norm=None, k_norm=None, eps=1e-6, next_norm=self.norm()
        )

    def mlp(self, count):
        shapes = (count, 2 * 20, HIDDEN), (count, HIDDEN, 20)
        return experts_of(self.kernels, *(normal(*shape, dtype=self.dtype) / 7 for shape in shapes))

    def dense(self):
        return DenseCall(self.mlp(1), self.norm())

    def sparse(self):
        gate = native.gate_config(EXPERTS, top_k=2, scoring="softmax", normalize=True)
        gate = GateCall(self.kernels, gate, normal(EXPERTS, HIDDEN) / 7)
        return SparseCall(gate, torch.randperm(EXPERTS)[:, None], self.mlp(EXPERTS), None, self.norm())

    def one_by_one(self):
        x, residual = self.x, self.residual.clone()
        for (attention, mlp), (keys, values) in zip(self.blocks, self.caches, strict=True):
            x = attention(x, self.step, keys, values, residual)
            x = mlp(x, residual) if isinstance(mlp, DenseCall) else mlp(x, 0, residual)
        return x, residual

    def begin(self):
        rows = self.x.clone(), self.residual.clone()
        return self.layers.begin(*rows, [self.step], 0), rows

    def is_right(self, rows):
        return all(torch.equal(*pair) for pair in zip(rows, self.expected, strict=True))


@DTYPES
def test_whoever_runs_the_layers_gives_the_same_bits(kernels, dtype):
    """Waited for at once, after a while, and after other calls, which wait for nobody."""
    case = Case(kernels, dtype)
    normed = kernels.rms_norm(case.x, case.blocks[0][0].next_norm.weight_D, 1e-6)
    for seconds in [0] * 50 + [1e-5] * 50 + [1e-3] * 5:
        running, rows = case.begin()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        if seconds:
            assert torch.equal(kernels.rms_norm(case.x, case.blocks[0][0].next_norm.weight_D, 1e-6), normed)
        running.wait()
        assert case.is_right(rows)
        running.wait()  # which does nothing


def test_workers_run_the_layers_while_the_caller_does_other_things(kernels):
    case = Case(kernels, torch.float32)
    kernels.set_threads(3)
    running, rows = case.begin()
    deadline = time.monotonic() + 60
    while not case.is_right(rows):
        assert time.monotonic() < deadline
    running.wait()


def test_several_calls_that_have_begun(kernels):
    """All come to their end, in whatever order they are waited for, and whoever gives one up."""
    case = Case(kernels, torch.float32)
    for _ in range(50):
        begun = [case.begin() for _ in range(4)]
        random.shuffle(begun)
        begun.pop()
        for running, rows in begun:
            running.wait()
            assert case.is_right(rows)


def test_several_callers_and_numbers_of_threads(kernels):
    case = Case(kernels, torch.float32)

    def one(index):
        running, rows = case.begin()
        if index % 7 == 0:
            kernels.set_threads(random.choice((1, 2, 5)))
        if index % 3:
            running.wait()
        return running, rows

    with ThreadPoolExecutor(3) as callers:
        for running, rows in callers.map(one, range(300)):
            running.wait()
            assert case.is_right(rows)
