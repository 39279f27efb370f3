"""Folders of running processes stay; those of dead ones are removed by the next start."""

import os
import subprocess
import sys

import pytest

from moe_runtime.system.owned_folders import (
    LOCK,
    hold_folder,
    make_own_folder,
    remove_abandoned,
    remove_own_folder,
    remove_own_folders,
)

PREFIX = "owned-"
HOLDER = (
    "import sys; from pathlib import Path; from moe_runtime.system.owned_folders import hold_folder\n"
    "hold_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def holder(folder):
    """A process that holds a folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def kill(process):
    process.kill()
    process.communicate()


def test_only_the_folders_of_dead_processes_are_removed(tmp_path):
    own = make_own_folder(tmp_path, PREFIX)
    others = [holder(tmp_path / f"{PREFIX}{name}") for name in ("alive", "dead")]
    (tmp_path / f"{PREFIX}dead" / "front").write_text("a socket")
    kill(others[1])
    try:
        assert remove_abandoned(tmp_path, PREFIX) == [tmp_path / f"{PREFIX}dead"]
        assert sorted(tmp_path.iterdir()) == sorted([own, tmp_path / f"{PREFIX}alive"])
    finally:
        kill(others[0])
    assert remove_abandoned(tmp_path, PREFIX) == [tmp_path / f"{PREFIX}alive"]
    remove_own_folder(own)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_several_processes_stays_until_all_are_dead(tmp_path):
    folder = tmp_path / f"{PREFIX}shared"
    others = [holder(folder) for _ in range(2)]
    kill(others[0])
    assert not remove_abandoned(tmp_path, PREFIX)
    kill(others[1])
    assert remove_abandoned(tmp_path, PREFIX) == [folder]


def test_what_is_not_ours_stays(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / LOCK).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").touch()
    (tmp_path / f"{PREFIX}no-lock").mkdir()  # its owner may be about to lock it
    (tmp_path / f"{PREFIX}linked-lock").mkdir()
    (tmp_path / f"{PREFIX}linked-lock" / LOCK).symlink_to(target / LOCK)
    before = sorted(tmp_path.rglob("*"))
    assert remove_abandoned(tmp_path, PREFIX) == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_folders_of_other_users_stay(tmp_path):
    folder = tmp_path / f"{PREFIX}other"
    kill(holder(folder))
    os.chown(folder, 12345, 12345)
    assert remove_abandoned(tmp_path, PREFIX) == [] and folder.exists()


def test_holding_twice_and_removing_all(tmp_path):
    folder = tmp_path / f"{PREFIX}x"
    hold_folder(folder)
    hold_folder(folder)
    other = make_own_folder(tmp_path, PREFIX)
    assert other.stat().st_mode & 0o077 == 0
    remove_own_folders()
    assert not folder.exists() and not other.exists()
    remove_own_folder(folder)  # which is gone
