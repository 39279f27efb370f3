"""Keys in files. A file is read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from pathlib import Path

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int]


class KeyFile:
    """The keys of a file: one a line; empty lines and lines that begin with `#` do not count.

    If the file is missing or wrong when it is read again, the keys read before stay valid, and the log says so.

    Args:
        option: the option that names the file, for messages.
        path: the file.

    Raises:
        ValueError: the file cannot be read or has no keys.
    """

    def __init__(self, option: str, path: str) -> None:
        self._option = option
        self._path = Path(path)
        self._stamp = self._find_stamp()
        self._digests = self._read()

    def accepts(self, key: bytes) -> bool:
        """Whether `key` is one of the keys. The time that it takes does not depend on how much of a key is right."""
        self._refresh()
        digest = hashlib.sha256(key).digest()
        return sum(hmac.compare_digest(digest, own) for own in self._digests) > 0  # compares all of them

    def _refresh(self) -> None:
        stamp = self._find_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._digests = self._read()
        except ValueError as error:
            logger.warning("%s; the keys that were read before stay valid", error)
        else:
            logger.info("%s: read %d keys anew", self._option, len(self._digests))

    def _find_stamp(self) -> Stamp | None:
        """What differs once the file has changed; None if there is none."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> list[bytes]:
        return [hashlib.sha256(key).digest() for key in read_keys(self._option, self._path)]


def key_identity(key: bytes) -> str:
    """A name for a client's key, or for a user that it names, which does not tell it."""
    return hashlib.sha256(key).hexdigest()[:32]


def read_keys(option: str, path: Path) -> list[bytes]:
    """The keys of a file, at least one. Raises ValueError if there are none; the message names `option`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{option}: {str(path)!r} is not allowed; it must be a file")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{option}: {str(path)!r} cannot be read ({error.strerror})") from error
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith(b"#")]
    if not keys:
        raise ValueError(f"{option}: {str(path)!r} has no keys; it must have one key a line")
    return keys


def authorization(path: str | Path | None) -> dict[str, str]:
    """The header of a request with the first key of an `api_key_file`; none without a file. Raises ValueError."""
    if path is None:
        return {}
    return {"Authorization": f"Bearer {read_keys('api_key_file', Path(path))[0].decode('latin-1')}"}
