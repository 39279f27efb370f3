"""Reads the NPZ archives that this package writes, and refuses others."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.system.files import parse_json

# what zipfile and numpy raise if an archive is damaged
UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, EOFError, OSError, RuntimeError)


def read_npz(path: Path, names: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], Any]:
    """The arrays of an NPZ archive, and the value in its JSON text `metadata`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an NPZ archive, is damaged, or lacks `metadata` or one of `names`.
    """
    content = path.read_bytes()
    try:
        # numpy parses an array before it checks the checksum, so check that first
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {} if damaged else dict(file)
    except UNREADABLE as error:
        raise ValueError("not a readable NPZ archive") from error
    if damaged:
        raise ValueError(f"not a readable NPZ archive; {damaged} is damaged")
    missing = [name for name in ("metadata", *names) if name not in arrays]
    if missing:
        raise ValueError(f"the NPZ archive lacks {', '.join(missing)}")
    return arrays, parse_json(str(arrays.pop("metadata")))
