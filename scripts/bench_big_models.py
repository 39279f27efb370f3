"""Compare moe_runtime with llama.cpp on models that people know, which fill most of this machine's memory.

The models have the published shapes of gpt-oss-20b (14 GB: experts in MXFP4, the rest in bfloat16) and Qwen3-30B-A3B
(18 GB: all matrices in Q4_0 but the embedding), and random weights. One GGUF file is written at a time, and both
engines read it; it is deleted when its model has been measured. Engines are loaded one at a time and take turns.
See docs/benchmarks.md. Exit code 1: a rank took more than 1.1 times the memory that `inspect` shows, or the engines do
not agree.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from moe_runtime.system.cache_folder import default_cache_dir

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set

from big_models.file import write_model
from big_models.models import BigModel, big_models
from big_models.report import markdown, plot
from big_models.runs import ENGINES, Runs
from check_memory import ALLOWED
from peers.__main__ import machine
from peers.conductor import say
from peers.drivers import DriverError

# Of log-probabilities, root mean square: rounding gives some hundredths, other weights give 4.
MAX_DIFFERENCE = 1.0


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    models, problems = big_models(options.tiny), []
    try:
        for name in options.models:
            results = measure(models[name], options)
            write_report(results, options.out)
            problems += find_problems(results, options.tiny)
    except KeyboardInterrupt:
        print("interrupted; everything has ended", file=sys.stderr)
        return 130
    except (DriverError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(big_models())
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME", help=", ".join(ENGINES)
    )
    parser.add_argument("--repetitions", type=int, default=2, help="turns of each engine (default 2)")
    parser.add_argument("--tiny", action="store_true", help="small models of the same families: does everything work?")
    parser.add_argument("--keep", action="store_true", help="keep the files, so that another run need not write them")
    parser.add_argument(
        "--folder", type=Path, default=default_cache_dir() / "big-models", help="for the files (default in the cache)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/big"), help="folder for the results")
    options = parser.parse_args(arguments)
    if options.repetitions < 1:
        parser.error(f"--repetitions: {options.repetitions} is not allowed; it must be at least 1")
    return options


def measure(model: BigModel, options: argparse.Namespace) -> dict[str, Any]:
    """Write the model's file, run the engines, and delete the file again unless it is to be kept.

    Raises:
        ValueError: the file does not fit on the disk.
        DriverError: an engine failed.
    """
    file = options.folder / f"{model.name}.gguf"
    try:
        if not file.exists():
            write_model(model, file)
        return {"machine": machine()} | Runs(
            model, file, options.engines, options.repetitions, options.out / "logs"
        ).run()
    finally:
        if not options.keep:
            file.unlink(missing_ok=True)


def find_problems(results: dict[str, Any], tiny: bool) -> list[str]:
    """What must not be, in words.

    The memory of a tiny model is not judged: its weights are nothing beside its process, which takes more at times
    while it starts.
    """
    found = [
        f"{results['model']}: {entry['engine']}, rank {entry['rank']} took {entry['ratio']:.3f} times what was planned"
        for entry in results["memory"]
        if entry["ratio"] > ALLOWED and not tiny
    ]
    return found + [
        f"{results['model']}: log-probabilities in {engine} differ by {difference:.3f}"
        for engine, difference in results["differences"].items()
        if difference > MAX_DIFFERENCE
    ]


def write_report(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name, text = results["model"], markdown(results)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    plot(results, folder / f"{name}.png")
    print(text)
    say(f"results are in {folder}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
