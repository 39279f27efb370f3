"""Folders for the time that a process runs. A later process removes those that a killed one has left.

A process holds a shared lock on a file in each of its folders, which ends with the process. Several processes may hold
one folder. Only a folder whose file nobody has locked is removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

LOCK = "owner.lock"

_locks: dict[Path, int] = {}  # folder -> descriptor of its locked file


def make_own_folder(parent: Path, prefix: str) -> Path:
    """A new folder that only this user can enter, held by this process."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    hold_folder(folder)
    return folder


def hold_folder(folder: Path) -> None:
    """Hold a folder, which exists, until `remove_own_folder` or the end of the process."""
    while folder not in _locks:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # `remove_abandoned` has run since, in another process
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        if _is_file(folder / LOCK, lock):  # not so if `remove_abandoned` has run since
            _locks[folder] = lock
        else:
            os.close(lock)


def remove_own_folder(folder: Path) -> None:
    """Remove a folder that this process holds. Does nothing if it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    if (lock := _locks.pop(folder, None)) is not None:
        os.close(lock)


def remove_own_folders() -> None:
    """Remove all folders that this process holds, before it ends at once."""
    for folder in list(_locks):
        remove_own_folder(folder)


def remove_abandoned(parent: Path, prefix: str) -> list[Path]:
    """Remove this user's folders in `parent` that processes have left which ran no code at their end. Returns them."""
    return [folder for folder in parent.glob(f"{prefix}*") if _remove_if_abandoned(folder)]


def _remove_if_abandoned(folder: Path) -> bool:
    try:
        status = folder.lstat()
        if status.st_uid != os.getuid() or folder.is_symlink():
            return False
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # not ours to enter, gone, or made by something else
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
