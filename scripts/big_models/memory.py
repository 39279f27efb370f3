"""What ranks hold: what is planned before they start, as `inspect` shows it, and what their processes have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from served.processes import pss, read

from moe_runtime.build import fit_to_model
from moe_runtime.config.engine import EngineConfig
from moe_runtime.memory.budget import Budget, available_host_memory, plan_budget
from moe_runtime.models.registry import read_model_config


def planned(config: EngineConfig) -> Budget:
    """The memory of all ranks on this host, and whether it is free now."""
    model = read_model_config(Path(config.model))
    return plan_budget(fit_to_model(config, model), model, config.ep_size, available_host_memory())


@dataclass
class RankMemory:
    """Bytes of one rank's process in one run.

    Attributes:
        planned: what `inspect` says it takes.
        loaded, after: proportional set size (PSS) after loading, and after the last case.
        peak: the most that was ever resident, shared libraries included.
    """

    pid: int
    planned: int
    loaded: int = field(init=False)
    after: int = field(init=False, default=0)
    peak: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.loaded = pss(self.pid)

    def finish(self) -> None:
        """Measure it after the run."""
        self.after, self.peak = pss(self.pid), _highest(self.pid)

    @property
    def ratio(self) -> float:
        """The largest of the three over what was planned."""
        return max(self.loaded, self.after, self.peak) / self.planned


def _highest(pid: int) -> int:
    """The highest resident set size so far."""
    lines = read(Path(f"/proc/{pid}/status")).splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
