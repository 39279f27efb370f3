"""Compares every sample with what the runtime reads, and prints a table. See scripts/check_formats."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from format_check.references import REFERENCES, Sample
from moe_runtime.models.quantization import read_scheme
from moe_runtime.weights.checkpoint import Checkpoint
from moe_runtime.weights.quantized import QuantizedCheckpoint
from moe_runtime.weights.scheme import part_name


def read(sample: Sample) -> Tensor:
    """The weights as the runtime reads them from a checkpoint, float32."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = {part_name(sample.name, part): tensor.contiguous() for part, tensor in sample.parts.items()}
        save_file(tensors, str(folder / "model.safetensors"))
        config = {"quantization_config": json.loads(json.dumps(sample.settings)), "dtype": "bfloat16"}
        scheme = read_scheme(folder, config)
        assert scheme is not None
        source, shape = QuantizedCheckpoint(Checkpoint(folder), scheme), tuple(sample.weight.shape)
        assert source.format_of(sample.name) is not None
        if len(shape) == 2:
            return source.read(sample.name, shape)
        return torch.stack([source.read(sample.name, shape, index) for index in range(shape[0])])


def main() -> int:
    parser = argparse.ArgumentParser(prog="check_formats", description="Compare quantised weights with the libraries.")
    parser.add_argument("--seed", type=int, default=0)
    warnings.simplefilter("ignore")  # of libraries about versions of others
    torch.manual_seed(parser.parse_args().seed)
    print("| library | format | in | values that differ |\n|---|---|---|---:|")
    failed = False
    for library, samples in REFERENCES.items():
        try:
            version = importlib.metadata.version(library)
            for (format, dtype), alike in itertools.groupby(
                samples(), lambda sample: (sample.format, sample.weight.dtype)
            ):
                equal = torch.cat([(read(sample).to(dtype) == sample.weight).flatten() for sample in alike])
                failed |= not equal.all()
                count = f"{int((~equal).sum()):,} of {equal.numel():,}"
                print(f"| {library} {version} | {format} | {str(dtype)[6:]} | {count} |", flush=True)
        except ImportError as error:
            failed = True
            print(f"| {library} | - | - | not installed: {str(error).splitlines()[0]} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
