"""Holds a server under load: closed and open loops of streams, each compared with the answer that was given alone.

    python scripts/load_test.py --out benchmarks/load              # an hour
    python scripts/load_test.py --closed 64:30 16:20 --open --questions 8 --longest-answer 100

Writes a table, the figures and a plot. Exits with 1 if a stream is wrong, pages are held at the end, memory grows, the
server is slower than 0.9 times the engine offline, or its front takes more than a tenth of the ranks' CPU time.
Flags of `serve` follow after `--`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from load_runs import questions as asked
from load_runs.offline import offline_speed
from load_runs.questions import Question
from load_runs.report import Limits, Result, table, write
from load_runs.run import Run, closed_loop, open_loop
from served.server import Server

from moe_runtime import __version__
from moe_runtime.bench.report import describe_machine

CLOSED = ("1:120", "16:120", "64:600", "256:600")
OPEN = ("1:120", "2:120", "4:120")
RANKS, MAX_NUM_SEQS, KV_CACHE_BYTES = 2, 128, 2 * 10**9


def main() -> int:
    options = parse()
    runs = asyncio.run(serve_and_load(options))
    results = [Result(run, Limits(options.ttft_limit, options.tpot_limit), offline(options, run)) for run in runs]
    title = f"{options.model} on {RANKS} ranks, moe_runtime {__version__}, {describe_machine()['processor']}"
    print(table(results))
    if options.out is not None:
        write(options.out, title, results)
    mistakes = [mistake for result in results for mistake in result.mistakes()]
    print("\n".join(mistakes) or "all is well")
    return int(bool(mistakes))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--closed", nargs="*", type=pair, default=[*map(pair, CLOSED)], metavar="STREAMS:SECONDS", help="closed loops"
    )
    parser.add_argument(
        "--open", nargs="*", type=pair, default=[*map(pair, OPEN)], metavar="RATE:SECONDS", help="open loops"
    )
    parser.add_argument("--questions", type=int, default=48, help="questions with known answers (default 48)")
    parser.add_argument("--longest-answer", type=int, default=940, help="tokens (default 940)")
    parser.add_argument("--answers", type=Path, help="file that keeps questions and answers for the next time")
    parser.add_argument(
        "--offline-seconds", type=float, default=60.0, help="of each closed loop's twin; 0 leaves it out"
    )
    parser.add_argument(
        "--ramp", type=float, default=30.0, help="seconds until a load is steady, at most a third of it"
    )
    parser.add_argument("--ttft-limit", type=float, default=2.0, help="seconds to the first token of a good stream")
    parser.add_argument("--tpot-limit", type=float, default=0.1, help="seconds per token of a good stream")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--out", type=Path, help="folder for load.md, load.json and load.png")
    parser.add_argument("flags", nargs="*", help="further flags of serve, after --")
    return parser.parse_args()


def pair(text: str) -> tuple[float, float]:
    first, _, second = text.partition(":")
    return float(first), float(second)


async def serve_and_load(options: argparse.Namespace) -> list[Run]:
    flags = ["--ep-size", RANKS, "--max-num-seqs", MAX_NUM_SEQS, "--kv-cache-memory-bytes", KV_CACHE_BYTES]
    runs = []
    with Server(options.model, *map(str, flags), *options.flags) as server:
        options.known = await known_answers(options, server)
        for number, seconds in options.closed:
            ramp = min(options.ramp, seconds / 3)
            runs.append(await closed_loop(server, options.known, int(number), seconds, ramp))
            tell(runs[-1])
        for rate, seconds in options.open:
            ramp = min(options.ramp, seconds / 3)
            runs.append(await open_loop(server, options.known, rate, seconds, ramp))
            tell(runs[-1])
        if code := server.stop():
            raise RuntimeError(f"the server has ended with {code}: {server.log[-2000:]}")
    return runs


async def known_answers(options: argparse.Namespace, server: Server) -> list[Question]:
    if options.answers is not None and options.answers.exists():
        return asked.load(options.answers)
    drawn = asked.draw(options.questions, options.longest_answer, random.Random(options.seed))
    print(f"{len(drawn)} answers alone, {sum(question.max_tokens for question in drawn)} tokens ...", flush=True)
    known = await asked.answer_alone(server.url, drawn)
    if options.answers is not None:
        asked.save(options.answers, known)
    return known


def offline(options: argparse.Namespace, run: Run) -> float | None:
    """The speed of the engine with as many requests at a time as a closed loop has."""
    if not run.num_streams or not options.offline_seconds:
        return None
    ramp = min(options.ramp, options.offline_seconds / 3)
    known: Sequence[Question] = options.known
    engine = {"ep_size": RANKS, "max_num_seqs": MAX_NUM_SEQS, "kv_cache_memory_bytes": KV_CACHE_BYTES}
    return offline_speed(options.model, engine, known, run.num_streams, options.offline_seconds, ramp)


def tell(run: Run) -> None:
    print(f"{run.name}: {run.tokens_per_second:.0f} tokens/s, {len(run.faults)} wrong", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
