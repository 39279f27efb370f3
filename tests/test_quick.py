"""The tests that `--quick` runs exist, and cover every room."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import ROOT
from quick_tests import QUICK

import moe_runtime

PACKAGE = Path(moe_runtime.__file__).parent
ROOMS = sorted(str(file.parent.relative_to(PACKAGE)) for file in PACKAGE.rglob("__init__.py") if file.parent != PACKAGE)


@pytest.mark.parametrize("room", [room for room in ROOMS if room.count("/") == 0 or room == "balancer/live"])
def test_every_room_has_quick_tests(room: str) -> None:
    assert any(str(Path(test.partition("::")[0]).parent) == room for test in QUICK)


@pytest.mark.parametrize("test", QUICK)
def test_what_is_named_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"def {name.partition('[')[0]}" in (ROOT / "tests" / file).read_text()
