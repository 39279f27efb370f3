"""Tells whether the files of a built folder are whole, without reading them each time.

The manifest is written last. So a file that is older than the manifest and has the right size was not written since.
For any other file the checksum is compared.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "files.json"


def write_manifest(folder: Path) -> None:
    """Write the sizes and SHA-256 of all files of a folder."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")


def find_damage(folder: Path) -> str | None:
    """What is wrong with the folder's files, in a few words; None if they are whole."""
    manifest = folder / MANIFEST
    try:
        written_ns = manifest.stat().st_mtime_ns
        files = json.loads(manifest.read_text())
        for name, expected in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            status = file.stat()
            if status.st_size != expected["bytes"]:
                return f"{name} has {status.st_size} bytes, not {expected['bytes']}"
            if status.st_mtime_ns >= written_ns and _sha256(file) != expected["sha256"]:
                return f"{name} was changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
