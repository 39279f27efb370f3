"""Properties of all predictions, and a few predictions that can be computed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planner_shapes import FREE, IDEAL, certain, even, tiny

from moe_runtime.balancer.placement import Placement
from moe_runtime.balancer.plan import plan_placement
from moe_runtime.planner.hardware import Hardware, Link, Overheads
from moe_runtime.planner.hardware_file import load_hardware
from moe_runtime.planner.predict import Workload, predict
from moe_runtime.planner.routing import LoadRouting
from moe_runtime.planner.shape import Matrix


def test_a_decode_step_of_one_rank_by_hand():
    shape = tiny(top_k=4)
    found = predict(shape, IDEAL, even(shape, 1), certain(shape), Workload("decode", 2, 30))
    assert found.parts == pytest.approx(
        {
            "attention": 2 * 10_000 / 1e9,
            "kv": 2 * 2 * 30 * 200 / 1e9,
            "dense": (20_000 + 400) / 1e9,
            "experts": 4 * 100_000 / 1e9,
            "exchange": 0,
            "head": 100_000 / 1e9,
            "overhead": 0,
        }
    )
    assert found.tokens == 2 and found.balancedness == 1.0
    assert found.tokens_per_second == pytest.approx(2 / found.step_seconds)
    assert found.busy_seconds == pytest.approx(found.step_seconds)
    dense = 2 * 10_000 + 20_000 + 400 + 100_000
    assert found.rank_memory.total == dense + 4 * 100_000 + 2 * 30 * 2 * 200


def test_weights_are_read_and_held_at_the_bytes_that_kernels_give_them():
    shape, work = tiny(top_k=4), Workload("decode", 2, 30)
    found = predict(shape, IDEAL, even(shape, 1), certain(shape), work)
    packed = replace(IDEAL, weight_bytes={"bfloat16": 1.5, "float32": 4.0})
    less = predict(shape, packed, even(shape, 1), certain(shape), work)
    for part in ("attention", "dense", "experts", "head"):
        assert less.parts[part] == pytest.approx(0.75 * found.parts[part])
    assert less.parts["kv"] == found.parts["kv"]
    for part in ("dense", "experts"):
        assert getattr(less.rank_memory, part) == pytest.approx(0.75 * getattr(found.rank_memory, part))


def test_reading_experts_reaches_a_share_of_the_bandwidth():
    shape, work = tiny(top_k=4), Workload("decode", 2, 30)
    found = predict(shape, IDEAL, even(shape, 1), certain(shape), work)
    slower = predict(shape, replace(IDEAL, expert_bandwidth=0.8), even(shape, 1), certain(shape), work)
    assert slower.parts["experts"] == pytest.approx(found.parts["experts"] / 0.8)
    assert slower.parts | {"experts": 0} == found.parts | {"experts": 0}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_interpreter_takes_longer_the_more_was_read_meanwhile(ranks):
    """Of a step: what all ranks read, each its own dense weights."""
    shape = tiny(top_k=4)
    dense = ranks * (2 * 10_000 + 20_000 + 400)
    step = dense + 400_000 + 2 * 2 * ranks * 30 * 200 + ranks * 100_000
    hardware = replace(
        IDEAL,
        cold_factor=((0, 1.0), (1e7, 11.0)),  # 1e-6 more for each byte
        overheads=replace(FREE, step=1e-3, step_ranks=2e-3),
    )
    found = predict(shape, hardware, even(shape, ranks), certain(shape), Workload("decode", 2 * ranks, 30))
    assert found.parts["overhead"] == pytest.approx(ranks * 1e-3 * (1 + step * 1e-6))


def test_many_rows_are_bound_by_computing():
    shape = tiny(top_k=4)
    slow = replace(IDEAL, matrix_rate={"bfloat16": ((1, 1e9),)})
    found = predict(shape, slow, even(shape, 1), certain(shape), Workload("prefill", 1, 40))
    assert found.parts["experts"] == pytest.approx(4 * 2 * 50_000 * 40 / 1e9)
    assert found.parts["kv"] == pytest.approx(2 * max(40 * 200 / 1e9, 40 * 41 / 2 / 1e9))
    assert found.parts["head"] == pytest.approx(100_000 / 1e9)  # one row a prompt: reading is slower


def test_a_window_bounds_the_keys():
    shape = tiny(top_k=4)
    wide = predict(shape, IDEAL, even(shape, 1), certain(shape), Workload("decode", 1, 30))
    for windows, share in (((10, 10), 1 / 3), ((10, None), 2 / 3)):
        narrow = predict(
            replace(shape, windows=windows), IDEAL, even(shape, 1), certain(shape), Workload("decode", 1, 30)
        )
        assert narrow.parts["kv"] == pytest.approx(wide.parts["kv"] * share)


@pytest.mark.parametrize(("rule", "out"), [("expert", 2), ("rank", 1)])
def test_rows_between_two_ranks_by_hand(rule, out):
    """Each rank has 3 tokens and half of the 4 experts; every token needs all: 2 experts and 1 rank are remote."""
    shape = tiny(top_k=4)
    hardware = replace(IDEAL, rows_out=rule)
    found = predict(shape, hardware, even(shape, 2), certain(shape), Workload("decode", 6, 30))
    assert found.parts["exchange"] == pytest.approx(3 * (out * 1000 + 2 * 3000) / 1e9)
    assert found.parts["experts"] == pytest.approx(2 * 100_000 / 1e9)


def test_rows_travel_once_to_a_node_and_are_handed_on():
    """Two nodes of two ranks, an expert each: a token's row crosses once, and is handed to both ranks behind."""
    shape = tiny(top_k=4, bytes_back=1000)
    hardware = replace(IDEAL, ranks_per_node=2, rows_out="node", rows_back="node", inter_node=Link(1e8, 0))
    found = predict(shape, hardware, even(shape, 4), certain(shape), Workload("decode", 8, 30))
    assert found.parts["exchange"] == pytest.approx(2 * 2 * 1000 / 1e8)  # 2 tokens a rank, out and back
    near = replace(hardware, inter_node=Link(1e12, 0))
    found = predict(shape, near, even(shape, 4), certain(shape), Workload("decode", 8, 30))
    assert found.parts["exchange"] == pytest.approx(2 * (2 + 4) * 1000 / 1e9)


