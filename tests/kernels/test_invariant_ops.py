"""The batch-invariant forms on the CPU: same meaning as the usual forms, and the same bits in any batch."""

import pytest
import torch
from torch.nn import functional as F

from moe_runtime.kernels import invariant_ops, torch_attention, torch_ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.swiglu import SwiGLU

DTYPES = (torch.float32, torch.bfloat16)


def near(actual, expected):
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype):
    x, weight, bias = torch.randn(9, 40).to(dtype), torch.randn(33, 40).to(dtype) / 6, torch.randn(33).to(dtype)
    for each in (bias, None):
        together = invariant_ops.linear(x, weight, each)
        near(together, F.linear(x, weight, each))
        assert torch.equal(invariant_ops.linear(x[4:5], weight, each)[0], together[4])
    assert invariant_ops.linear(x[:0], weight).shape == (0, 33)


@pytest.mark.parametrize("gpt_oss", [False, True], ids=["", "gpt-oss"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_mlp(dtype, gpt_oss):
    counts = torch.tensor([3, 0, 5, 1])
    x, row = torch.randn(6, 24).to(dtype), torch.randint(6, (9,))
    w13, w2 = torch.randn(4, 32, 24).to(dtype) / 5, torch.randn(4, 24, 16).to(dtype) / 4
    options = {}
    if gpt_oss:
        biases = {"b13_SG": torch.randn(4, 32).to(dtype), "b2_SD": torch.randn(4, 24).to(dtype)}
        options = biases | {"swiglu": SwiGLU(alpha=1.702, limit=0.9, offset=1.0)}
    together = invariant_ops.grouped_mlp(x, row, counts, w13, w2, **options)
    near(together, torch_ops.grouped_mlp(x, row, counts, w13, w2, **options))
    alone = invariant_ops.grouped_mlp(x, row[5:6], torch.tensor([0, 0, 1, 0]), w13, w2, **options)
    assert torch.equal(alone[0], together[5])
    in_order = invariant_ops.grouped_mlp(x[row], None, counts, w13, w2, **options)
    assert torch.equal(in_order, together)


@pytest.mark.parametrize("kind", ["equal", "smaller values", "values in keys"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paged_attention(dtype, window, with_sinks, kind):
    cpu = torch.device("cpu")
    groups, head_size, value_size = {"equal": (2, 8, 8), "smaller values": (2, 24, 16), "values in keys": (1, 24, 16)}[
        kind
    ]
    k_cache = torch.randn(8, 4, groups, head_size).to(dtype)
    v_cache = torch.randn(8, 4, groups, value_size).to(dtype)
    if kind == "values in keys":
        v_cache = k_cache[..., :value_size]
    q = torch.randn(6, 4, head_size).to(dtype)
    blocks = [[5, 2, 7], [1, 0]]
    options = {"scale": 0.3, "sliding_window": window, "sinks_H": torch.randn(4) if with_sinks else None}
    meta = AttentionMetadata.build([1, 5], [9, 7], blocks, cpu)
    together = invariant_ops.paged_attention(q, k_cache, v_cache, meta, **options)
    near(together, torch_attention.paged_attention(q, k_cache, v_cache, meta, **options))
    for rows, context in ((slice(1, 4), 5), (slice(4, 6), 7), (slice(3, 4), 5)):  # the prompt in other chunks
        part = AttentionMetadata.build([rows.stop - rows.start], [context], blocks[1:], cpu)
        assert torch.equal(invariant_ops.paged_attention(q[rows], k_cache, v_cache, part, **options), together[rows])


def test_lengths_on_the_device():
    meta = AttentionMetadata.build([1, 1, 3], [4, 1, 5], [[0], [1], [2, 3]], torch.device("cpu"))
    lengths = meta.on_device
    assert lengths.query_start.tolist() == [0, 1, 2, 5] and lengths.context_len.tolist() == [4, 1, 5]
    assert lengths.sequence_T.tolist() == [0, 1, 2, 2, 2] and lengths.position_T.tolist() == [3, 0, 2, 3, 4]
    assert meta.on_device is lengths
    nothing = AttentionMetadata.build([], [], [], torch.device("cpu")).on_device
    assert nothing.sequence_T.tolist() == [] and nothing.query_start.tolist() == [0]
