"""Migrations: rounds keep every expert placed, only checked copies are committed, failed rounds are rolled back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.balancer.live.migration import MAX_FAILURES, Migration
from moe_runtime.balancer.live.migration_rounds import next_round
from moe_runtime.balancer.placement import EMPTY, Placement
from moe_runtime.wire.messages import SlotReport, SlotTask


@dataclass
class Journey:
    """Two placements with replicas and spare slots on ranks with so many slots each, one of them empty everywhere."""

    num_slots: list[int]
    start: Placement
    target: Placement


@st.composite
def journeys(draw: st.DrawFn, num_layers: int = 1) -> Journey:
    num_slots = draw(st.lists(st.integers(2, 6), min_size=2, max_size=5))
    places = [(rank, slot) for rank, count in enumerate(num_slots) for slot in range(count - 1)]
    num_experts = draw(st.integers(1, len(places)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))

    def place() -> Placement:
        slots = np.full((num_layers, len(num_slots), max(num_slots)), EMPTY)
        for slots_WS in slots:
            order = [places[index] for index in random.permutation(len(places))]
            for expert, where in enumerate(order[:num_experts]):
                slots_WS[where] = expert
            for rank, slot in order[num_experts:]:
                expert = int(random.integers(-1, num_experts))
                if expert not in slots_WS[rank]:
                    slots_WS[rank, slot] = expert
            for rank, count in enumerate(num_slots):
                random.shuffle(slots_WS[rank, :count])
        return Placement(slots, num_experts, tuple(range(num_layers)))

    return Journey(num_slots, place(), place())


@given(journeys())
@settings(max_examples=300, deadline=None)
def test_rounds_reach_the_target_and_never_lose_an_expert(journey: Journey) -> None:
    start, target = journey.start, journey.target
    slots_WS, wanted_WE = start.slots[0].copy(), target.hosts[0]
    changes = int((wanted_WE != start.hosts[0]).sum())
    for _ in range(changes):  # each round makes one at least
        round_ = next_round(slots_WS, wanted_WE, journey.num_slots)
        if round_ is None:
            break
        assert len({rank for rank, _, _ in round_}) == len(round_)
        for rank, comes, leaves in round_:
            empty = np.nonzero(slots_WS[rank, : journey.num_slots[rank]] == EMPTY)[0]
            assert len(empty) and comes not in slots_WS[rank][slots_WS[rank] != EMPTY]
            if leaves != EMPTY:
                assert not wanted_WE[rank, leaves]
                slots_WS[rank, slots_WS[rank] == leaves] = EMPTY
            if comes != EMPTY:
                assert wanted_WE[rank, comes]
                slots_WS[rank, empty[0]] = comes
        Placement(slots_WS[None], start.num_experts, (0,))  # refuses what has lost an expert
        for row, count in zip(slots_WS, journey.num_slots, strict=True):
            assert (row[:count] == EMPTY).any() and (row[count:] == EMPTY).all()
    assert next_round(slots_WS, wanted_WE, journey.num_slots) is None
    found_WE = Placement(slots_WS[None], start.num_experts, (0,)).hosts[0]
    if not np.array_equal(found_WE, wanted_WE):  # a knot that one empty slot a rank cannot undo; none was ever seen
        assert not any_round(slots_WS, wanted_WE, journey.num_slots)


def any_round(slots_WS: np.ndarray, wanted_WE: np.ndarray, num_slots: list[int]) -> bool:
    """Whether there is a round in which an expert comes and none is lost; tries everything."""
    holds = [set(row[row != EMPTY].tolist()) for row in slots_WS]
    wanted = [set(np.nonzero(row)[0].tolist()) for row in wanted_WE]

    def starts(experts: Iterable[int], taken: dict[int, tuple[int, int]]) -> Iterator[dict[int, tuple[int, int]]]:
        """`taken` with one of the experts coming to a rank that wants it and has no change yet."""
        for rank, (held, want) in enumerate(zip(holds, wanted, strict=True)):
            gone = sorted(held - want) + [EMPTY] * (num_slots[rank] - len(held) > 1)
            for expert in experts if rank not in taken else ():
                if expert in want - held:
                    yield from (taken | {rank: (expert, leaves)} for leaves in gone)

    def is_possible(taken: dict[int, tuple[int, int]]) -> bool:
        after = [
            held - {taken[rank][1]} | {taken[rank][0]} if rank in taken else held for rank, held in enumerate(holds)
        ]
        lost = set.union(*wanted) - set.union(*after)
        return not lost or any(map(is_possible, starts([min(lost)], taken)))

    return any(map(is_possible, starts(sorted(set.union(*wanted)), {})))


def test_every_round_there_is_would_be_found() -> None:
    """The search that the test above believes in: two experts that change places, and one that must not leave."""
    swap = np.array([[0, EMPTY], [1, EMPTY]])
    assert any_round(swap, np.array([[False, True], [True, False]]), [2, 2])
    assert not any_round(swap, np.array([[True, False], [False, True]]), [2, 2])
    full = np.array([[0, 2], [1, EMPTY]])  # nothing can come to rank 0 unless something leaves, and nothing may
    assert not any_round(full, np.array([[True, True, True], [False, True, False]]), [2, 2])


@dataclass
class Ranks:
    """Ranks that hold numbers for weights; `faults` maps (rank, number of its task) to what goes wrong there."""

    placement: Placement
    num_slots: list[int]
    faults: dict[tuple[int, int], str] = field(default_factory=dict)
    pieces: int = 2

    def __post_init__(self) -> None:
        self.held = {
            (layer, rank, slot): expert
            for (layer, rank, slot), expert in np.ndenumerate(self.placement.slots)
            if expert != EMPTY
        }
        self.progress: dict[tuple[int, int], int] = {}
        self.num_tasks = [0] * self.placement.num_ranks
        self.inbox: list[SlotReport] = []
        self.now = 0.0

    def send(self, rank: int, task: SlotTask) -> None:
        key = (rank, task.task_id)
        if key not in self.progress:
            self.progress[key] = 0
            self.num_tasks[rank] += 1
        fault = self.faults.get((rank, self.num_tasks[rank]))
        if fault == "late":
            return
        if fault == "error":
            self.inbox.append(SlotReport(rank, task.task_id, True, 0, 0.0, error="no such file"))
            return
        copied = 0
        assert 0 <= task.slot < self.num_slots[rank], "a slot that the rank does not have"
        if task.expert != EMPTY:
            self.held.pop((task.layer, rank, task.slot), None)
            self.progress[key] += 1
            copied = 10
            if self.progress[key] < self.pieces:
                self.inbox.append(SlotReport(rank, task.task_id, False, copied, 0.5))
                return
            self.held[task.layer, rank, task.slot] = task.expert
        expert = self.held[task.layer, rank, task.slot]
        checksum = hash((task.layer, expert, fault == "corrupt"))
        self.inbox.append(SlotReport(rank, task.task_id, True, copied, 0.5, checksum))

    def run(self, migration: Migration) -> list[int]:
        """Until it is done; the versions that were committed."""
        versions = []
        for _ in range(3000):
            if migration.done:
                return versions
            if migration.tick():
                versions.append(migration.placement.version)
                for (layer, rank, slot), expert in np.ndenumerate(migration.placement.slots):
                    assert expert == EMPTY or self.held[layer, rank, slot] == expert, "a route to other weights"
            inbox, self.inbox = self.inbox, []
            for report in inbox:
                migration.take(report)
            self.now += 1.0
        raise AssertionError("no end")

    def migrate(self, target: Placement) -> Migration:
        return Migration(
            self.placement,
            target,
            self.send,
            num_slots=self.num_slots,
            expert_bytes=20,
            budget=lambda: 10,
            timeout=30.0,
            clock=lambda: self.now,
        )


@given(journeys(num_layers=3))
@settings(max_examples=100, deadline=None)
def test_a_migration_arrives(journey: Journey) -> None:
    start, target = journey.start, journey.target
    ranks = Ranks(start, journey.num_slots)
    migration = ranks.migrate(target)
    versions = ranks.run(migration)
    assert versions == sorted(set(versions)) and migration.placement.version == max(versions, default=0)
    wanted = int((target.hosts & ~start.hosts).sum())
    report = migration.report
    assert len(report.moves) + report.dropped_moves == wanted
    assert report.copied_bytes == 20 * len(report.moves)
    arrived = check_arrival(migration, target, journey.num_slots)
    assert arrived == (not report.dropped_moves)


def check_arrival(migration: Migration, target: Placement, num_slots: list[int]) -> bool:
    """Whether every layer has arrived; one that has not must be in a knot."""
    found, layers = migration.placement, range(len(target.slots))
    rest = [layer for layer in layers if not np.array_equal(found.hosts[layer], target.hosts[layer])]
    for layer in rest:
        assert not any_round(found.slots[layer], target.hosts[layer], num_slots)
    return not rest


@given(
    journeys(num_layers=2),
    st.dictionaries(
        st.tuples(st.integers(0, 4), st.integers(1, 4)), st.sampled_from(["late", "error", "corrupt"]), max_size=6
    ),
)
@settings(max_examples=200, deadline=None)
def test_whatever_fails_is_rolled_back(journey: Journey, faults: dict[tuple[int, int], str]) -> None:
    start, target = journey.start, journey.target
    ranks = Ranks(start, journey.num_slots, faults)
    migration = ranks.migrate(target)
    ranks.run(migration)  # checks that every slot with tokens holds the weights it should
    report = migration.report
    assert len(report.moves) + report.dropped_moves == int((target.hosts & ~start.hosts).sum())
    assert len(report.failures) <= MAX_FAILURES + 2  # layers whose moves have no order count as well
    if not report.failures:
        assert np.array_equal(migration.placement.hosts, target.hosts)


@pytest.mark.parametrize("fault", ["late", "error", "corrupt"])
def test_a_round_that_fails_once_is_made_again(fault: str) -> None:
    start = Placement(np.array([[[0, 1, -1], [2, 3, -1]]]), 4, (0,))
    target = Placement(np.array([[[0, 3, -1], [2, 1, -1]]]), 4, (0,))
    ranks = Ranks(start, [3, 3], {(1, 1): fault})
    migration = ranks.migrate(target)
    assert ranks.run(migration) == [1]
    assert np.array_equal(migration.placement.hosts, target.hosts)
    why = {"late": "no report within 30 s from rank 1", "error": "rank 1: no such file", "corrupt": "differs"}
    assert len(migration.report.failures) == 1 and why[fault] in migration.report.failures[0]