def test_two_halves_hide_the_shorter_of_computing_and_sending():
    shape, work = tiny(top_k=4), Workload("prefill", 4, 50)
    slow = replace(IDEAL, matrix_rate={"bfloat16": ((1, 1e9),)})
    for link in (Link(1e5, 0), Link(1e12, 0)):
        apart = replace(slow, intra_node=link)
        taken = predict(shape, apart, even(shape, 2), certain(shape), work)
        both = predict(shape, replace(apart, overlap=2), even(shape, 2), certain(shape), work)
        layers = sum(taken.parts[name] for name in ("attention", "kv", "dense", "experts"))
        longer = max(layers, taken.parts["exchange"])
        assert both.step_seconds - both.parts["head"] == pytest.approx(longer, rel=0.02)


def test_ranks_that_take_turns_on_cores():
    shape = tiny(top_k=4)
    cores = replace(IDEAL, cores=2, ranks_per_node=8, memory_bandwidth=((1, 1e9), (2, 1.5e9)))
    placement, routing = even(shape, 4), certain(shape)
    found = predict(shape, cores, placement, routing, Workload("decode", 4, 30))
    assert found.parts["attention"] == pytest.approx(2 * 2 * 10_000 / 0.75e9)  # two turns, two at work at once
    assert found.busy_seconds > found.step_seconds
    waiting = replace(cores, overheads=replace(FREE, wait=0.01))
    assert predict(shape, waiting, placement, routing, Workload("decode", 4, 30)) == found
    one = Workload("decode", 1, 30)
    spent = predict(shape, waiting, placement, routing, one).busy_seconds
    spent -= predict(shape, cores, placement, routing, one).busy_seconds
    assert spent == pytest.approx(3 * 2 * 0.01)  # ranks without a sequence, exchanges of the one sparse layer


def test_a_rank_reads_its_experts_faster_once_the_other_has_read_its_own():
    """Of 3 experts in 4 slots one rank has 2: while both read each has 0.75 GB/s, then the one alone has 1."""
    shape = tiny(num_experts=3, top_k=3)
    cores = replace(IDEAL, cores=2, ranks_per_node=8, memory_bandwidth=((1, 1e9), (2, 1.5e9)))
    placement = Placement.even(1, 3, 2)
    found = predict(shape, cores, placement, certain(shape), Workload("decode", 1, 30))
    assert found.parts["experts"] == pytest.approx(100_000 / 0.75e9 + 100_000 / 1e9)
    devices = replace(cores, cores=None, ranks_per_node=2)
    apart = predict(shape, devices, placement, certain(shape), Workload("decode", 1, 30))
    assert apart.parts["experts"] == pytest.approx(2 * 100_000 / 1e9)


def test_ranks_with_cores_copy_their_own_rows_too():
    """Each of 2 ranks has 3 tokens, which go to both, and computes 2 rows of each of all 6."""
    shape = tiny(top_k=4)
    cores = replace(IDEAL, cores=2, rows_out="rank")
    found = predict(shape, cores, even(shape, 2), certain(shape), Workload("decode", 6, 30))
    assert found.parts["exchange"] == pytest.approx(((3 + 6) * 1000 + 6 * 2 * 3000) / 1e9)


