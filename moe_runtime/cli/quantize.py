"""`moe-runtime quantize`: write a checkpoint whose weights are quantised."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.options import Option, only_fields, option_values, options_of, user_mistakes
from moe_runtime.config.quantization import METHODS, group_that_divides
from moe_runtime.memory.budget import gigabytes
from moe_runtime.system.signals import END_SIGNALS

ENGINE = ("model", "quantization", "quantization_parts", "quantization_group_size")


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of the `quantize` command.

    Attributes:
        output: folder to write; it must not exist.

    Raises:
        ValueError: a value is not allowed.
    """

    output: str

    def __post_init__(self) -> None:
        if not isinstance(self.output, str) or not self.output or Path(self.output).exists():
            raise ValueError(f"output: {self.output!r} is not allowed; it must be a folder that does not exist")


def quantize_options() -> list[Option]:
    """The engine's options that say what is quantised, and how."""
    return [option for option in options_of(EngineConfig) if option.name in ENGINE[1:]]


def quantize(namespace: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserMistake: an option or the model cannot be used.
    """
    with user_mistakes():
        known = [option for option in options_of(EngineConfig) if option.name in ENGINE]
        values = option_values(namespace, [*known, *options_of(QuantizeOptions)])
        options = QuantizeOptions(**only_fields(QuantizeOptions, values))
        engine = EngineConfig(**only_fields(EngineConfig, values))
        if engine.quantization is None:
            raise ValueError(f"quantization: missing; it must be one of {list(METHODS)}")
        nbytes = _write(engine, Path(options.output))
    print(f"wrote {gigabytes(nbytes)} to {options.output}")
    return 0


def _write(engine: EngineConfig, out: Path) -> int:
    """Write the folder; it appears when it is complete. Returns the bytes of its tensors."""
    from tqdm import tqdm

    from moe_runtime.models.registry import names_of, read_stored_config
    from moe_runtime.models.write_quantized import QuantizedWriter
    from moe_runtime.weights.checkpoint import resolve_model

    path = resolve_model(engine.model)
    if not path.is_dir():
        raise ValueError(f"model: {engine.model!r} is not allowed; it must be a folder with safetensors files")
    stored = read_stored_config(path)
    names = names_of(stored.family)
    inputs = QuantizedWriter(path, engine.quantized(stored), names).inputs()
    assert engine.quantization is not None
    group = group_that_divides(engine.quantization, engine.quantization_group_size, inputs)
    model = replace(engine, quantization_group_size=group).quantized(stored)
    format = next(found for found in (*model.layers[model.moe_layers[0]].formats.all, model.head_format) if found)
    with _partial_folder(out) as partial:
        with tqdm(total=model.num_layers, unit="layer", desc=f"quantising in groups of {group}") as bar:
            nbytes = QuantizedWriter(path, model, names).write(partial, format, bar.update)
        partial.chmod(0o755)
        partial.rename(out)
    return nbytes


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which is removed if it still exists in the end, also after a signal."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out.parent))
    except OSError as error:
        raise ValueError(f"output: {str(out)!r} cannot be written ({error.strerror})") from error
    before = {number: signal.signal(number, _end) for number in END_SIGNALS}
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    print("interrupted; nothing was written", file=sys.stderr)
    sys.exit(128 + number)
