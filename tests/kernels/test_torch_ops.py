import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from moe_runtime.kernels import ops, reference, torch_ops
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("shape", [(0, 24), (7, 24), (7, 3, 24)])
@torch.no_grad()
def test_rms_norm_equals_transformers(dtype, shape):
    norm = Qwen3MoeRMSNorm(24, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(shape) * 3).to(dtype)
    assert torch.equal(ops.rms_norm(x, norm.weight, 1e-5), norm(x))


@DTYPES
def test_add_rms_norm_rounds_the_sum_first(dtype):
    x, residual, weight = torch.randn(9, 16).to(dtype), (torch.randn(9, 16) * 50).to(dtype), torch.rand(16).to(dtype)
    kept = residual.clone()
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, kept + x) and torch.equal(residual, kept)
    assert torch.equal(normed, ops.rms_norm(kept + x, weight, 1e-6))


@DTYPES
@pytest.mark.parametrize("rotated", [16, 8, 6])
def test_rotary_equals_transformers(dtype, rotated):
    q, k = torch.randn(5, 4, 16).to(dtype), torch.randn(5, 2, 16).to(dtype)
    angles = torch.rand(5, rotated // 2) * 6
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    expected = apply_rotary_pos_emb(q.float(), k.float(), cos, sin, unsqueeze_dim=1)
    for actual, theirs in zip(ops.apply_rotary(q, k, cos, sin), expected, strict=True):
        assert actual.dtype == dtype and torch.equal(actual, theirs.to(dtype))


@DTYPES
@torch.no_grad()
def test_scale_rows_equals_transformers(dtype):
    """On numbers of few bits, so that no sum is rounded."""
    rows, x, gate = torch.randn(5, 16).to(dtype), torch.randint(-3, 4, (5, 16)).to(dtype), torch.randn(16) / 4
    gate = (gate * 8).round().div(8).to(dtype)
    weights = torch.nn.functional.linear(x, gate[None]).float().sigmoid()
    assert torch.equal(ops.scale_rows(rows, x, gate), (weights * rows.float()).to(dtype))


@DTYPES
def test_silu_mul(dtype):
    gate_up = torch.randn(6, 14).to(dtype)
    gate, up = gate_up[:, :7], gate_up[:, 7:]
    assert torch.equal(ops.silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 9), st.data())
def test_group_by_slot(num_slots, data):
    slots = data.draw(st.lists(st.integers(-1, num_slots - 1), max_size=40))
    order, counts = ops.group_by_slot(torch.tensor(slots, dtype=torch.int64), num_slots)
    expected = sorted((row for row, slot in enumerate(slots) if slot >= 0), key=lambda row: slots[row])
    assert order.tolist() == expected
    assert counts.tolist() == [slots.count(slot) for slot in range(num_slots)]
    assert order.dtype == counts.dtype == torch.int64


@given(st.integers(1, 9), st.data())
@settings(deadline=None)
def test_group_by_slot_padded_is_the_exact_one_and_its_inverse(num_slots, data):
    slot = torch.tensor(data.draw(st.lists(st.integers(-1, num_slots - 1), max_size=40)), dtype=torch.int64)
    order, place, counts = ops.group_by_slot_padded(slot, num_slots)
    exact_order, exact_counts = ops.group_by_slot(slot, num_slots)
    assert torch.equal(order[: len(exact_order)], exact_order) and torch.equal(counts, exact_counts)
    assert sorted(order.tolist()) == list(range(len(slot)))
    assert torch.equal(place >= 0, slot >= 0)
    assert torch.equal(order[place[place >= 0]], torch.arange(len(slot))[slot >= 0])


