"""Options and seeds of a test run, and the fixtures that all tests share."""

from __future__ import annotations

import os
import random
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from rank_pool import RankPool

HERE = Path(__file__).parent
MOST_WORKERS = 4
FORCED_KERNELS = HERE / "support" / "forced_kernels"

# Many small models on few cores, often several processes at once: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `python -m pytest` puts the root on the path, where our links `kernels`, `serve`, ... pass for packages.
# A shell starts a job in the background with interrupts ignored, and nohup ignores SIGHUP; children would inherit that.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE.parent]


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    group = parser.getgroup("moe_runtime")
    group.addoption("--quick", action="store_true", help="some tests of every room, in less than two minutes")
    group.addoption("--full", action="store_true", help="also tests marked slow")
    group.addoption("--seed", type=int, help="repeat the run that printed this seed")
    group.addoption("--kernels", metavar="SET", help="the native kernels' best instruction set, or off")
    group.addoption("--openblas", metavar="CORE", help="the processor that OpenBLAS takes this one for, as Haswell")
    config: Any = pluginmanager.getplugin("pytestconfig")
    set_environment(parser.parse_known_args([str(arg) for arg in config.invocation_params.args]))


def set_environment(options: Any) -> None:
    """What children inherit, and what must be known before numpy and the native kernels are imported here."""
    if options.openblas:
        assert "numpy" not in sys.modules
        os.environ["OPENBLAS_CORETYPE"] = options.openblas
    if options.kernels and "PYTEST_XDIST_WORKER" not in os.environ:  # else the worker has it from the start
        os.environ["MOE_RUNTIME_TEST_KERNELS"] = options.kernels
        path = [str(FORCED_KERNELS), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        runpy.run_path(str(FORCED_KERNELS / "sitecustomize.py"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.seed is None:  # the workers of a run are told the same one
        option.seed = random.SystemRandom().getrandbits(32)
    option.hypothesis_seed = str(option.seed)
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")
    if option.full:
        option.markexpr = option.markexpr.replace(" and not slow", "")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.option.quick or not collection_path.name.startswith("test_"):
        return None
    from quick_tests import QUICK

    name = collection_path.relative_to(HERE).as_posix()
    return not any(test.partition("::")[0] == name for test in QUICK) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    if config.option.quick:
        from quick_tests import is_quick

        others = [item for item in items if not is_quick(item.nodeid.removeprefix("tests/"))]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


def pytest_sessionstart(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None and not hasattr(session.config, "workerinput"):
        reporter.write_line(repeat_with(session.config))


def repeat_with(config: pytest.Config) -> str:
    option = config.option
    given = [f"--seed {option.seed}"]
    given += [f"--{name} {value}" for name in ("kernels", "openblas") if (value := config.getoption(name))]
    return f"repeat with {' '.join(given)}"


def seed_of(config: pytest.Config, name: str) -> int:
    from seeds import seed_for

    return seed_for(config.option.seed, name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    from seeds import seed_all

    seed_all(seed_of(item.config, item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Any:
    """What tests share is the same whichever of them comes first."""
    from seeds import seeded

    if fixturedef.scope == "function":
        return (yield)
    name = f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]"
    with seeded(seed_of(request.config, name)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        report.sections.append(("seed", repeat_with(item.config)))
    return report


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The test's own."""
    return seed_of(request.config, request.node.nodeid)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(n)` gives `n` processes in a gloo group; they are started once and end with the session."""
    from rank_pool import RankPool

    pools: dict[int, RankPool] = {}

    def get(num_ranks: int) -> RankPool:
        if num_ranks not in pools:
            pools[num_ranks] = RankPool(num_ranks)
        return pools[num_ranks]

    yield get
    for pool in pools.values():
        pool.close()


def pytest_xdist_auto_num_workers() -> int:
    return min(len(os.sched_getaffinity(0)) + 1, MOST_WORKERS)  # one more than cores: many tests wait for processes


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from workers import ByFile

    return ByFile(config, log)
