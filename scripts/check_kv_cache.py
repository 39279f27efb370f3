"""What a KV cache of 8 bits costs and gains: loss on the demo model's held-out texts, speed with long contexts.

Loss: KL divergence from the logits of the same model with a cache in the dtype of its activations, and perplexity.
Blocks of 512 tokens run in two chunks, so the second half reads the first one's keys from the cache. Activations are
float32, so that nothing else is lost; a row for bfloat16 shows what rounding activations loses.

Speed: attention alone, as one call on one thread with its keys in the processor's caches, and whole steps. Models are
`bench` or `bench-mla` of make_bench_model.py with bfloat16 activations. The three engines decode in turn, so that other
work on the machine affects them equally; a step's time is the lower quartile.

    python scripts/check_kv_cache.py --work-dir FOLDER   # texts are downloaded there (Debian packages); minutes
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from moe_runtime.build import build_engine
from moe_runtime.config.attention import AttentionConfig
from moe_runtime.config.engine import KV_CACHE_DTYPES, EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.demo.texts import BLOCK, KINDS, fetch_texts, token_blocks
from moe_runtime.engine.engine import Engine
from moe_runtime.kernels import ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.cpu.loader import load
from moe_runtime.kernels.cpu.native_step import NativeStep
from moe_runtime.layers.kv_cache import KVCache, LayerCache
from moe_runtime.memory.model_size import cache_dtype, kv_bytes_per_token
from moe_runtime.models.registry import read_model_config
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.weights.checkpoint import resolve_model

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from make_bench_model import WEIGHTS, ensure_bench_model
from text_loss.reader import Reader

GREEDY = SamplingParams(temperature=0.0)
PAGE = 16  # tokens


def _whole_texts(path: Path, dtype: str, kv_cache_dtype: str) -> EngineConfig:
    """Options of a rank that reads one text of the demo at a time."""
    return EngineConfig(
        str(path), dtype=dtype, kv_cache_dtype=kv_cache_dtype, device="cpu", max_model_len=BLOCK, max_num_seqs=1
    )


def losses(work_dir: Path, num_blocks: int) -> Iterator[str]:
    """Rows of the table of losses, one for each reader and all kinds of text."""
    from transformers import AutoTokenizer

    path, root = resolve_model("demo"), fetch_texts(work_dir)
    tokenizer = AutoTokenizer.from_pretrained(path)
    blocks = {kind: token_blocks(tokenizer, read(root)[1], num_blocks).tolist() for kind, read in KINDS.items()}
    ways = [*(("float32", name) for name in KV_CACHE_DTYPES), ("bfloat16", "auto")]
    readers = {way: Reader(_whole_texts(path, *way)) for way in ways}
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {way: {k: [] for k in KINDS} for way in ways}
    for kind, texts in blocks.items():
        for tokens in texts:
            expected = readers[ways[0]].logits(tokens).log_softmax(-1)
            for way, reader in readers.items():
                logprobs = expected if way == ways[0] else reader.logits(tokens).log_softmax(-1)
                divergence = float((expected.exp() * (expected - logprobs)).sum(-1).mean())
                loss = float(F.nll_loss(logprobs[:-1], torch.tensor(tokens[1:])))
                found[way][kind].append((divergence, loss))
    yield f"| activations | cache | KL | {' | '.join(f'perplexity, {kind}' for kind in KINDS)} |"
    yield "|---" * (3 + len(KINDS)) + "|"
    for (dtype, name), kinds in found.items():
        divergence = statistics.mean(one for results in kinds.values() for one, _ in results)
        perplexities = [torch.tensor([loss for _, loss in results]).mean().exp() for results in kinds.values()]
        cells = [f"{float(value):.3f}" for value in perplexities]
        yield f"| {dtype} | {cache_dtype(name, dtype)} | {divergence:.5f} | {' | '.join(cells)} |"


def speeds(shape: str, context: int, batches: list[int], steps: int) -> Iterator[str]:
    """Rows of the table of speeds."""
    yield (
        f"| {shape}, bfloat16 | bytes of a token | ratio | prompt, tokens/s | "
        + " | ".join(f"step of {batch}, ms" for batch in batches)
        + " |"
    )
    yield "|---" * (4 + len(batches)) + "|"
    with tempfile.TemporaryDirectory() as folder:
        path = long_model(shape, context + 2 * steps, Path(folder))
        engines = {name: open_engine(path, name, context + 2 * steps, max(batches)) for name in KV_CACHE_DTYPES}
        prompt_rates: dict[str, float] = {}
        times: dict[str, list[float]] = {name: [] for name in engines}
        for batch in batches:
            for name, engine in engines.items():
                prompt_rates[name] = batch * context / prefill(engine, batch, context, steps)
            samples: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(steps):
                for name, engine in engines.items():
                    start = time.perf_counter()
                    engine.step()
                    samples[name].append(time.perf_counter() - start)
            for name, engine in engines.items():
                times[name].append(statistics.quantiles(samples[name], n=4)[0] * 1e3)
                while engine.has_work:
                    engine.step()
    model = read_model_config(ensure_bench_model(shape))
    plain = kv_bytes_per_token(model, "bfloat16")
    for name in engines:
        dtype = cache_dtype(name, "bfloat16")
        size = kv_bytes_per_token(model, dtype)
        cells = " | ".join(f"{value:.1f}" for value in times[name])
        yield f"| {dtype} | {size} | {size / plain:.2f} | {prompt_rates[name]:.0f} | {cells} |"


def attention_times(shape: str, context: int, num_calls: int = 100) -> Iterator[str]:
    """Rows of the table of attention alone: a call of one row for one layer on one thread, the fastest of many."""
    model, kernels = read_model_config(ensure_bench_model(shape)), load()
    threads = kernels.num_threads
    kernels.set_threads(1)
    caches = {name: filled_cache(model, cache_dtype(name, "bfloat16"), context) for name in KV_CACHE_DTYPES}
    attention = model.layers[0].attention
    step = NativeStep(AttentionMetadata.build([1], [context], [range(context // PAGE)], torch.device("cpu")))
    q_1Hd = torch.randn(1, attention.num_heads, attention.key_size).bfloat16()
    samples: dict[str, list[float]] = {name: [] for name in caches}
    for name, cache in [*caches.items()] * num_calls:
        start = time.perf_counter()
        kernels.paged_attention(
            q_1Hd, cache.k_NBGd, cache.v_NBGe, step, scale=0.1, sliding_window=None, kv_scales=cache.scales
        )
        samples[name].append(time.perf_counter() - start)
    kernels.set_threads(threads)
    yield f"| attention of {shape}, {context} keys, {kernels.instruction_set} | ms |"
    yield "|---|---|"
    for name, seconds in samples.items():
        yield f"| {cache_dtype(name, 'bfloat16')} | {min(seconds) * 1e3:.2f} |"


def filled_cache(model: ModelConfig, dtype: str, context: int) -> LayerCache:
    """The first layer of a cache, with random keys and values of `context` tokens."""
    attention, position_T = model.layers[0].attention, torch.arange(context)
    cache = KVCache(model, [context // PAGE] * len(model.windows), PAGE, dtype, torch.device("cpu")).layer(0)
    k_TGd = torch.randn(context, attention.num_kv_heads, attention.key_size).bfloat16()
    if isinstance(attention, AttentionConfig):
        ops.store_kv(k_TGd, torch.randn_like(k_TGd), cache.k_NBGd, cache.v_NBGe, position_T, cache.scales)
    elif cache.scales is None:
        cache.k_NBGd.copy_(k_TGd.view(cache.k_NBGd.shape))
    else:
        parts = (attention.latent_size, attention.rope_size)
        ops.store_quantized(k_TGd, cache.k_NBGd, cache.scales.k_NBGP, position_T, parts)
    return cache


def long_model(shape: str, length: int, folder: Path) -> Path:
    """The bench model with a longer context than it names; its weights are random anyway."""
    source = ensure_bench_model(shape)
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": length}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).symlink_to(source / WEIGHTS)
    return folder


def open_engine(path: Path, kv_cache_dtype: str, length: int, max_num_seqs: int) -> Engine:
    """An engine of one rank in this process."""
    return build_engine(
        EngineConfig(
            str(path),
            dtype="bfloat16",
            kv_cache_dtype=kv_cache_dtype,
            device="cpu",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=length,
            max_num_seqs=max_num_seqs,
        )
    )


def prefill(engine: Engine, batch: int, context: int, steps: int) -> float:
    """Seconds until all of `batch` prompts have been read and their sequences decode."""
    params = SamplingParams(temperature=0.0, max_tokens=2 * steps, ignore_eos=True)
    draw, decoding = random.Random(batch), set()
    for index in range(batch):
        prompt = [draw.randrange(engine.model_config.vocab_size) for _ in range(context)]
        engine.add_request(str(index), prompt, params)
    start = time.perf_counter()
    while len(decoding) < batch:
        decoding |= {delta.request_id for delta in engine.step()}
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, help="folder for the texts; without it no loss is measured")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of 512 tokens of each kind of text")
    parser.add_argument("--shapes", nargs="*", default=["bench", "bench-mla"], help="bench models to time")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences that decode together")
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    if options.work_dir is not None:
        print(*losses(options.work_dir.resolve(), options.blocks), sep="\n")
    for shape in options.shapes:
        print(*attention_times(shape, options.context), sep="\n")
        print(*speeds(shape, options.context, options.batch, options.steps), sep="\n")


if __name__ == "__main__":
    main()
