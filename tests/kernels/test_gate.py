import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Glm4MoeConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_runtime.kernels import ops, reference, torch_ops
from moe_runtime.kernels.cpu import library, loader


@st.composite
def gates(draw):
    """Logits (often equal ones, so that ties decide) and the options of a gate that has a meaning."""
    num_groups = draw(st.integers(1, 5))
    by_best = draw(st.booleans())
    group_size = draw(st.integers(1 if by_best or num_groups == 1 else 2, 9))
    topk_groups = draw(st.integers(1, num_groups))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(0, 6)), num_groups * group_size)
    levels = draw(st.sampled_from([1, 2, 4, None]))
    logits = torch.randn(shape, generator=generator)
    if levels is not None:
        logits = (logits * levels).round() / levels
    bias = torch.randn(shape[1], generator=generator).mul(2).round() / 2 if draw(st.booleans()) else None
    return logits, {
        "top_k": draw(st.integers(1, topk_groups * group_size)),
        "scoring": draw(st.sampled_from(["softmax", "sigmoid"])),
        "correction_bias_E": bias,
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "groups_by_best": by_best,
        "normalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }


@settings(deadline=None, max_examples=150)
@given(gates())
def test_equals_the_reference(gate):
    logits, options = gate
    weights, experts = ops.topk_gate(logits, **options)
    expected_weights, expected_experts = reference.topk_gate(logits, **options)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int64
    assert torch.equal(experts, expected_experts)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=50)
@given(gates())
def test_properties(gate):
    logits, options = gate
    weights, experts = ops.topk_gate(logits, **options)
    assert all(len(set(row)) == options["top_k"] for row in experts.tolist())
    assert ((experts >= 0) & (experts < logits.shape[1])).all() and (weights >= 0).all()
    group_size = logits.shape[1] // options["num_groups"]
    assert all(len(set(row)) <= options["topk_groups"] for row in (experts // group_size).tolist())
    if options["normalize"]:
        torch.testing.assert_close(weights.sum(1), torch.full((len(logits),), options["scale"]))


KERNELS = {"torch": torch_ops.topk_gate, "reference": reference.topk_gate, "face": ops.topk_gate}


@pytest.mark.parametrize("kernel", [*KERNELS, *library.supported_instruction_sets()])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_among_equals_the_lower_numbers_win(kernel, data):
    """A gate of zeros, and gates whose last places are shared by many; Triton's is tested in `test_triton_ops`."""
    if kernel in KERNELS:
        topk_gate = KERNELS[kernel]
    elif (kernels := loader.load_or_none()) is None:
        pytest.skip("no native kernels")
    else:
        topk_gate = (kernels if kernel == kernels.instruction_set else loader.load(kernel)).topk_gate
    num_experts, num_levels = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 4))
    top_k = data.draw(st.integers(1, num_experts))
    level = st.integers(0, num_levels - 1)
    rows = data.draw(st.lists(st.lists(level, min_size=num_experts, max_size=num_experts), min_size=1, max_size=4))
    expected = [sorted(range(num_experts), key=lambda e, row=row: (-row[e], e))[:top_k] for row in rows]
    for scoring in ("softmax", "sigmoid"):
        logits = torch.tensor([*rows, [0] * num_experts]).float()
        _, experts = topk_gate(logits, top_k=top_k, scoring=scoring, normalize=True)
        assert experts.tolist() == [*expected, list(range(top_k))]


def by_expert(weights, experts):
    """transformers leaves the order of experts open, so both are put in order of their numbers."""
    experts, order = experts.sort(dim=-1)
    return weights.gather(1, order), experts


def assert_routes_like(gate, x, **options):
    logits, their_weights, their_experts = gate(x)
    weights, experts = by_expert(*ops.topk_gate(logits, **options))
    their_weights, their_experts = by_expert(their_weights, their_experts)
    assert torch.equal(experts, their_experts)
    torch.testing.assert_close(weights, their_weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalize", [True, False])
@torch.no_grad()
def test_equals_qwen3_moe(normalize):
    config = Qwen3MoeConfig(hidden_size=32, num_experts=60, num_experts_per_tok=7, norm_topk_prob=normalize)
    gate = Qwen3MoeTopKRouter(config)
    torch.nn.init.normal_(gate.weight)
    assert_routes_like(gate, torch.randn(50, 32), top_k=7, scoring="softmax", normalize=normalize)


@torch.no_grad()
def test_equals_mixtral():
    gate = MixtralTopKRouter(MixtralConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=2))
    torch.nn.init.normal_(gate.weight)
    assert_routes_like(gate, torch.randn(50, 32), top_k=2, scoring="softmax", normalize=True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_groups", "topk_groups"), [(1, 1), (6, 2), (4, 4), (3, 1)])
@torch.no_grad()
def test_equals_glm4_moe(normalize, num_groups, topk_groups):
    config = Glm4MoeConfig(
        hidden_size=32,
        n_routed_experts=24,
        num_experts_per_tok=5,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
        n_group=num_groups,
        topk_group=topk_groups,
    )
    gate = Glm4MoeTopkRouter(config)
    torch.nn.init.normal_(gate.weight, std=0.2)
    torch.nn.init.normal_(gate.e_score_correction_bias, std=0.2)
    assert_routes_like(
        gate,
        torch.randn(50, 32),
        top_k=5,
        scoring="sigmoid",
        correction_bias_E=gate.e_score_correction_bias,
        num_groups=num_groups,
        topk_groups=topk_groups,
        normalize=normalize,
        scale=2.5,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "tanh"}, "scoring: 'tanh' is not allowed; it must be 'softmax' or 'sigmoid'"),
        ({"top_k": 0}, "top_k: 0 is not allowed; it must be from 1 to the 12"),
        ({"top_k": 5, "num_groups": 3}, "top_k: 5 is not allowed; it must be from 1 to the 4"),
        ({"num_groups": 5}, "num_groups: 5 is not allowed; it must divide 12"),
        ({"num_groups": 12}, "num_groups: 12 is not allowed; .* at least 2"),
        ({"num_groups": 0}, "num_groups: 0 is not allowed"),
        ({"num_groups": 3, "topk_groups": 4}, r"topk_groups: 4 is not allowed; .* 1 to num_groups \(3\)"),
    ],
)
def test_refuses_what_has_no_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        ops.topk_gate(torch.randn(2, 12), **({"top_k": 2, "scoring": "softmax", "normalize": True} | options))
