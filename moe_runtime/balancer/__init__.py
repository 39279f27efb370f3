"""Expert load, placement and planning; uses numpy, neither torch nor the engine."""

from moe_runtime.balancer.choice import choose_slots, quotas, replica_table, slots_by_rank
from moe_runtime.balancer.cost import LayerTime
from moe_runtime.balancer.decide import Decision, Demand, MoveCost, Payback
from moe_runtime.balancer.eplb import plan_eplb
from moe_runtime.balancer.expert_counts import HotExpert
from moe_runtime.balancer.load import ExpertLoad
from moe_runtime.balancer.placement import Placement
from moe_runtime.balancer.plan import Move, Plan, plan_placement
from moe_runtime.balancer.split import rank_loads, split_tokens

__all__ = [
    "Decision",
    "Demand",
    "ExpertLoad",
    "HotExpert",
    "LayerTime",
    "Move",
    "MoveCost",
    "Payback",
    "Placement",
    "Plan",
    "choose_slots",
    "plan_eplb",
    "plan_placement",
    "quotas",
    "rank_loads",
    "replica_table",
    "slots_by_rank",
    "split_tokens",
]
