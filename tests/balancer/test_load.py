import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from balancer_samples import NO_DEADLINE, random_load
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.balancer import ExpertLoad, HotExpert, Placement

PHASES = st.sampled_from(["prefill", "decode", None])


@st.composite
def loads(draw):
    num_experts = draw(st.integers(1, 9))
    return random_load(
        seed=draw(st.integers(0, 2**32)),
        num_layers=draw(st.integers(1, 4)),
        num_experts=num_experts,
        num_ranks=draw(st.sampled_from([None, 1, 2, 3, 5])),
        num_spare=draw(st.integers(0, 2)),
        top_k=draw(st.integers(1, num_experts)),
        num_tokens=draw(st.tuples(st.sampled_from([0, 1, 50]), st.sampled_from([0, 1, 50]))),
    )


def one_layer(prefill, decode, slots=None, **fields):
    placement = None if slots is None else Placement(np.array([slots]), len(prefill), (3,))
    return ExpertLoad({"prefill": np.array([prefill]), "decode": np.array([decode])}, (3,), placement, **fields)


def test_balancedness_by_hand():
    load = one_layer([6, 2, 1, 3], [0, 0, 4, 4], [[0, 1], [2, 3]])
    assert load.rank_load("prefill").tolist() == [[8, 4]]
    assert load.balancedness("prefill").tolist() == [6 / 8]
    assert load.balancedness("decode").tolist() == [4 / 8]
    assert load.balancedness().tolist() == [10 / 12]
    replicated = one_layer([6, 2, 1, 3], [0, 0, 4, 4], [[0, 1, -1], [2, 3, 0]])
    assert replicated.rank_load("prefill").tolist() == [[5, 7]]
    assert replicated.balancedness("prefill").tolist() == [6 / 7]
    assert one_layer([6, 2, 1, 3], [0, 0, 0, 0]).balancedness("prefill").tolist() == [3 / 6]
    assert one_layer([6, 2, 1, 3], [0, 0, 0, 0], [[0, 1], [2, 3]]).balancedness("decode").tolist() == [1]


def slow_balancedness(load, phase):
    found = []
    for layer, counts_E in enumerate(load.counts(phase).tolist()):
        if load.placement is None:
            ranks = [Fraction(count) for count in counts_E]
        else:
            ranks = [Fraction(0)] * load.placement.num_ranks
            for expert, count in enumerate(counts_E):
                hosts = load.placement.ranks_of(layer, expert)
                for rank in hosts:
                    ranks[rank] += Fraction(count, len(hosts))
        found.append(float(sum(ranks) / len(ranks) / max(ranks)) if max(ranks) else 1.0)
    return found


@NO_DEADLINE
@given(loads(), PHASES)
def test_balancedness_and_skew_against_slow_twins(load, phase):
    balancedness_L = load.balancedness(phase)
    np.testing.assert_allclose(balancedness_L, slow_balancedness(load, phase), rtol=1e-12)
    assert ((balancedness_L > 0) & (balancedness_L <= 1)).all()
    skew = [max(row) * len(row) / sum(row) if sum(row) else 1.0 for row in load.counts(phase).tolist()]
    np.testing.assert_allclose(load.skew(phase), skew, rtol=1e-12)
    np.testing.assert_allclose(load.rank_load(phase).sum(axis=1), load.counts(phase).sum(axis=1), rtol=1e-12)


@NO_DEADLINE
@given(loads(), PHASES, st.integers(0, 50))
def test_hottest_against_a_full_sort(load, phase, n):
    cells = [
        HotExpert(load.layer_ids[layer], expert, count, count / sum(row))
        for layer, row in enumerate(load.counts(phase).tolist())
        for expert, count in enumerate(row)
        if count
    ]
    assert load.hottest(n, phase) == sorted(cells, key=lambda cell: -cell.tokens)[:n]


def test_hottest_names_the_models_layer():
    load = one_layer([6, 2, 1, 3], [0, 0, 4, 4])
    assert load.hottest(2) == [HotExpert(3, 3, 7, 0.35), HotExpert(3, 0, 6, 0.3)]
    assert load.hottest(1, "decode") == [HotExpert(3, 2, 4, 0.5)]


def test_num_tokens_where_the_counts_tell_it():
    load = random_load(seed=5, top_k=3, num_tokens=(70, 9))
    assert (load.num_tokens("prefill"), load.num_tokens("decode"), load.num_tokens()) == (70, 9, 79)
    assert one_layer([6, 2], [1, 1]).num_tokens() is None
    assert one_layer([6, 3], [1, 1], top_k=2).num_tokens("prefill") is None
    adaptive = {"prefill": np.array([[2, 2], [3, 3]]), "decode": np.zeros((2, 2), np.int64)}
    assert ExpertLoad(adaptive, (0, 1), top_k=2).num_tokens("prefill") is None


