"""`moe-runtime calibrate`: expert policies for a mean number of experts, with their measured loss."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.config.checks import check_integer, check_output
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.options import only_fields, option_values, options_of, user_mistakes

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer

PIECE = 4096  # characters tokenised at a time
COLUMNS = ("text", "policy", "mean k", "perplexity", "KL")


@dataclass(frozen=True)
class CalibrateOptions:
    """The policies that `calibrate` searches for, and the texts it uses.

    Attributes:
        text: UTF-8 file; may be repeated. Every second block of it is held out for the measurement.
        mean_k: mean numbers of experts per token to find policies for.
        block_tokens: tokens per block; each block is a sequence of its own.
        max_tokens: maximum number of tokens used, divided equally among the files.
        output: file to write: .json (the calibration) or .png (a plot); may be repeated.

    Raises:
        ValueError: a value is not allowed.
    """

    text: Sequence[str] = ()
    mean_k: Sequence[float] = ()
    block_tokens: int = 512
    max_tokens: int = 16384
    output: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("text: missing; give at least one --text FILE")
        if not self.mean_k or not all(value >= 1 for value in self.mean_k):
            raise ValueError(
                f"mean_k: {list(self.mean_k)} is not allowed; it must be numbers of at least 1, as in 6,4,3"
            )
        check_integer("block_tokens", self.block_tokens, 16)
        check_integer("max_tokens", self.max_tokens, 2 * self.block_tokens)
        for path in self.output:
            check_output("output", path, (".json", ".png"))


def calibrate(namespace: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserMistake: an option, the model or a text cannot be used.
    """
    with user_mistakes():
        values = option_values(namespace, [*options_of(CalibrateOptions), *options_of(EngineConfig)])
        options = CalibrateOptions(**only_fields(CalibrateOptions, values))
        config = EngineConfig(**only_fields(EngineConfig, values))
        if config.ep_size != 1:
            raise ValueError(f"ep_size: {config.ep_size} is not allowed; a calibration runs on one rank")
        if config.capacity_factor is not None:
            raise ValueError(
                f"capacity_factor: {config.capacity_factor} is not allowed; a calibration runs without capacity limits"
            )
        rows = _run(options, config)
    print(table(rows))
    return 0


def _run(options: CalibrateOptions, config: EngineConfig) -> Sequence[Mapping[str, Any]]:
    from tqdm import tqdm

    from moe_runtime.build import fit_to_model
    from moe_runtime.models.registry import read_model_config
    from moe_runtime.planner.calibration import calibrate as run
    from moe_runtime.text.tokenizer import Tokenizer
    from moe_runtime.weights.checkpoint import resolve_model
    from moe_runtime.worker.worker import Worker

    path = resolve_model(config.model)
    model = read_model_config(path)
    config = fit_to_model(config, model)
    if max(options.mean_k) >= model.moe.top_k:
        raise ValueError(f"mean_k: {max(options.mean_k):g} is not allowed; the model uses {model.moe.top_k} experts")
    length = min(options.block_tokens, config.max_model_len or options.block_tokens)
    blocks = _blocks(options, Tokenizer.from_path(config.tokenizer or path), length)
    worker = Worker(config, model, path)
    num_policies = 1 + sum(3 + float(target).is_integer() for target in options.mean_k)
    calibration = [block for text in blocks.values() for block in text[::2]]
    held_out = {name: text[1::2] for name, text in blocks.items()}
    total = len(calibration) * (1 + num_policies)  # as many blocks are held out
    with tqdm(total=total, desc="calibrating", leave=False) as bar:
        found, _ = run(worker, model, config.model, calibration, held_out, options.mean_k, bar.update)
    for name in options.output:
        if name.endswith(".json"):
            found.save(name)
        else:
            from moe_runtime.planner.calibration_plot import draw

            Path(name).write_bytes(draw(f"{found.model}, {found.top_k} of {found.num_experts} experts", found.measured))
    return found.measured


def _blocks(options: CalibrateOptions, tokenizer: Tokenizer, length: int) -> dict[str, list[list[int]]]:
    """An even number of blocks of token ids for each file, by its name without folder and suffix."""
    most = max(2, options.max_tokens // (length * len(options.text)))
    found = {}
    for name in options.text:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"text: {name!r} is not UTF-8 (byte {error.start})") from error
        token_ids: list[int] = []
        for start in range(0, len(text), PIECE):
            if len(token_ids) < most * length:
                token_ids += tokenizer.encode(text[start : start + PIECE], add_special_tokens=False)
        count = min(most, len(token_ids) // length) // 2 * 2
        if not count:
            raise ValueError(f"text: {name!r} has {len(token_ids)} tokens; at least {2 * length} are needed")
        found[Path(name).stem] = [token_ids[start : start + length] for start in range(0, count * length, length)]
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a calibration as a readable table."""
    lines = [f"{COLUMNS[0]:14}{COLUMNS[1]:30}" + "".join(f"{name:>12}" for name in COLUMNS[2:])]
    for row in rows:
        scope = " per layer" if row["scope"] == "per layer" else ""
        name = row["kind"] if row["kind"] == "full" else f"{row['kind']}{scope} for {row['target_k']:g}"
        lines.append(f"{row['text']:14}{name:30}{row['mean_k']:12.2f}{row['perplexity']:12.2f}{row['kl']:12.4f}")
    return "\n".join(lines)
