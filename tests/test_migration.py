"""Migrations: rounds keep every expert placed, only what was checked is committed, what fails is rolled back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.balancer.placement import EMPTY, Placement
from moe_runtime.messages import SlotReport, SlotTask
from moe_runtime.migration import MAX_FAILURES, Migration
from moe_runtime.migration_rounds import next_round


@st.composite
def journeys(draw: st.DrawFn, num_layers: int = 1) -> tuple[Placement, Placement]:
    """Two placements with replicas and spare slots on the same ranks, each with an empty slot everywhere."""
    num_ranks = draw(st.integers(2, 5))
    num_slots = draw(st.integers(1, 5))
    num_experts = draw(st.integers(1, num_ranks * num_slots))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))

    def place() -> Placement:
        slots = np.full((num_layers, num_ranks, num_slots + 1), EMPTY)
        for slots_WS in slots:
            where = random.permutation(num_ranks * num_slots)[:num_experts]
            for expert, place in enumerate(where):
                slots_WS[place // num_slots, place % num_slots] = expert
            for rank, slot in np.argwhere(slots_WS[:, :num_slots] == EMPTY):
                expert = int(random.integers(-1, num_experts))
                if expert not in slots_WS[rank]:
                    slots_WS[rank, slot] = expert
            for row in slots_WS:
                random.shuffle(row)
        return Placement(slots, num_experts, tuple(range(num_layers)))

    return place(), place()


@given(journeys())
@settings(max_examples=300, deadline=None)
def test_rounds_reach_the_target_and_never_lose_an_expert(journey: tuple[Placement, Placement]) -> None:
    start, target = journey
    slots_WS, wanted_WE = start.slots[0].copy(), target.hosts[0]
    for _ in range(200):
        changes = next_round(slots_WS, wanted_WE)
        if changes is None:
            break
        assert len({rank for rank, _, _ in changes}) == len(changes)
        for rank, comes, leaves in changes:
            empty = np.nonzero(slots_WS[rank] == EMPTY)[0]
            assert len(empty) and comes not in slots_WS[rank][slots_WS[rank] != EMPTY]
            if leaves != EMPTY:
                assert not wanted_WE[rank, leaves]
                slots_WS[rank, slots_WS[rank] == leaves] = EMPTY
            if comes != EMPTY:
                assert wanted_WE[rank, comes]
                slots_WS[rank, empty[0]] = comes
        Placement(slots_WS[None], start.num_experts, (0,))  # refuses what has lost an expert
        assert ((slots_WS == EMPTY).any(axis=1)).all()
    missing = (wanted_WE & ~Placement(slots_WS[None], start.num_experts, (0,)).hosts[0]).sum()
    if not missing:
        assert np.array_equal(Placement(slots_WS[None], start.num_experts, (0,)).hosts[0], wanted_WE)
    else:  # moves in a knot that one shadow cannot undo are rare, and are left alone
        assert missing <= wanted_WE.sum() // 2


@dataclass
class Ranks:
    """Ranks that hold numbers for weights; `faults` maps (rank, number of its task) to what goes wrong there."""

    placement: Placement
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
            self.placement, target, self.send, expert_bytes=20, budget=lambda: 10, timeout=30.0, clock=lambda: self.now
        )


@given(journeys(num_layers=3))
@settings(max_examples=100, deadline=None)
def test_a_migration_arrives(journey: tuple[Placement, Placement]) -> None:
    start, target = journey
    ranks = Ranks(start)
    migration = ranks.migrate(target)
    versions = ranks.run(migration)
    assert versions == sorted(set(versions)) and migration.placement.version == max(versions, default=0)
    wanted = int((target.hosts & ~start.hosts).sum())
    report = migration.report
    assert len(report.moves) + report.dropped_moves == wanted
    assert report.copied_bytes == 20 * len(report.moves)
    if not report.dropped_moves:
        assert np.array_equal(migration.placement.hosts, target.hosts)


@given(
    journeys(num_layers=2),
    st.dictionaries(
        st.tuples(st.integers(0, 4), st.integers(1, 4)), st.sampled_from(["late", "error", "corrupt"]), max_size=6
    ),
)
@settings(max_examples=200, deadline=None)
def test_whatever_fails_is_rolled_back(
    journey: tuple[Placement, Placement], faults: dict[tuple[int, int], str]
) -> None:
    start, target = journey
    ranks = Ranks(start, faults)
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
    ranks = Ranks(start, {(1, 1): fault})
    migration = ranks.migrate(target)
    assert ranks.run(migration) == [1]
    assert np.array_equal(migration.placement.hosts, target.hosts)
    why = {"late": "no report within 30 s from rank 1", "error": "rank 1: no such file", "corrupt": "differs"}
    assert len(migration.report.failures) == 1 and why[fault] in migration.report.failures[0]
