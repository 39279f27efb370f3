"""Measures structured outputs: whether answers are valid, how long grammars take, and what rows with a form cost.

Answers: the demo model answers once for each of many random schemas, all in one batch, with random sampling. Every
answer that has ended is validated by jsonschema. Grammars: the time to check one, and to find the tokens that may come
next. Cost: eight rows decode with and without a form, in turn. With xgrammar installed, its times stand beside ours.

    python scripts/bench_structured_outputs.py          # writes table and figures to benchmarks/structured; minutes
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_runtime import LLM, SamplingParams, __version__
from moe_runtime.bench.report import describe_machine
from moe_runtime.grammars.compile import GrammarCompiler
from moe_runtime.grammars.matcher import Matcher
from moe_runtime.grammars.tokens import token_trie
from moe_runtime.types.structured_outputs import StructuredOutputs

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from structured.schemas import draw

OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "structured"
ROWS, COST_TOKENS = 8, 96
WALKED = 100  # schemas whose grammars are timed
# Text that goes on for as long as it is measured.
LONG: dict[str, Any] = {"type": "array", "items": {"type": "string", "minLength": 40}, "minItems": 60}


def answers(llm: LLM, schemas: list[dict[str, Any]]) -> tuple[dict[str, int], list[str]]:
    """How many answers ended, and how many of these are valid; and all answers."""
    import jsonschema

    params = [
        SamplingParams(temperature=1.0, seed=index, max_tokens=400, structured_outputs=StructuredOutputs(json=schema))
        for index, schema in enumerate(schemas)
    ]
    found = llm.generate(["An example of the data as JSON:\n"] * len(schemas), params)
    ended = valid = 0
    for schema, output in zip(schemas, found, strict=True):
        if output.outputs[0].finish_reason == "stop":
            ended += 1
            try:
                jsonschema.validate(json.loads(output.outputs[0].text), schema)
                valid += 1
            except (ValueError, jsonschema.ValidationError) as error:
                print(f"NOT VALID: {output.outputs[0].text!r}: {str(error).splitlines()[0]}", flush=True)
    texts = [output.outputs[0].text for output in found]
    return {"schemas": len(schemas), "ended": ended, "valid": valid}, texts


def times(llm: LLM, schemas: list[dict[str, Any]], texts: list[str]) -> dict[str, dict[str, list[float]]]:
    """Seconds to make grammars and masks, of llguidance and, if it is installed, of xgrammar."""
    tokenizer = llm._engine.tokenizer
    assert tokenizer is not None
    vocabulary = tokenizer.vocabulary(llm._engine.model_config.eos_token_ids)
    compiler = GrammarCompiler(lambda: vocabulary)
    compiler.compile(StructuredOutputs(regex="a"))
    trie = token_trie(vocabulary)

    def ours(schema: dict[str, Any]) -> tuple[Callable[[], object], Callable[[int], object]]:
        matcher = Matcher(trie, compiler.compile(StructuredOutputs(json=schema)))
        return matcher.allowed, matcher.accept

    found = {"llguidance": _walk(ours, schemas, texts, tokenizer)}
    try:
        import xgrammar
    except ImportError:
        return found
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer._tokenizer, vocab_size=len(vocabulary.tokens))
    other = xgrammar.GrammarCompiler(info, cache_enabled=False)

    def theirs(schema: dict[str, Any]) -> tuple[Callable[[], object], Callable[[int], object]]:
        grammar = other.compile_json_schema(json.dumps(schema), any_whitespace=False, separators=(",", ":"))
        matcher = xgrammar.GrammarMatcher(grammar)
        mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
        return lambda: matcher.fill_next_token_bitmask(mask), matcher.accept_token

    return found | {"xgrammar": _walk(theirs, schemas, texts, tokenizer)}


def _walk(make: Any, schemas: list[dict[str, Any]], texts: list[str], tokenizer: Any) -> dict[str, list[float]]:
    """Seconds to make each schema's matcher and each token's mask along a valid text; refused schemas are counted."""
    compile_s, mask_s, refused = [], [], 0
    for schema, text in zip(schemas, texts, strict=True):
        start = time.perf_counter()
        try:
            look, accept = make(schema)
        except (ValueError, RuntimeError):
            refused += 1
            continue
        compile_s.append(time.perf_counter() - start)
        for token in tokenizer.encode(text, add_special_tokens=False):
            start = time.perf_counter()
            look()
            mask_s.append(time.perf_counter() - start)
            accept(token)
    return {"compile": compile_s, "mask": mask_s, "refused": [float(refused)]}


def cost(llm: LLM, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of rows with and without a form, measured in turn."""
    forms = {"free": None, "form": StructuredOutputs(json=LONG)}
    found: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, form in random.sample([*forms.items()], 2):
            params = SamplingParams(
                temperature=0.8,
                seed=number,
                max_tokens=COST_TOKENS,
                structured_outputs=form,
                ignore_eos=form is None,
            )
            start = time.perf_counter()
            outputs = llm.generate(["The sea is calm and the sky is blue. "] * ROWS, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            if number:  # the first round warms up
                found[name].append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--schemas", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    schemas = [draw(rng) for _ in range(options.schemas)]
    with LLM(options.model, max_num_seqs=64) as llm:
        validity, texts = answers(llm, schemas)
        seconds = times(llm, schemas[:WALKED], texts[:WALKED])
        speeds = cost(llm, options.rounds)
    machine = describe_machine()
    lines = [
        f"{options.model}, moe_runtime {__version__}, {machine['processor']}, {machine['cores']} cores",
        "",
        "{schemas} random schemas: {ended} answers ended, {valid} of them are valid.".format(**validity),
        "",
        "| library | schemas refused | compile, ms: p50 | p99 | mask, ms: p50 | p99 |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in seconds.items():
        cuts = [1000 * cut for kind in ("compile", "mask") for cut in _cuts(found[kind])]
        lines.append(f"| {name} | {found['refused'][0]:.0f} | " + " | ".join(f"{cut:.2f}" for cut in cuts) + " |")
    ratios = [form / free for form, free in zip(speeds["form"], speeds["free"], strict=True)]
    free, form = (statistics.median(speeds[name]) for name in ("free", "form"))
    lines += [
        "",
        f"{ROWS} rows: {free:.0f} tokens/s without a form, {form:.0f} with one: {statistics.median(ratios):.3f}",
    ]
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "structured.md").write_text("\n".join(lines) + "\n")
    figures = {"answers": validity, "seconds": seconds, "tokens_per_second": speeds, "machine": machine}
    (options.out / "structured.json").write_text(json.dumps(figures) + "\n")


def _cuts(values: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


if __name__ == "__main__":
    main()