@pytest.mark.parametrize(("cores", "ranks", "each"), [(None, 1, 1), (4, 1, 4), (4, 2, 2), (4, 4, 1)])
def test_passes_over_rows_are_shared_by_the_cores_of_a_rank(cores, ranks, each):
    shape, work = tiny(top_k=4), Workload("decode", 4 * ranks, 30)
    free = replace(IDEAL, cores=cores)
    paid = replace(free, overheads=replace(FREE, layer_byte=1e-9, expert_byte=1e-8))
    without, found = (predict(shape, hardware, even(shape, ranks), certain(shape), work) for hardware in (free, paid))
    passes = 8 * 2 + 4  # two norms in each of two layers, a sum in the sparse one
    assert found.parts["overhead"] == pytest.approx(4 * passes * 3000 * 1e-9 / each)
    rows = 4 * ranks * 4 / ranks  # of a rank: tokens by experts
    assert found.parts["experts"] - without.parts["experts"] == pytest.approx(rows * 3000 * 1e-8 / each)


WORK = st.builds(
    Workload, st.sampled_from(["decode", "prefill"]), sequences=st.integers(1, 64), length=st.integers(1, 300)
)


def faster(hardware: Hardware, what: str) -> Hardware:
    """One rate of it a half more."""

    def more(table):
        return tuple((x, 1.5 * y) for x, y in table)

    changes: Mapping[str, dict[str, object]] = {
        "bandwidth": {"memory_bandwidth": more(hardware.memory_bandwidth)},
        "rate": {"matrix_rate": {dtype: more(table) for dtype, table in hardware.matrix_rate.items()}},
        "near": {"intra_node": replace(hardware.intra_node, bandwidth=1.5 * hardware.intra_node.bandwidth)},
        "far": {"inter_node": replace(hardware.inter_node, latency=0.5 * hardware.inter_node.latency)},
        "overheads": {"overheads": Overheads(**{k: v / 2 for k, v in vars(hardware.overheads).items()})},
        "caches": {"cold_factor": tuple((2 * nbytes, factor) for nbytes, factor in hardware.cold_factor)},
        "experts": {"expert_bandwidth": 1.0},
        "rows": {"rows_back": "rank"},
    }
    return replace(hardware, **changes[what])


@settings(max_examples=40, deadline=None)
@example("cpu", "rows", 1, 6, 1, 0.0, Workload("prefill", sequences=3, length=4))
@given(
    st.sampled_from(["cpu", "h200"]),
    st.sampled_from(["bandwidth", "rate", "near", "far", "overheads", "caches", "experts", "rows"]),
    st.sampled_from([1, 2]),
    st.integers(1, 12),
    st.integers(0, 3),
    st.floats(0, 2),
    WORK,
)
def test_faster_hardware_is_never_slower_and_figures_are_sound(name, what, overlap, ranks, extra, zipf, work):
    shape = tiny(num_experts=12, top_k=3)
    routing = LoadRouting.assume(f"zipf:{zipf}", 12, 3)
    slots = min(-(-12 // ranks) + (extra if ranks > 1 else 0), 12)
    placement = plan_placement(routing.plan_load, ranks, slots).placement
    hardware = replace(load_hardware(name), overlap=overlap)
    found = predict(shape, hardware, placement, routing, work)
    better = predict(shape, faster(hardware, what), placement, routing, work)
    assert better.step_seconds <= found.step_seconds * (1 + 1e-9)
    for prediction in (found, better):
        assert 0 < prediction.balancedness <= 1
        assert all(seconds >= 0 for seconds in prediction.parts.values())
        assert np.isfinite(prediction.step_seconds) and prediction.step_seconds > 0
        assert prediction.busy_seconds > 0
    assert better.balancedness == found.balancedness


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["decode", "prefill"]), st.integers(1, 6), st.integers(1, 12))
def test_more_sequences_take_longer_and_more_memory(phase, ranks, sequences):
    shape = tiny(num_experts=12, top_k=12)  # every token uses all, so that nothing is drawn
    few, many = (
        predict(shape, load_hardware("cpu"), even(shape, ranks), certain(shape), Workload(phase, count * ranks, 40))
        for count in (sequences, sequences + 1)
    )
    assert many.step_seconds >= few.step_seconds
    assert many.rank_memory.total > few.rank_memory.total


def test_a_placement_or_dtype_that_does_not_fit():
    shape, routing, work = tiny(), LoadRouting.assume("uniform", 4, 1), Workload("decode", 1, 5)
    with pytest.raises(ValueError, match="placement: 1 layers of 4 experts are not allowed; it must have 4 layers"):
        predict(shape, IDEAL, even(shape, 2), routing, work)
    with pytest.raises(ValueError, match="dtype: 'float8' is not in the hardware profile 'ideal'"):
        float8 = replace(shape, head=Matrix(10, 10, "float8"))
        predict(float8, IDEAL, even(shape, 2, layers=4), routing, work)
