"""`moe-runtime generate`: prints the text generated for prompts. A single prompt on a terminal streams."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moe_runtime.config.checks import check_output
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.options import Option, only_fields, option_values, options_of, user_mistakes
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.engine.engine import Engine
    from moe_runtime.types.outputs import OutputDelta, PositionLogprobs

DEFAULT_MAX_TOKENS = 256  # enough for an answer; the Python default is about one line


@dataclass
class _Output:
    """The output so far for one prompt, which `title` names."""

    title: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=list)
    error: str | None = None

    def add(self, delta: OutputDelta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.prompt_token_ids = delta.prompt_token_ids or self.prompt_token_ids
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.error = delta.error


def sampling_options() -> list[Option]:
    """Options of `SamplingParams`, with a larger default for `max_tokens`."""
    return [
        replace(option, default=DEFAULT_MAX_TOKENS) if option.name == "max_tokens" else option
        for option in options_of(SamplingParams, exclude=("n", "logit_bias", "structured_outputs"))
    ]


def engine_options(*exclude: str) -> list[Option]:
    """Options of `EngineConfig` without the seed: one option sets the seed of both requests and engine."""
    return options_of(EngineConfig, exclude=("model", "seed", *exclude))


def generate(namespace: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserMistake: an option, the model or a prompt cannot be used.
        RankError: a rank failed.
    """
    with user_mistakes():
        config, given = _settings(namespace)
        from moe_runtime.build import build_engine

        engine = build_engine(config)
    try:
        with user_mistakes():
            params = SamplingParams(
                **{"max_tokens": DEFAULT_MAX_TOKENS, **engine.model_config.default_sampling, **given}
            )
            outputs = _add_requests(engine, namespace, params)
        succeeded = _run(engine, outputs)
        if namespace.heatmap:
            load = engine.expert_load()
            with user_mistakes():
                load.save(namespace.heatmap)
    finally:
        engine.close()
    return 0 if succeeded else 1


def _settings(namespace: argparse.Namespace) -> tuple[EngineConfig, dict[str, Any]]:
    """The engine's options and the given sampling parameters, checked as far as possible before loading."""
    from moe_runtime.balancer.load import SUFFIXES

    values = option_values(namespace, [*options_of(EngineConfig), *sampling_options()])
    given = only_fields(SamplingParams, values)
    SamplingParams(**{"max_tokens": DEFAULT_MAX_TOKENS, **given})  # checks them
    config = EngineConfig(**only_fields(EngineConfig, values))
    if not namespace.prompt and not namespace.prompt_token_ids:
        raise ValueError("prompt: missing; give at least one --prompt or --prompt-token-ids")
    if namespace.heatmap:
        check_output("heatmap", namespace.heatmap, SUFFIXES)
    return config, given


def _add_requests(engine: Engine, namespace: argparse.Namespace, params: SamplingParams) -> dict[str, _Output]:
    tokenizer = engine.tokenizer
    chat = namespace.chat or (not namespace.raw and tokenizer is not None and tokenizer.has_chat_template)
    prompts: list[tuple[str, str | list[int]]] = []
    for text in namespace.prompt:
        if chat and tokenizer is None:
            raise ValueError("chat: not allowed without a tokenizer; use --prompt-token-ids")
        message = {"role": "user", "content": text}
        rendered = tokenizer.apply_chat_template([message]).token_ids if chat and tokenizer is not None else text
        prompts.append((text, rendered))
    prompts += [(",".join(map(str, token_ids)), token_ids) for token_ids in namespace.prompt_token_ids]
    outputs = {}
    for index, (title, prompt) in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
        outputs[str(index)] = _Output(title)
    return outputs


def _run(engine: Engine, outputs: dict[str, _Output]) -> bool:
    """Run all requests and print the text: as it arrives for one prompt on a terminal, else when all have ended.

    Returns:
        Whether all requests could be finished.
    """
    has_text = engine.tokenizer is not None
    live = len(outputs) == 1 and sys.stdout.isatty() and has_text
    started = time.perf_counter()
    while engine.has_work:
        for delta in engine.step():
            outputs[delta.request_id].add(delta)
            if live:
                print(delta.text, end="", flush=True)
    seconds = time.perf_counter() - started
    for output in outputs.values():
        if len(outputs) > 1:
            print(f">>> {output.title}")
        print("" if live else output.text if has_text else ",".join(map(str, output.token_ids)))
        _print_logprobs(output)
        if output.error is not None:
            print(f"moe-runtime: error: {output.error}", file=sys.stderr)
        if len(outputs) > 1:
            print()
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs.values())
    num_tokens = sum(len(output.token_ids) for output in outputs.values())
    figures = f"{num_prompt_tokens} prompt tokens, {num_tokens} generated in {seconds:.2f} s"
    print(f"{figures} ({num_tokens / seconds:.1f} tok/s)", file=sys.stderr)
    return all(output.error is None for output in outputs.values())


def _print_logprobs(output: _Output) -> None:
    """Print a line for each position that has log-probabilities: the token, then the best tokens."""
    for name, token_ids, positions in (
        ("prompt", output.prompt_token_ids, output.prompt_logprobs),
        ("output", output.token_ids, output.logprobs),
    ):
        # `positions` is empty if none were asked for. The prompt's first token has None: no token precedes it.
        for token_id, position in zip(token_ids, positions, strict=False):
            if position is None:
                continue
            best = " ".join(_entry(other_id, position) for other_id in position if other_id != token_id)
            print(f"{name} {_entry(token_id, position)} | {best}")


def _entry(token_id: int, position: PositionLogprobs) -> str:
    entry = position[token_id]
    shown = token_id if entry.decoded_token is None else repr(entry.decoded_token)
    return f"{shown}:{entry.logprob:.4f}#{entry.rank}"
