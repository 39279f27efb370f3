import json

import numpy as np
import pytest
from balancer_samples import NO_DEADLINE, random_placement
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.balancer import Placement


@st.composite
def placements(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layer_ids = tuple(sorted(draw(st.sets(st.integers(0, 99), min_size=1, max_size=4))))
    return random_placement(
        rng, layer_ids, draw(st.integers(1, 9)), draw(st.integers(1, 5)), num_spare=draw(st.integers(0, 3))
    )


@NO_DEADLINE
@given(st.integers(1, 5), st.integers(1, 70), st.data())
def test_even_is_contiguous_and_even(num_layers, num_experts, data):
    num_ranks = data.draw(st.integers(1, num_experts))
    placement = Placement.even(num_layers, num_experts, num_ranks)
    assert placement.layer_ids == tuple(range(num_layers))
    for slots_WS in placement.slots:
        held = [[int(expert) for expert in slots if expert >= 0] for slots in slots_WS]
        assert [expert for experts in held for expert in experts] == list(range(num_experts))
        sizes = [len(experts) for experts in held]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
        assert placement.max_slots == sizes[0]


def test_even_takes_layer_indices_of_the_model():
    placement = Placement.even([1, 2, 5], 5, 2)
    assert placement.layer_ids == (1, 2, 5)
    assert placement.slots[2].tolist() == [[0, 1, 2], [3, 4, -1]]
    assert placement.slots.dtype == np.int32


@pytest.mark.parametrize("num_ranks", [0, 5])
def test_even_refuses_ranks_without_experts(num_ranks):
    with pytest.raises(ValueError, match=rf"num_ranks: {num_ranks} is not allowed; it must be from 1 to .*4"):
        Placement.even(2, 4, num_ranks)


@NO_DEADLINE
@given(placements())
def test_tables_agree_with_a_slow_search(placement):
    hosts, first = placement.hosts, placement.first_slot
    for layer in range(placement.num_layers):
        for expert in range(placement.num_experts):
            places = [
                (rank, slot)
                for rank in range(placement.num_ranks)
                for slot in range(placement.max_slots)
                if placement.slots[layer, rank, slot] == expert
            ]
            assert placement.ranks_of(layer, expert) == tuple(rank for rank, _ in places)
            assert np.flatnonzero(hosts[layer, :, expert]).tolist() == [rank for rank, _ in places]
            assert first[layer, expert] == places[0][0] * placement.max_slots + places[0][1]


@NO_DEADLINE
@given(placements(), st.data())
def test_in_other_slots_ranks_hold_the_same(placement, data):
    used_W = (placement.slots >= 0).sum(axis=2).max(axis=0)
    num_slots = [int(used) + data.draw(st.integers(0, 3)) for used in used_W]
    moved = placement.in_slots(num_slots)
    assert moved.max_slots == max(num_slots) and np.array_equal(moved.hosts, placement.hosts)
    assert (moved.version, moved.layer_ids) == (placement.version, placement.layer_ids)
    for (layer, rank), count in zip(np.ndindex(moved.slots.shape[:2]), num_slots * moved.num_layers, strict=True):
        before, after = placement.slots[layer, rank].tolist(), moved.slots[layer, rank].tolist()
        assert set(after[count:]) <= {-1}
        held = [expert for expert in before if expert >= 0]
        if set(before[count:]) <= {-1}:
            assert [expert for expert in after if expert >= 0] == held
            assert after[: min(count, len(before))] == before[:count], "nothing is in the way"
        else:
            assert after[: len(held)] == held
    assert moved.in_slots(num_slots) == moved
    if len(set(num_slots)) == 1:
        assert placement.in_slots(num_slots[0]) == moved


def test_fewer_slots_than_experts_are_refused_by_rank():
    with pytest.raises(ValueError, match=r"^num_slots: 1 is not allowed; in layer 3 rank 1 holds 2 experts$"):
        Placement.even([3, 4], 4, 2).in_slots([4, 1])


@pytest.mark.parametrize(("layer", "expert"), [(-1, 0), (2, 0), (0, -1), (0, 4)])
def test_ranks_of_refuses_what_is_not_there(layer, expert):
    with pytest.raises(ValueError, match="is not allowed; it must be from 0 to"):
        Placement.even(2, 4, 2).ranks_of(layer, expert)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([[0, 1], [2, 4]], r"layer 7, rank 1: expert 4 is not allowed; it must be from 0 to 3, or -1"),
        ([[0, 1], [2, -2]], r"layer 7, rank 1: expert -2 is not allowed"),
        ([[0, 1, 3], [2, 3, 2]], r"layer 7, rank 1: expert 2 has two slots"),
        ([[0, 1], [2, -1]], r"layer 7: expert 3 has no slot on any rank"),
        ([[0, 1, 2]], r"num_experts: 4 is not allowed; it must be from 1 to a layer's slots, 3"),
    ],
)
def test_validation_names_layer_rank_and_expert(slots, message):
    good = [list(range(4)) + [-1] * (len(slots) * len(slots[0]) - 4)] if len(slots) * len(slots[0]) >= 4 else slots
    both = np.array([np.reshape(good, np.shape(slots)), slots])
    with pytest.raises(ValueError, match=message) as error:
        Placement(both, 4, (3, 7))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layer_ids", [(3,), (3, 3), (4, 3), (-1, 3), (0, 1.5), (0, True), (0, 1, 2)])
