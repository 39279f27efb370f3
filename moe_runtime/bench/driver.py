"""A whole measurement: open the target, warm it up, run the workload of each request rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from moe_runtime.bench.options import BenchOptions
from moe_runtime.bench.report import Report
from moe_runtime.bench.runs import Record, Run, run_jobs
from moe_runtime.bench.targets import RequestError, ServerTarget, Target, start_engine
from moe_runtime.bench.workload import Job, check_lengths, make_warmups, make_workload, rate_name, read_text
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.options import MODEL, user_mistakes
from moe_runtime.serve.keys import authorization

if TYPE_CHECKING:
    from moe_runtime.engine.engine import Engine
    from moe_runtime.text.tokenizer import Tokenizer


async def measure(options: BenchOptions, engine: Mapping[str, Any]) -> Report:
    """Measure an engine in this process, or the server at `options.url`.

    Args:
        engine: values of `EngineConfig`. With a server, only `model` and `tokenizer`, if the server does not name them.

    Raises:
        UserMistake: the model or the server cannot be used, or the requests do not fit it.
        RankError: a rank failed to start.
        RequestError: a warm-up request failed.
    """
    async with AsyncExitStack() as stack:
        with user_mistakes():
            if options.url is None:
                target, tokens = await _start_engine(stack, options, EngineConfig(**engine))
            else:
                target, tokens = await _connect(options, engine)
            workloads = [make_workload(options, index, tokens) for index in range(len(options.request_rate))]
            check_lengths(workloads[0], target.health["max_model_len"])
        await _warm_up(target, options, make_warmups(options, tokens))
        runs = [
            await _run(target, options, jobs, rate) for jobs, rate in zip(workloads, options.request_rate, strict=True)
        ]
    return Report(options, target.health, runs)


async def _start_engine(
    stack: AsyncExitStack, options: BenchOptions, config: EngineConfig
) -> tuple[Target, Sequence[int]]:
    from moe_runtime.build import build_engine

    vocab_size = 0

    def make_engine() -> Engine:
        nonlocal vocab_size
        engine = build_engine(config)
        vocab_size = engine.model_config.vocab_size
        return engine

    target = await stack.enter_async_context(start_engine(make_engine))
    return target, _tokens(options, vocab_size, target.tokenizer)


async def _connect(options: BenchOptions, engine: Mapping[str, Any]) -> tuple[Target, Sequence[int]]:
    """A server, and the tokens for prompts: those of the named model, or for random prompts the server's vocabulary."""
    assert options.url is not None
    target = await ServerTarget(options.url, authorization(options.api_key_file)).connect()
    if "model" not in engine:
        if options.text or "vocab_size" not in target.health:
            raise ValueError(
                "model: missing; it is needed with text, or if the server does not report its vocabulary size; "
                f"it must be {MODEL}"
            )
        return target, range(target.health["vocab_size"])
    from moe_runtime.models.registry import read_model_config
    from moe_runtime.weights.checkpoint import resolve_model

    path = resolve_model(engine["model"], weights=False)
    tokenizer = None
    if options.text:
        from moe_runtime.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_path(engine.get("tokenizer") or path)
    return target, _tokens(options, read_model_config(path).vocab_size, tokenizer)


def _tokens(options: BenchOptions, vocab_size: int, tokenizer: Tokenizer | None) -> Sequence[int]:
    return range(vocab_size) if options.text is None else read_text(options.text, tokenizer, options)


async def _warm_up(target: Target, options: BenchOptions, jobs: Sequence[Job]) -> None:
    if jobs:
        warm_up = await _run(target, options, jobs, float("inf"), "warm-up")
        for record in warm_up.records:
            if record.error is not None:
                raise RequestError(f"a warm-up request failed: {record.error}")


async def _run(target: Target, options: BenchOptions, jobs: Sequence[Job], rate: float, name: str = "") -> Run:
    """Run a workload, with a progress bar on a terminal."""
    with tqdm(total=len(jobs), desc=name or f"rate {rate_name(rate)}", unit="req", disable=None, leave=False) as bar:
        num_failed = 0

        def progress(record: Record) -> None:
            nonlocal num_failed
            num_failed += record.error is not None
            if num_failed:
                bar.set_postfix_str(f"{num_failed} failed", refresh=False)
            bar.update()

        return await run_jobs(
            target,
            jobs,
            request_rate=rate,
            max_concurrency=options.max_concurrency,
            timeout=options.request_timeout,
            progress=progress,
        )