@NO_DEADLINE
@given(loads(), st.integers(0, 2**32))
def test_a_window_is_what_came_after(earlier, seed):
    rng = np.random.default_rng(seed)
    window = {phase: rng.integers(0, 99, counts.shape) for phase, counts in earlier.tokens.items()}
    tokens = {phase: earlier.tokens[phase] + window[phase] for phase in window}
    later = ExpertLoad(tokens, earlier.layer_ids, earlier.placement, earlier.model, earlier.top_k)
    assert later - earlier == ExpertLoad(window, later.layer_ids, later.placement, later.model, later.top_k)


def test_a_window_needs_two_loads_of_one_run():
    earlier, later = one_layer([1, 2], [3, 4]), one_layer([1, 3], [3, 4])
    with pytest.raises(ValueError, match="the counts fell"):
        earlier - later
    with pytest.raises(ValueError, match="1 layers of 3 experts cannot be subtracted from 1 layers of 2"):
        earlier - one_layer([1, 2, 3], [3, 4, 5])


@NO_DEADLINE
@given(loads())
def test_dictionary_round_trip(load):
    data = load.to_dict()
    assert ExpertLoad.from_dict(data) == load
    assert data["phases"]["decode"] == load.tokens["decode"].tolist()
    assert data["balancedness"]["total"] == load.balancedness().tolist()
    assert data["hottest"]["prefill"] == [hot._asdict() for hot in load.hottest(10, "prefill")]
    assert data["num_tokens"] == {
        name: load.num_tokens(None if name == "total" else name) for name in data["num_tokens"]
    }


def test_equality_sees_every_field():
    load = one_layer([1, 2], [3, 4], [[0], [1]], model="a", top_k=1)
    assert load == one_layer([1, 2], [3, 4], [[0], [1]], model="a", top_k=1)
    assert load != one_layer([1, 2], [3, 5], [[0], [1]], model="a", top_k=1)
    assert load != one_layer([1, 2], [3, 4], [[1], [0]], model="a", top_k=1)
    assert load != one_layer([1, 2], [3, 4], None, model="a", top_k=1)
    assert load != one_layer([1, 2], [3, 4], [[0], [1]], model="b", top_k=1)
    assert load != one_layer([1, 2], [3, 4], [[0], [1]], model="a", top_k=2)


COUNTS = np.ones((2, 4), np.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": {"prefill": COUNTS}}, r"phases \['prefill'\] are not allowed"),
        ({"tokens": {"prefill": COUNTS, "decode": COUNTS[:, :3]}}, "prefill has shape .* and decode"),
        ({"tokens": {"prefill": COUNTS, "decode": COUNTS * 1.0}}, "decode: an array of float64"),
        ({"tokens": {"prefill": COUNTS[0], "decode": COUNTS}}, r"prefill: an array of int64 and shape \(4,\)"),
        ({"tokens": {"prefill": COUNTS, "decode": -COUNTS}}, "decode: -1 is not allowed"),
        ({"layer_ids": (1,)}, r"layer_ids: \[1\] is not allowed; they must be 2"),
        ({"placement": Placement.even(2, 5, 2)}, "placement: is for other layers or another number of experts"),
        ({"placement": Placement.even([0, 2], 4, 2)}, "placement: is for other layers"),
        ({"top_k": 5}, "top_k: 5 is not allowed; it must be from 1 to 4"),
    ],
)
def test_validation(changes, message):
    good = {"tokens": {"prefill": COUNTS, "decode": COUNTS}, "layer_ids": (0, 1)}
    ExpertLoad(**good)
    with pytest.raises(ValueError, match=message):
        ExpertLoad(**{**good, **changes})


def test_another_phase_is_refused():
    with pytest.raises(ValueError, match="phase: 'both' is not allowed"):
        random_load(seed=1).balancedness("both")


def test_counts_do_not_change():
    counts = COUNTS.copy()
    load = ExpertLoad({"prefill": counts, "decode": counts}, (0, 1))
    counts += 1
    assert load.total.sum() == 16
    with pytest.raises(ValueError, match="read-only"):
        load.tokens["prefill"][0, 0] = 3


def test_import_and_data_formats_need_neither_matplotlib_nor_torch():
    code = """
import sys
import numpy as np
from moe_runtime.balancer import ExpertLoad
ones = np.ones((1, 2), np.int64)
load = ExpertLoad({"prefill": ones, "decode": ones}, (0,))
for format in ("html", "csv", "json", "npz"):
    load.render(format)
found = {"matplotlib", "torch", "zmq", "pydantic"} & set(sys.modules)
assert not found, found
load.render("png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
