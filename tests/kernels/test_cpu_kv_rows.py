"""Rows of 8 bits in the native kernels: the bits of the twin when they are written, and attention over what they stand
for, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import DTYPES, cache_and_meta, copying_attention, normal
from kv_cases import quantize_cache, widen_cache

from moe_runtime.kernels import kv_rows, torch_ops
from moe_runtime.kernels.cpu.latent import LatentCall
from moe_runtime.kernels.cpu.native_step import NativeStep
from moe_runtime.kernels.cpu.packed import PackedLinear, PackedMatrices
from moe_runtime.kernels.kv_rows import KVScales

pytestmark = pytest.mark.usefixtures("threads")

NAMES = pytest.mark.parametrize("name", kv_rows.DTYPES)


@DTYPES
@NAMES
@pytest.mark.parametrize(
    ("heads", "groups", "key_size", "value_size"), [(4, 2, 64, 64), (6, 2, 18, 18), (6, 1, 80, 64), (3, 1, 27, 16)]
)
@pytest.mark.parametrize("window", [None, 40])
def test_attention_reads_what_the_rows_stand_for(kernels, dtype, name, heads, groups, key_size, value_size, window):
    """In decode steps and in prompts, whose tiles are multiplied otherwise; over more than a span of keys."""
    for num_query, contexts in (([1, 200, 70], [65, 200, 300]), ([1] * 9, [5, 64, 65, 511, 512, 513, 1100, 30, 129])):
        keys, values, meta, _ = cache_and_meta(num_query, contexts, groups, key_size, dtype)
        keys, values = keys * 3, values / 5
        if value_size != key_size:
            values = keys[..., :value_size]
        *codes, scales = quantize_cache(keys, values, name)
        q = normal(sum(num_query), heads, key_size, dtype=dtype)
        options = {"scale": key_size**-0.5, "sliding_window": window, "sinks_H": torch.randn(heads)}
        actual = kernels.paged_attention(q, *codes, meta, **options, kv_scales=scales)
        wide = widen_cache(*codes, scales, dtype)
        assert torch.equal(actual, kernels.paged_attention(q, *wide, meta, **options))


def rows_that_vary(tokens, size, dtype):
    """Rows of all sizes; one is zero, one is tiny, and one has a number that is much larger than the others."""
    x = torch.randn(tokens, size) * torch.logspace(-5, 5, tokens)[:, None]
    x[1], x[2], x[3, 5::7] = 0, x[2] * 1e-30, 1e4
    return x.to(dtype)


@DTYPES
@NAMES
@pytest.mark.parametrize("head_dim", [64, 18])
def test_keys_and_values_are_written_as_the_twin_writes_them(kernels, dtype, name, head_dim):
    """Through a projection that copies, so that nothing is summed."""
    size, tokens = 4 * head_dim, 40
    output = torch.eye(size, 2 * head_dim).to(dtype)
    block = copying_attention(kernels, torch.eye(size).to(dtype), output, 2, head_dim)
    plain, _, meta, blocks = cache_and_meta([tokens], [tokens], 1, head_dim, dtype)
    position = torch.tensor([blocks[0][row // 16] * 16 + row % 16 for row in range(tokens)])
    x, cos, sin = rows_that_vary(tokens, size, dtype), *torch.randn(2, tokens, head_dim)
    found, expected = (
        (*torch.zeros(2, *plain.shape).to(kv_rows.DTYPES[name]), KVScales(*torch.zeros(2, *plain.shape[:3], 1)))
        for _ in range(2)
    )
    block(x, NativeStep(meta, position, cos, sin), *found[:2], kv_scales=found[2])
    q, k, v = x.view(tokens, 4, head_dim).split((2, 1, 1), dim=1)
    k = torch_ops.apply_rotary(q, k, cos, sin)[1]
    kv_rows.store_quantized(k, expected[0], expected[2].k_NBGP, position, (head_dim,))
    kv_rows.store_quantized(v, expected[1], expected[2].v_NBG1, position, (head_dim,))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(found[2].k_NBGP, expected[2].k_NBGP) and torch.equal(found[2].v_NBG1, expected[2].v_NBG1)


@NAMES
def test_a_row_that_is_not_finite_stays_so(kernels, name):
    tokens, size = 3, 16
    copying = torch.cat((torch.eye(size), torch.eye(size), torch.eye(size)))
    block = copying_attention(kernels, copying, torch.eye(size), 1, size)
    _, _, meta, blocks = cache_and_meta([tokens], [tokens], 1, size, torch.float32)
    x = torch.randn(tokens, size)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    codes, scales = torch.zeros(2, 3, 16, 1, size).to(kv_rows.DTYPES[name]), KVScales(*torch.zeros(2, 3, 16, 1, 1))
    position = blocks[0][0] * 16 + torch.arange(tokens)
    block(x, NativeStep(meta, position), *codes, kv_scales=scales)
    for found in (scales.k_NBGP, scales.v_NBG1):
        assert found.flatten()[position].isnan().tolist() == [False, True, True]


@DTYPES
@NAMES
def test_a_latent_and_its_key_have_a_scale_each(kernels, dtype, name):
    heads, latent, nope, rope, tokens = 2, 32, 8, 6, 20
    query_size, key_size = heads * (nope + rope), latent + rope
    down = torch.eye(query_size + key_size).to(dtype)

    def packed(weights):
        found = PackedMatrices(kernels, dtype, *weights.shape[1:], len(weights))
        for head, weight in enumerate(weights):
            found.put(head, 0, weight)
        return found

    block = LatentCall(
        kernels,
        PackedLinear.pack(kernels, down),
        None,
        packed(normal(heads, latent, nope, dtype=dtype)),
        packed(normal(heads, 5, latent, dtype=dtype)),
        PackedLinear.pack(kernels, normal(len(down), heads * 5, dtype=dtype)),
        query_norm=None,
        latent_norm=torch.ones(latent, dtype=dtype),
        rope_size=rope,
        scale=0.2,
        eps=1e-6,
    )
    plain, _, meta, blocks = cache_and_meta([tokens], [tokens], 1, key_size, dtype)
    position = torch.tensor([blocks[0][row // 16] * 16 + row % 16 for row in range(tokens)])
    x, cos, sin = rows_that_vary(tokens, len(down), dtype), *torch.randn(2, tokens, rope)
    step = NativeStep(meta, position, cos, sin)
    rows = plain.clone()
    expected = block(x, step, rows)  # in the dtype of x; the rows are those to quantise
    written = rows.flatten(0, 1)[position]
    codes, scale = torch.zeros(plain.shape).to(kv_rows.DTYPES[name]), torch.zeros(*plain.shape[:3], 2)
    scales = KVScales(scale, scale[..., :1])
    actual = block(x, step, codes, kv_scales=scales)
    twin_codes, twin_scale = kv_rows.quantize_rows(written, codes.dtype, (latent, rope))
    assert torch.equal(codes.view(torch.uint8).flatten(0, 1)[position], twin_codes.view(torch.uint8))
    assert torch.equal(scale.flatten(0, 1)[position], twin_scale)
    assert not torch.equal(actual, expected) and actual.isfinite().all()