@DTYPES
@pytest.mark.parametrize("counts", [[1], [0, 5, 0, 12, 1], [0, 0], [40, 0]])
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("swiglu", [PLAIN, SwiGLU(alpha=1.702, limit=0.9, offset=1.0)], ids=["plain", "clamped"])
@pytest.mark.parametrize("biases", [(), ("b13_SG",), ("b2_SD",), ("b13_SG", "b2_SD")], ids=" ".join)
def test_grouped_mlp_equals_the_reference(dtype, counts, gathered, swiglu, biases):
    num_rows, num_slots = sum(counts), len(counts)
    x = torch.randn(11 if gathered else num_rows, 20).to(dtype)
    row = torch.randint(11, (num_rows,)) if gathered else None
    w13, w2 = (torch.randn(num_slots, 26, 20) / 4).to(dtype), (torch.randn(num_slots, 20, 13) / 4).to(dtype)
    options = {name: torch.randn(num_slots, {"b13_SG": 26, "b2_SD": 20}[name]).to(dtype) for name in biases}
    options["swiglu"] = swiglu
    actual = ops.grouped_mlp(x, row, torch.tensor(counts), w13, w2, **options)
    expected = reference.grouped_mlp(x, row, torch.tensor(counts), w13, w2, **options)
    assert actual.shape == (num_rows, 20) and actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    largest = float(expected.abs().max()) if num_rows else 1.0  # what is rounded grows with the values
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, largest))


@DTYPES
def test_plain_experts_are_silu_mul_of_linear_bit_for_bit(dtype):
    x, w13, w2 = torch.randn(5, 20).to(dtype), torch.randn(1, 26, 20).to(dtype), torch.randn(1, 20, 13).to(dtype)
    b13, b2 = torch.randn(1, 26).to(dtype), torch.randn(1, 20).to(dtype)
    for biases in ((None, None), (b13, b2)):
        first, second = (None if bias is None else bias[0] for bias in biases)
        hidden = ops.silu_mul(torch.nn.functional.linear(x, w13[0], first))
        actual = ops.grouped_mlp(x, None, torch.tensor([5]), w13, w2, b13_SG=biases[0], b2_SD=biases[1])
        assert torch.equal(actual, torch.nn.functional.linear(hidden, w2[0], second))


@torch.no_grad()
def test_grouped_mlp_equals_transformers_gpt_oss():
    config = GptOssConfig(hidden_size=24, intermediate_size=20, num_local_experts=3)
    experts = GptOssExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, expert = torch.randn(40, 24), torch.randint(3, (40,))
    # Its columns alternate between gate and up.
    w13, b13 = (
        torch.cat((both[..., ::2], both[..., 1::2]), -1) for both in (experts.gate_up_proj, experts.gate_up_proj_bias)
    )
    w13 = w13.transpose(1, 2)
    first = torch.einsum("ni,noi->no", x, w13[expert]) + b13[expert]
    gate, up = first.chunk(2, 1)
    assert (gate > 7).any() and (gate < -7).any() and (up > 7).any() and (up < -7).any(), "nothing beyond the limit"
    order, counts = ops.group_by_slot(expert, 3)
    actual = ops.grouped_mlp(
        x,
        order,
        counts,
        w13.contiguous(),
        experts.down_proj.transpose(1, 2).contiguous(),
        b13_SG=b13,
        b2_SD=experts.down_proj_bias,
        swiglu=SwiGLU(config.swiglu_alpha, config.swiglu_limit, 1.0),
    )
    expected = experts(x, expert[:, None], torch.ones(40, 1))[order]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@DTYPES
