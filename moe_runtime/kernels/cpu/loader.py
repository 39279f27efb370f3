"""Loads the native CPU kernels: the best ones that this machine, its system and its compiler can have."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

from moe_runtime.kernels.cpu.library import (
    NativeUnavailableError,
    ensure_library,
    find_compiler,
    supported_instruction_sets,
)
from moe_runtime.kernels.cpu.native import Kernels
from moe_runtime.kernels.cpu.structs import SIGNATURES

logger = logging.getLogger(__name__)


@cache
def load(instruction_set: str | None = None) -> Kernels:
    """The kernels for this machine, compiled if they are not in the cache yet; see `library.ensure_library`.

    Raises:
        NativeUnavailableError: they are not available; one line says why.
        ValueError: the processor lacks `instruction_set`.
    """
    if instruction_set is not None:
        return _load(*ensure_library(instruction_set))
    names = supported_instruction_sets()
    for name in names[:-1]:
        try:
            return _load(*ensure_library(name))
        except NativeUnavailableError as error:  # an older compiler or system does not know the newest instructions
            find_compiler()  # without any, no other set is to be had
            logger.warning("no native CPU kernels for %s: %s", name, error)
    return _load(*ensure_library(names[-1] if names else None))


def _load(path: Path, instruction_set: str) -> Kernels:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} does not load: {error}") from None
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if not library.moe_may_run():
        raise NativeUnavailableError("the system does not give this process their registers")
    return Kernels(library, instruction_set)


@cache
def load_or_none() -> Kernels | None:
    """The kernels, or None if they are not available; the reason is logged once."""
    try:
        kernels = load()
    except NativeUnavailableError as error:
        logger.warning("no native CPU kernels, torch runs instead: %s", error)
        return None
    logger.info("native CPU kernels for %s", kernels.instruction_set)
    return kernels
