"""Expert load, placement and planning; numpy and torch only, no engine."""

from moe_runtime.balancer.load import ExpertLoad, HotExpert
from moe_runtime.balancer.placement import Placement

__all__ = ["ExpertLoad", "HotExpert", "Placement"]
