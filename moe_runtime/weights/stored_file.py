"""Reads a checkpoint's file while its content may be trusted: as long as the file is the one that was opened. No torch.

Files are read, never mapped: a process that touches a page of a mapped file that was truncated dies of SIGBUS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 1 << 30  # of one read; Linux reads at most 2 GiB at once


@dataclass(frozen=True)
class FileIdentity:
    """What changes when a file is replaced or written to: device, inode, size in bytes, time of the last change."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class StoredFile:
    """A file that must stay as it is.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = FileIdentity.of(path.stat())

    def check(self) -> None:
        """Raise ValueError unless the file is still the one that was opened."""
        try:
            self._check(self.path.stat())
        except OSError as error:
            raise self._unreadable(error) from None

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer of bytes with the file's bytes from `start` on.

        Raises:
            ValueError: the file has changed since it was opened, or cannot be read.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                self._check(os.fstat(file.fileno()))
                done = 0
                while done < len(buffer):
                    count = os.preadv(file.fileno(), [buffer[done : done + MOST_BYTES]], start + done)
                    if count == 0:
                        raise ValueError(f"model: {self.path} was truncated while it was read")
                    done += count
        except OSError as error:
            raise self._unreadable(error) from None

    def read(self, size: int, start: int) -> bytes:
        """`size` bytes from `start` on. Raises ValueError as `read_into`."""
        content = bytearray(size)
        self.read_into(memoryview(content), start)
        return bytes(content)

    def _check(self, status: os.stat_result) -> None:
        found = FileIdentity.of(status)
        if found != self.identity:
            sizes = "" if found.size == self.identity.size else f" ({self.identity.size} bytes then, {found.size} now)"
            raise ValueError(f"model: {self.path} has changed since it was opened{sizes}; restart to read it anew")

    def _unreadable(self, error: OSError) -> ValueError:
        return ValueError(f"model: {self.path} cannot be read any more: {error.strerror}")
