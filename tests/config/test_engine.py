from __future__ import annotations

import dataclasses
import math

import pytest
from fakes import model_config

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import RopeConfig

BAD = [
    ("model", [None, "", 5]),
    ("tokenizer", ["", 5]),
    ("ep_size", [0, -1, None, True, 1.5, "2"]),
    ("dtype", ["float16", None, 5]),
    ("device", ["tpu", None]),
    ("max_model_len", [0, "8", True]),
    ("max_num_seqs", [0, None]),
    ("max_num_batched_tokens", [0, None, 10]),
    ("block_size", [0, 17, None]),
    ("kv_cache_memory_bytes", [0, 1e9]),
    ("enable_prefix_caching", [1, None, "yes"]),
    ("kv_cache_dtype", ["bfloat16", "fp8_e5m2", None, 8]),
    ("load_format", ["gguf", None]),
    ("skip_tokenizer_init", [1, None, "yes"]),
    ("batch_invariant", [1, None, "yes"]),
    ("enforce_eager", [0, None, "no"]),
    ("seed", [-1, None, "x", 0.5]),
    ("dispatcher", ["nccl", None]),
    (
        "redundant_experts",
        [-1, None, True, 1.5, "x", "", "1,", "-1", [], [0.0], [True], [[0]], {0: 1}, b"0", [0, 0], "0,0"],
    ),
    ("capacity_factor", [0, -1.5, math.inf, math.nan, 10**400, True, "2"]),
    ("overflow", ["wait", None, 5, "drop", "reroute"]),
    ("balance_epsilon", [0, 1, -0.1, math.nan, True, "0.1", 0.1]),
    ("served_model_name", [""]),
    ("step_timeout", [0, -1, math.nan, None, "5"]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_a_wrong_value_gets_one_line_that_names_the_field(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: [^\n]* is not allowed; [^\n]+$"):
        EngineConfig(**{"model": "demo", name: value})


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"^max_num_batched_tokens: 8 is not allowed; .* max_num_seqs \(9\)$"):
        EngineConfig("demo", max_num_batched_tokens=8, max_num_seqs=9)
    with pytest.raises(ValueError, match=r'^dispatcher: "local" is not allowed'):
        EngineConfig("demo", dispatcher="local", ep_size=2)


@pytest.mark.parametrize(
    ("value", "stored"),
    [(3, 3), ("3", 3), ("2, 0", (2, 0)), ([2, 0], (2, 0)), ((0, 5), (0, 5)), (range(2), (0, 1)), ("0,0", (0, 0))],
)
def test_redundant_experts_are_one_number_or_one_per_rank(value, stored):
    config = EngineConfig("demo", ep_size=2, redundant_experts=value)
    assert config.redundant_experts == stored
    assert dataclasses.replace(config, seed=1).redundant_experts == stored
    hash(config)


@pytest.mark.parametrize("value", [[2], [1, 2, 3], "1,2,3", [2, -1], "2,x", [2, True]])
def test_redundant_experts_of_other_ranks_are_refused(value):
    with pytest.raises(ValueError, match=r"^redundant_experts: .* an integer of at least 0, or one per rank \(2\)$"):
        EngineConfig("demo", ep_size=2, redundant_experts=value)


def test_one_rank_has_no_redundant_experts():
    assert EngineConfig("demo", redundant_experts=[0]).redundant_experts == (0,)
    for value in (1, [1]):
        with pytest.raises(ValueError, match=r"^redundant_experts, .* not allowed with ep_size 1"):
            EngineConfig("demo", redundant_experts=value)


def test_limits_say_whether_tokens_depend_on_the_batch():
    assert EngineConfig("demo").limits is None
    queue = EngineConfig("demo", capacity_factor=1).limits
    assert queue is not None and queue.queues and not queue.changes_experts
    for options in ({"capacity_factor": 1.5, "overflow": "drop"}, {"balance_epsilon": 0.1, "ep_size": 2}):
        limits = EngineConfig("demo", **options).limits
        assert limits is not None and limits.changes_experts and not limits.queues


def test_from_dict_refuses_unknown_names():
    assert EngineConfig.from_dict({"model": "demo", "ep_size": 2}) == EngineConfig("demo", ep_size=2)
    with pytest.raises(ValueError, match=r"^tensor_parallel_size: no such option; known options are \['model', "):
        EngineConfig.from_dict({"model": "demo", "tensor_parallel_size": 2})


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig("demo").ep_size = 2


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (RopeConfig(theta=1e4, rotary_dim=4), 1000),
        (RopeConfig(theta=1e4, rotary_dim=4, kind="linear", factor=2.5), 2500),
        (RopeConfig(theta=1e4, rotary_dim=4, kind="dynamic", factor=2.0), 2000),
        (RopeConfig(theta=1e4, rotary_dim=4, kind="llama3", factor=8.0, original_max_position=500), 1000),
        (RopeConfig(theta=1e4, rotary_dim=4, kind="yarn", factor=4.0, original_max_position=500), 2000),
    ],
)
def test_context_reaches_as_far_as_the_scaling_is_meant_to(rope, expected):
    model = dataclasses.replace(model_config(max_position_embeddings=1000), rope=rope)
    assert model.max_model_len == expected