def test_swiglu_mul_clamps_but_keeps_nan(dtype):
    nan, inf = float("nan"), float("inf")
    gate = torch.tensor([1.0, 9.0, inf, inf, nan, 2.0], dtype=dtype)
    up = torch.tensor([2.0, 2.0, inf, -9.0, 2.0, nan], dtype=dtype)
    actual = torch_ops.swiglu_mul(torch.cat((gate, up)), SwiGLU(limit=7.0, offset=1.0))
    silu = torch.nn.functional.silu(torch.tensor([1.0, 7.0, 7.0, 7.0]))
    torch.testing.assert_close(actual[:4], (silu * torch.tensor([3.0, 3.0, 8.0, -6.0])).to(dtype))
    assert actual[4:].isnan().all()


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_is_positive(limit):
    with pytest.raises(ValueError, match=f"limit: {limit} is not allowed; it must be positive"):
        SwiGLU(limit=limit)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_ND": torch.randn(4, 5)}, r"x_ND: shape \(4, 5\) is not allowed; it must be \[rows, 6\]"),
        ({"w13_SGD": torch.randn(2, 7, 6)}, r"w13_SGD: shape \(2, 7, 6\) does not fit .*; it must be \(2, 8, 6\)"),
        (
            {"w2_SDF": torch.randn(2, 6, 4).half()},
            "dtypes torch.float32, torch.float32, torch.float16 .* must be equal",
        ),
        ({"counts_S": torch.tensor([4])}, "counts_S: .* must be int64 of 2 slots"),
        ({"row_R": torch.tensor([0.0, 1.0])}, "row_R: torch.float32 .* must be a vector of int64"),
        (
            {"b13_SG": torch.randn(2, 4)},
            r"b13_SG: torch.float32 \(2, 4\) is not allowed; it must be torch.float32 \(2, 8\)",
        ),
        ({"b2_SD": torch.randn(6)}, r"b2_SD: .* \(6,\) is not allowed; it must be torch.float32 \(2, 6\)"),
        ({"b2_SD": torch.randn(2, 6).half()}, r"b2_SD: torch.float16 .* must be torch.float32 \(2, 6\)"),
    ],
)
def test_grouped_mlp_refuses_operands_that_do_not_fit(changed, message):
    operands = {
        "x_ND": torch.randn(4, 6),
        "row_R": None,
        "counts_S": torch.tensor([1, 3]),
        "w13_SGD": torch.randn(2, 8, 6),
        "w2_SDF": torch.randn(2, 6, 4),
        "b13_SG": torch.randn(2, 8),
        "b2_SD": torch.randn(2, 6),
    }
    assert ops.grouped_mlp(**operands).shape == (4, 6)
    with pytest.raises(ValueError, match=message):
        ops.grouped_mlp(**(operands | changed))


@DTYPES
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (5, 1), (9, 8)])
def test_combine_topk_is_the_reference_bit_for_bit(dtype, tokens, top_k):
    y, weights = torch.randn(tokens, top_k, 33).to(dtype), torch.rand(tokens, top_k)
    assert torch.equal(ops.combine_topk(y, weights), reference.combine_topk(y, weights))


def test_combine_topk_sums_in_order_of_k():
    y = torch.tensor([1e8, 1.0, -1e8])[None, :, None]
    assert ops.combine_topk(y, torch.ones(1, 3)).item() == 0.0
    assert ops.combine_topk(y[:, [0, 2, 1]], torch.ones(1, 3)).item() == 1.0


@DTYPES
def test_combine_grouped_is_combine_topk_where_all_have_a_place(dtype):
    y, weights = torch.randn(5, 3, 16).to(dtype), torch.rand(5, 3)
    slot = torch.randint(4, (15,))
    order, place, _ = ops.group_by_slot_padded(slot, 4)
    grouped = y.flatten(0, 1)[order]
    assert torch.equal(ops.combine_grouped(grouped, place.view(5, 3), weights), ops.combine_topk(y, weights))
    place[4] = -1  # (1, 1)
    y[1, 1] = 0
    grouped[0] = float("nan") if order[0] == 4 else grouped[0]  # nobody reads it
    assert torch.equal(ops.combine_grouped(grouped, place.view(5, 3), weights), ops.combine_topk(y, weights))
    assert torch.equal(ops.combine_grouped(y[0, :0], torch.full((2, 3), -1), weights[:2]), torch.zeros(2, 16).to(dtype))


@DTYPES
def test_grouped_mlp_takes_rows_without_a_slot(dtype):
    x, row, counts = torch.randn(6, 8).to(dtype), torch.randint(6, (9,)), torch.tensor([2, 0, 3])
    w13, w2 = torch.randn(3, 10, 8).to(dtype), torch.randn(3, 8, 5).to(dtype)
    padded = ops.grouped_mlp(x, row, counts, w13, w2)
    assert padded.shape == (9, 8)
    assert torch.equal(padded[:5], ops.grouped_mlp(x, row[:5], counts, w13, w2))


@DTYPES
def test_rotary_store_kv_is_both(dtype):
    q, k, v = torch.randn(5, 8, 16).to(dtype).split((4, 2, 2), 1)
    cos, sin = torch.randn(2, 5, 16)
    one, two = torch.zeros(2, 2, 3, 4, 2, 16).to(dtype)
    slot = torch.randperm(12)[:5]
    turned_q, turned_k = ops.apply_rotary(q, k, cos, sin)
    ops.store_kv(turned_k, v, *one, slot)
    assert torch.equal(ops.rotary_store_kv(q, k, v, cos, sin, *two, slot), turned_q)
    assert torch.equal(one, two)
