"""Expert policies: allowed user input, meaning for a model, and the calibration file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from moe_runtime.config.expert_policy import ExpertPolicies, PolicyCalibration
from moe_runtime.config.model import MoEConfig
from moe_runtime.kernels import ops
from moe_runtime.layers.gate import drop_experts
from moe_runtime.layers.moe import MoELayer
from moe_runtime.models.registry import read_model_config
from moe_runtime.types.expert_policy import ALL_MASS, ExpertPolicy, parse_expert_policy
from moe_runtime.types.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (None, None),
        ("full", "full"),
        ("fast", "fast"),
        ("top_k=4", ExpertPolicy(top_k=4)),
        ("top_p=0.8,threshold=1", ExpertPolicy(top_p=0.8, threshold=1)),
        ('{"threshold": [0.1, 0]}', ExpertPolicy(threshold=(0.1, 0))),
        ({"top_k": [1, 2]}, ExpertPolicy(top_k=[1, 2])),
        (ExpertPolicy(top_p=0.5), ExpertPolicy(top_p=0.5)),
    ],
)
def test_what_may_be_written(written: object, meant: object) -> None:
    assert parse_expert_policy(written) == meant


NO_POLICIES = ["quick", "", 3, True, [], {}, {"top": 1}, "top_k", "top_k=", "=3", "top_k=x", "[1]", "k=3"]
NO_OBJECTS = ["{", '{"top": 1}', '{"a":' * 50_000, '{"top_k": ' + "9" * 5000 + "}"]


@pytest.mark.parametrize("written", [*NO_POLICIES, *NO_OBJECTS], ids=lambda written: repr(written)[:20])
def test_what_may_not_be_written(written: Any) -> None:
    with pytest.raises(ValueError, match=r"^routing: [^\n]* is not allowed; it must be [^\n]+$"):
        SamplingParams(routing=written)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("top_k", value) for value in (0, -1, 1.5, True, "4", [], [0], [2, None])),
        *(("top_p", value) for value in (0, 1.1, float("nan"), "x", [0.5, 2])),
        *(("threshold", value) for value in (-0.1, 1.01, float("nan"), [float("inf")])),
        *(("temperature", value) for value in (0, -1, float("inf"), float("nan"))),
    ],
)
def test_a_wrong_value_gets_one_line_that_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^routing\.{name}: [^\n]* is not allowed; it must be [^\n]+$"):
        ExpertPolicy(**{name: value})


def test_policies_travel_to_the_ranks() -> None:
    for routing in (None, ExpertPolicy(top_k=(1, 2), threshold=0.5, temperature=[0.1, 0.2])):
        params = SamplingParams(routing=routing, return_routed_experts=True)
        packed = msgspec.msgpack.encode(params)
        found = msgspec.msgpack.decode(packed, type=SamplingParams)
        assert found == params
        assert hash(found.routing) == hash(params.routing)


def test_rows_for_gates() -> None:
    assert ExpertPolicy().rows(2, 6) == [[6, ALL_MASS, 0.0, 1.0]] * 2
    policy = ExpertPolicy(top_k=3, top_p=(0.5, 0.6), threshold=0.25, temperature=(0.5, 4.0))
    assert policy.rows(2, 6) == [[3, 0.5, 0.25, 2.0], [3, 0.6, 0.25, 0.25]]


def saved_model(tmp_path: Path, case: str) -> Any:
    from tiny_models import make_model, save

    save(make_model(case), tmp_path)
    return read_model_config(tmp_path)


def calibration_of(model: Any, **values: Any) -> PolicyCalibration:
    classes = {"balanced": ExpertPolicy(threshold=0.4), "fast": ExpertPolicy(top_k=1)}
    temperature = None if model.moe.scoring == "softmax" else tuple(0.1 + i for i in range(len(model.moe_layers)))
    return PolicyCalibration(
        "tiny", len(model.moe_layers), model.moe.num_experts, model.moe.top_k, temperature, classes, **values
    )


def test_resolving_for_a_softmax_gate(tmp_path: Path) -> None:
    model = saved_model(tmp_path, "qwen3 normalised")
    policies = ExpertPolicies(model)
    assert policies.resolve(None) is None
    assert policies.resolve("full") is None
    assert policies.resolve(ExpertPolicy(temperature=None)) is None
    assert policies.resolve(ExpertPolicy(top_k=3)) == ExpertPolicy(top_k=3)
    for asked, message in (
        ("fast", "routing: 'fast' is not allowed for this model; it needs a file"),
        (ExpertPolicy(top_k=4), "routing.top_k: 4 is not allowed; the model uses 3 experts per token"),
        (ExpertPolicy(threshold=(0.1, 0.2)), "routing.threshold: 2 values are not allowed; .* the 3 sparse layers"),
        (ExpertPolicy(top_p=0.5, temperature=1.0), "routing.temperature: is not allowed with this model's softmax"),
    ):
        with pytest.raises(ValueError, match=message):
            policies.resolve(asked)
    calibrated = ExpertPolicies(model, calibration_of(model), default="balanced")
    assert calibrated.resolve(None) == ExpertPolicy(threshold=0.4)
    assert calibrated.resolve("fast") == ExpertPolicy(top_k=1)
    assert calibrated.resolve("full") is None
    with pytest.raises(ValueError, match="needs a file"):
        ExpertPolicies(model, default="balanced")


def test_resolving_for_a_sigmoid_gate(tmp_path: Path) -> None:
    model = saved_model(tmp_path, "glm4 groups")
    with pytest.raises(ValueError, match="need a temperature for this model's sigmoid gate"):
        ExpertPolicies(model).resolve(ExpertPolicy(threshold=0.5))
    assert ExpertPolicies(model).resolve(ExpertPolicy(top_k=2)) == ExpertPolicy(top_k=2)
    own = ExpertPolicy(top_p=0.5, temperature=0.2)
    assert ExpertPolicies(model).resolve(own) == own
    calibration = calibration_of(model)
    found = ExpertPolicies(model, calibration).resolve("balanced")
    assert found == ExpertPolicy(threshold=0.4, temperature=calibration.temperature)


def test_the_file_of_a_calibration(tmp_path: Path) -> None:
    model = saved_model(tmp_path, "glm4")
    calibration = calibration_of(model, measured=[{"mean_k": 2.5, "policy": "top_p"}])
    path = tmp_path / "calibration.json"
    calibration.save(path)
    assert PolicyCalibration.load(path) == calibration
    with pytest.raises(ValueError, match="is for 3 sparse layers, 12 experts and top_k 4; the model has"):
        replace(calibration, num_layers=3).check(model)
    for change, message in (
        ({"format": "x"}, "format: 'x' is not allowed"),
        ({"format_version": 9}, "format_version: 9 is not allowed"),
        ({"top_k": "4"}, "top_k: must be of type int"),
        ({"classes": {"slow": {}}}, "classes: 'slow' is not allowed"),
        ({"classes": {"fast": {"top_k": 0}}}, "routing.top_k: 0 is not allowed"),
        ({"temperature": [0]}, "routing.temperature"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            PolicyCalibration.load(path)
        calibration.save(path)
    with pytest.raises(ValueError, match="cannot be read"):
        PolicyCalibration.load(tmp_path / "none.json")


def slow_drop(
    config: MoEConfig, row: list[float], logits: torch.Tensor, weights: list[float], experts: list[int]
) -> tuple[list[float], list[int]]:
    """What a policy means, for one token."""
    most, mass, threshold, sharpness = row
    probabilities = (logits.double() * (sharpness if config.scoring == "sigmoid" else 1.0)).softmax(0).tolist()
    kept: list[int] = []
    total = 0.0
    for expert in experts:
        if len(kept) < most and total < mass:
            kept.append(expert)
            total += probabilities[expert]
    best = max(probabilities[expert] for expert in kept)
    kept = [expert for expert in kept if probabilities[expert] >= threshold * best]
    left = sum(weight for weight, expert in zip(weights, experts, strict=True) if expert in kept)
    factor = config.routed_scaling_factor / left if config.normalize_topk and len(kept) < len(experts) else 1.0
    return (
        [weight * factor if expert in kept else 0.0 for weight, expert in zip(weights, experts, strict=True)],
        [expert if expert in kept else -1 for expert in experts],
    )


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_gates_drop_what_the_policy_says(scoring: Any, normalize: bool, native: bool) -> None:
    config = MoEConfig(20, 6, 1, scoring=scoring, normalize_topk=normalize, routed_scaling_factor=1.5)
    num_tokens, hidden = 70, 24
    weight_ED, x_TD = torch.randn(20, hidden), torch.randn(num_tokens, hidden) / 3
    policies_P4 = torch.tensor(
        [
            [6, ALL_MASS, 0.0, 1.0],
            [3, ALL_MASS, 0.0, 1.0],
            [6, 0.4, 0.0, 0.7],
            [6, ALL_MASS, 0.45, 1.3],
            [5, 0.6, 0.3, 1.0],
            [1, ALL_MASS, 1.0, 2.0],
        ]
    )
    policy_T = torch.randint(0, len(policies_P4), (num_tokens,))
    logits_TE = x_TD @ weight_ED.T
    options = {"top_k": 6, "scoring": scoring, "normalize": normalize, "scale": 1.5}
    plain_weights, plain_experts = ops.topk_gate(logits_TE, **options)
    chosen_TK = torch.empty(num_tokens, 6, dtype=torch.int16)
    counts_2E = torch.zeros(2, 20, dtype=torch.int64)
    if native:
        from moe_runtime.kernels.cpu.blocks import GateCall, LayerPolicies
        from moe_runtime.kernels.cpu.loader import load_or_none
        from moe_runtime.kernels.cpu.native import gate_config

        kernels = load_or_none()
        if kernels is None:
            pytest.skip("no native CPU kernels here")
        gate = GateCall(kernels, gate_config(20, **options), weight_ED, counts_2E)
        unruled, experts, _ = gate(x_TD, 30)
        assert torch.equal(experts, plain_experts)
        counts_2E.zero_()
        weights_TK, experts_TK, _ = gate(x_TD, 30, LayerPolicies(policy_T, policies_P4, chosen_TK))
    else:
        from moe_runtime.layers.batch import StepPolicies
        from moe_runtime.layers.gate import TorchGate

        gate = TorchGate(config, weight_ED, None, None, counts_2E, 1)
        routing = StepPolicies(
            policy_T, torch.stack([policies_P4.flip(0), policies_P4]), torch.stack([chosen_TK, chosen_TK])
        )
        unruled, *_ = gate(x_TD, 30)
        counts_2E.zero_()
        weights_TK, experts_TK, _ = gate(x_TD, 30, routing)
        assert routing.chosen_LTK is not None
        chosen_TK = routing.chosen_LTK[1]
    assert torch.equal(chosen_TK.long(), experts_TK)
    for token in range(num_tokens):
        row = policies_P4[policy_T[token]].tolist()
        expected = slow_drop(
            config, row, logits_TE[token], plain_weights[token].tolist(), plain_experts[token].tolist()
        )
        assert experts_TK[token].tolist() == expected[1], (token, row)
        assert weights_TK[token].tolist() == pytest.approx(expected[0], rel=1e-5)
    whole = (experts_TK >= 0).all(1)
    assert whole[policy_T == 0].all()
    assert 0 < whole.sum() < num_tokens
    assert torch.equal(weights_TK[whole], unruled[whole])  # to the bit
    for phase, rows in ((1, experts_TK[:30]), (0, experts_TK[30:])):
        assert torch.equal(counts_2E[phase], torch.bincount(rows[rows >= 0], minlength=20))


def test_a_token_keeps_its_best_expert() -> None:
    """Also where a correction bias put another one first, or probabilities are not numbers."""
    config = MoEConfig(4, 3, 1, scoring="sigmoid", normalize_topk=True)
    logits = torch.tensor([[0.0, 5.0, 1.0, 2.0], [float("nan")] * 4])
    experts = torch.tensor([[0, 1, 2], [0, 1, 2]])
    policy = torch.tensor([[2.0, ALL_MASS, 1.0, 1.0]] * 2)
    weights, found = drop_experts(config, policy, logits, torch.full((2, 3), 1 / 3), experts)
    assert found[0].tolist() == [-1, 1, -1]
    assert weights[0].tolist() == [0.0, 1.0, 0.0]
    assert found[1].tolist() == [0, 1, -1]


def test_what_is_dropped_has_no_slot_and_takes_no_turn() -> None:
    layer = MoELayer(None, torch.tensor([0, 3, 5, 6]), None, None, None, {})  # type: ignore[arg-type]
    experts = torch.tensor([[3, -1], [-1, 1], [3, 0], [2, 3]])
    assert layer._slots(experts, in_turn=layer.has_replicas).tolist() == [[6, -1], [-1, 3], [6, 0], [5, 6]]
    layer.use_replicas(3, [6, 1])
    assert layer._slots(experts, in_turn=layer.has_replicas).tolist() == [[6, -1], [-1, 3], [1, 0], [5, 6]]
