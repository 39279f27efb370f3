"""Simulated ranks: a layer takes as long as its busiest rank computes; with a simulated clock and moving experts.

Shape suffixes: L MoE layers, E logical experts, W ranks, Q requests.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from counting_ranks import CountingRanks, plan_of
from fakes import model_config

from moe_runtime.balancer.decide import balancedness
from moe_runtime.balancer.live import load_monitor, mover
from moe_runtime.balancer.live.rebalancer import Rebalancer
from moe_runtime.balancer.placement import EMPTY
from moe_runtime.balancer.plan import plan_placement
from moe_runtime.balancer.split import rank_loads
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import MoEConfig
from moe_runtime.wire.executor import CountsReport
from moe_runtime.wire.messages import ExpertWork, RankResult, SlotReport, SlotTask

NUM_RANKS, NUM_LAYERS, NUM_EXPERTS = 4, 3, 32
INTERVAL = 10  # balance interval in steps
ROWS, REQUESTS = 1024, 8  # of a step
SECONDS_PER_ROW = 1e-3


class SimulatedRanks(CountingRanks):
    """An `Executor` whose speed depends on the placement. All ranks wait for a rank that copies an expert.

    Args:
        balance: of the rebalancer.
        copy_seconds: time to copy an expert.

    Attributes:
        now: seconds of the simulated clock.
        seconds_copied: part of `now` in which ranks waited for copies.
        moved_at: looks at the load after which the rebalancer started moves.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, copy_seconds: float, balance: str = "auto") -> None:
        super().__init__(NUM_RANKS, NUM_LAYERS, NUM_EXPERTS)
        self.now, self.seconds_copied, self.num_steps, self.num_looks = 1000.0, 0.0, 0, 0
        self.moved_at: list[int] = []
        self._copy_seconds = copy_seconds
        self._held: dict[tuple[int, int, int], int] = {}
        moe = MoEConfig(num_experts=NUM_EXPERTS, top_k=1, intermediate_size=8)
        model = model_config()
        layers = (replace(model.layers[0], dense_intermediate_size=None),) * NUM_LAYERS
        model = replace(model, layers=layers, moe=moe)
        expert_bytes = 3 * 8 * 8 * 4
        monkeypatch.setattr(mover, "FIRST_COPY_RATE", expert_bytes / copy_seconds)
        monkeypatch.setattr(load_monitor, "time", self)
        config = EngineConfig("fake", ep_size=NUM_RANKS, balance=balance, balance_interval=INTERVAL)
        self.rebalancer = Rebalancer(config, model, self)

    def monotonic(self) -> float:
        return self.now

    def serve(self, share_LE: np.ndarray, num_looks: int) -> None:
        """Run the steps of `num_looks` looks at the load; rows come in requests, each with its own experts.

        Args:
            share_LE: each expert's part of the rows.
        """
        for _ in range(num_looks):
            moves = len(self._moves())
            for _ in range(INTERVAL):
                self._step(share_LE)
            self.num_looks += 1
            if len(self._moves()) > moves:
                self.moved_at.append(self.num_looks)

    def place_for(self, share_LE: np.ndarray) -> None:
        """Place the experts for a load, at no cost."""
        current = self.rebalancer.placement
        plan = plan_placement(share_LE, NUM_RANKS, current.max_slots - 1, current.in_slots(current.max_slots - 1))
        self.rebalancer.placement = plan.placement.in_slots(current.max_slots)

    def balancedness(self, share_LE: np.ndarray) -> float:
        """The balancedness of a load under the current placement."""
        return balancedness(rank_loads(share_LE, self.rebalancer.placement.slots))

    def reports(self) -> list[CountsReport | SlotReport]:
        tasks, self.tasks = self.tasks, []
        busy_W = np.bincount([rank for rank, task in tasks if task.expert != EMPTY], minlength=NUM_RANKS)
        self.seconds_copied += busy_W.max() * self._copy_seconds
        self.now += busy_W.max() * self._copy_seconds
        return [*super().reports(), *(self._work(rank, task) for rank, task in tasks)]

    def _moves(self) -> list[dict]:
        return [decision for decision in self.rebalancer.decisions if decision["moves_experts"]]

    def _step(self, share_LE: np.ndarray) -> None:
        plan = self.rebalancer.prepare(plan_of(self.num_steps, 5, 0, NUM_RANKS))
        self.num_steps += 1
        before = self.counts.copy()
        home_Q = self.random.integers(0, NUM_RANKS, REQUESTS)
        for layer, share_E in enumerate(share_LE):
            share_QE = self.random.dirichlet(50 * share_E + 1e-3, REQUESTS)
            np.add.at(self.counts[:, 0, layer], home_Q, self.random.multinomial(ROWS // REQUESTS, share_QE))
        rows_LE = (self.counts - before).sum(axis=(0, 1))
        slots_LWS = self.rebalancer.placement.slots
        load_LW = rank_loads(rows_LE, slots_LWS)
        seconds_L = load_LW.max(axis=1) * SECONDS_PER_ROW
        self.now += seconds_L.sum()
        touched_LW = ((slots_LWS != EMPTY) & (np.take_along_axis(rows_LE[:, None], slots_LWS, 2) > 0)).sum(axis=2)
        works = [
            [ExpertWork(int(t), int(n), float(n) * SECONDS_PER_ROW) for t, n in zip(touched, load, strict=True)]
            for touched, load in zip(touched_LW.T, load_LW.T, strict=True)
        ]
        self.rebalancer.note(
            [
                RankResult(plan.step, rank, seconds=float(seconds_L.sum()), expert_work=work if plan.measure else [])
                for rank, work in enumerate(works)
            ]
        )
        self.rebalancer.tick()

    def _work(self, rank: int, task: SlotTask) -> SlotReport:
        """Copy an expert, or compute the checksum of a slot; a checksum is the expert's number."""
        slot = (rank, task.layer, task.slot)
        if task.expert == EMPTY:
            expert = self._held.get(slot, int(self.rebalancer.placement.slots[task.layer, rank, task.slot]))
            return SlotReport(rank, task.task_id, True, 0, 0.0, checksum=expert)
        self._held[slot] = task.expert
        return SlotReport(rank, task.task_id, True, 3 * 8 * 8 * 4, self._copy_seconds, checksum=task.expert)