def test_layer_ids_must_fit(layer_ids):
    with pytest.raises(ValueError, match=r"layer_ids: .* must be 2 ascending integers"):
        Placement(np.zeros((2, 1, 1), np.int64), 1, layer_ids)


@pytest.mark.parametrize("slots", [np.zeros((2, 2)), np.zeros((1, 1, 1)), np.zeros((1, 0, 1), np.int32)])
def test_slots_must_be_integers_of_three_dimensions(slots):
    with pytest.raises(ValueError, match=r"slots: an array of .* is not allowed"):
        Placement(slots, 1, (0,))


def test_a_placement_does_not_change():
    slots = Placement.even(1, 4, 2).slots.copy()
    placement = Placement(slots, 4, (0,))
    slots[0, 0, 0] = 3
    assert placement.slots[0, 0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        placement.slots[0, 0, 0] = 3


def test_equality():
    placement = Placement.even(2, 4, 2)
    assert placement == Placement.even(2, 4, 2)
    assert placement != Placement.even([0, 2], 4, 2)
    assert placement != Placement.even(2, 4, 4)
    assert placement != Placement(placement.slots, 4, (0, 1), version=1)
    assert placement != Placement(placement.slots[:, ::-1], 4, (0, 1))
    assert placement != "placement"


@NO_DEADLINE
@given(placements())
def test_file_round_trip(tmp_path_factory, placement):
    path = tmp_path_factory.mktemp("placement") / "p.json"
    placement.save(path)
    assert Placement.load(path) == placement
    assert json.loads(path.read_text()) == placement.to_dict()


def test_file_has_a_line_per_layer_and_rank(tmp_path):
    before, after = Placement.even(3, 8, 4), Placement.even(3, 8, 4).slots.copy()
    after[1, 2, 0], after[1, 3, 0] = after[1, 3, 0], after[1, 2, 0]
    before.save(tmp_path / "before.json")
    Placement(after, 8, (0, 1, 2)).save(tmp_path / "after.json")
    lines = [(tmp_path / name).read_text().splitlines() for name in ("before.json", "after.json")]
    changed = [pair for pair in zip(*lines, strict=True) if pair[0] != pair[1]]
    assert changed == [
        ('  {"layer": 1, "rank": 2, "experts": [4, 5]},', '  {"layer": 1, "rank": 2, "experts": [6, 5]},'),
        ('  {"layer": 1, "rank": 3, "experts": [6, 7]},', '  {"layer": 1, "rank": 3, "experts": [4, 7]},'),
    ]


def damage(**changes):
    return lambda data: json.dumps({**data, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: "[1, 2]", 'format: .* it must be "moe_runtime.placement"'),
        (lambda data: json.dumps(data)[:-20], "not valid JSON"),
        (lambda data: "\udcff", "not a text file"),
        (damage(format="moe_runtime.expert_load"), "format: 'moe_runtime.expert_load' is not allowed"),
        (damage(format_version=2), "format_version: 2 is not allowed; it must be 1"),
        (damage(version="new"), "version: must be of type int; it is of type str"),
        (damage(num_experts=True), "num_experts: must be of type int"),
        (damage(num_experts=5), "layer 0: expert 4 has no slot|num_experts: 5 is not allowed"),
        (damage(num_ranks=3), "layer 0, rank 2: is missing"),
        (damage(num_ranks=1), "layer 0, rank 1: slots must name every layer and rank once, no other"),
        (damage(max_slots=3), "layer 0, rank 0: experts must be 3 integers"),
        (damage(layer_ids=[1, 0]), "layer_ids: .* ascending"),
        (damage(slots=[5]), "slots: 5 is not allowed"),
        (lambda data: json.dumps({key: value for key, value in data.items() if key != "slots"}), "slots: .* missing"),
        (lambda data: json.dumps(data).replace("[2, 3]", "[2, 2]"), "layer 0, rank 1: expert 2 has two slots"),
        (lambda data: json.dumps(data).replace("[2, 3]", "[2, 1.0]"), "layer 0, rank 1: experts must be 2 integers"),
        (lambda data: json.dumps(data).replace('"rank": 1', '"rank": 0'), "layer 0, rank 0: slots must name"),
    ],
)
def test_foreign_and_damaged_files_are_refused_by_name(tmp_path, change, message):
    path = tmp_path / "p.json"
    path.write_text(change(Placement.even(1, 4, 2).to_dict()), errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as error:
        Placement.load(path)
    assert str(error.value).startswith(f"{path}: not a placement file: ")
    assert "\n" not in str(error.value)
