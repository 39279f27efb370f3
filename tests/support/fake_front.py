"""A front without an engine, over fake ranks: `python fake_front.py [--fail]`, alone with two ranks or under torchrun.

It prints when it is ready. On SIGTERM, SIGINT or SIGHUP it runs one more step and stops.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_rank

from moe_runtime.cli.launch import MakeExecutor, run_torchrun, under_torchrun
from moe_runtime.cluster import rank_group
from moe_runtime.cluster.process_executor import ProcessExecutor
from moe_runtime.config.engine import EngineConfig
from moe_runtime.wire.executor import RankError


def run_front(config: EngineConfig, make_executor: MakeExecutor) -> int:
    if "--fail" in sys.argv:
        raise ValueError("model: no such checkpoint")
    told: list[int] = []
    executor = make_executor(config, fake_rank.model_config(), Path("/nowhere"))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    print("ranks:", *(info.pid for info in executor.ranks))
    print("ready")
    try:
        while not told:
            executor.check()
            time.sleep(0.05)
        executor.submit(fake_rank.step_plan(1, config.ep_size))
        print("stepped:", *(sample.token_id for result in executor.collect() for sample in result.samples))
    except RankError as error:
        print(f"error: {error}")
        return 1
    finally:
        executor.close()
    return 0


def main() -> int:
    logging.basicConfig(level=logging.INFO)
    rank_group.HOST_SILENCE = 2.0
    rank_group._open_store = lambda address: SimpleNamespace(port=1)  # fake ranks need no store; saves the import
    print("process:", os.getpid())
    if not under_torchrun():
        return run_front(
            EngineConfig(model="fake", ep_size=2), lambda *args: ProcessExecutor(*args, None, fake_rank.COMMAND)
        )
    code = run_torchrun(EngineConfig(model="fake"), run_front, fake_rank.COMMAND)
    assert "torch" not in sys.modules
    print(f"host {os.environ['RANK']} ends with {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
