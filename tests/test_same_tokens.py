"""The same request gives the same tokens, whatever else runs and wherever: the promise of design, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import PoolExecutor, RankPool
from tiny_models import VOCAB, make_model, save

from moe_runtime.build import build_engine
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.sampling_params import SamplingParams

Pools = Callable[[int], RankPool]


@contextmanager
def engine(pools: Pools, path: Path, ep_size: int, **options: Any) -> Iterator[Engine]:
    config = EngineConfig(
        str(path), ep_size=ep_size, dtype="float32", skip_tokenizer_init=True, device="cpu", **options
    )
    made = build_engine(config, lambda config, model, where: PoolExecutor(pools(ep_size), config, model, where))
    try:
        yield made
    finally:
        made.close()


def generate(made: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """Output tokens of all prompts, run together."""
    for index, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        made.add_request(str(index), prompt, p)
    tokens: list[list[int]] = [[] for _ in prompts]
    while made.has_work:
        for delta in made.step():
            tokens[int(delta.request_id)] += delta.token_ids
    return tokens


def greedy_reference(model: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            model(ids[:, :1])  # a short input makes "dynamic" rope forget the longest length it has seen
        out = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


# How the same work can be run: each must give the tokens that transformers gives for every prompt alone.
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "one rank, chunks": (1, {"max_num_batched_tokens": 7, "max_num_seqs": 5}),
    "one rank, preempted": (1, {"block_size": 8, "kv_cache_memory_bytes": 13}),
    "two ranks, symmetric": (2, {"dispatcher": "symmetric"}),
    "two ranks, all_to_all": (2, {"dispatcher": "all_to_all"}),
    "two ranks, all_gather, chunks": (2, {"dispatcher": "all_gather", "max_num_batched_tokens": 9, "max_num_seqs": 3}),
    "two ranks, preempted": (2, {"block_size": 8, "kv_cache_memory_bytes": 13}),
    "four ranks": (4, {}),
    "four ranks, chunks": (4, {"max_num_batched_tokens": 5, "max_num_seqs": 2}),
}


def options_of(options: dict[str, Any], model: Any) -> dict[str, Any]:
    """`kv_cache_memory_bytes` above is in pages; make it bytes of this model."""
    options = dict(options)
    if "kv_cache_memory_bytes" in options:
        config = model.config
        page = 2 * config.num_hidden_layers * options["block_size"] * config.num_key_value_heads * config.head_dim * 4
        options["kv_cache_memory_bytes"] *= page
    return options


@pytest.mark.parametrize("case", ["qwen3 dense between", "mixtral dynamic", "glm4 groups"])
def test_greedy_tokens_are_those_of_transformers(rank_pool: Pools, tmp_path: Path, case: str) -> None:
    model = make_model(case)
    model.generation_config.max_length = None
    save(model, tmp_path)
    lengths = [3, 17, 30, 45, 9, 60]
    prompts = [torch.randint(2, VOCAB, (length,)).tolist() for length in lengths]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    expected = greedy_reference(model, prompts, 30)
    for name, (ep_size, options) in WAYS.items():
        with engine(rank_pool, tmp_path, ep_size, **options_of(options, model)) as made:
            found = generate(made, prompts, [params] * len(prompts))
            assert found == expected, name
            stats = made.stats()
            assert (stats.num_preemptions > 0) == ("preempted" in name), name
            if "preempted" not in name:
                top_k = made.model_config.moe.top_k
                load = made.expert_load()
                assert (load.tokens["prefill"].sum(axis=1) == sum(lengths) * top_k).all()
                assert (load.tokens["decode"].sum(axis=1) >= 29 * len(prompts) * top_k).all()
            if "dispatcher" in options:
                assert set(stats.dispatcher_steps) == {options["dispatcher"]}


def test_sampled_tokens_depend_on_seed_and_position_alone(rank_pool: Pools, tmp_path: Path) -> None:
    model = make_model("glm4")
    save(model, tmp_path)
    prompts = [torch.randint(2, VOCAB, (length,)).tolist() for length in (5, 20, 33, 50)]
    params = [
        SamplingParams(temperature=0.8, seed=1, max_tokens=25, ignore_eos=True),
        SamplingParams(temperature=1.2, top_k=20, seed=2, max_tokens=25, ignore_eos=True),
        SamplingParams(temperature=1.0, top_p=0.7, repetition_penalty=1.2, seed=3, max_tokens=25, ignore_eos=True),
        SamplingParams(temperature=1.0, min_p=0.05, presence_penalty=0.6, seed=4, max_tokens=25, ignore_eos=True),
    ]
    with engine(rank_pool, tmp_path, 1) as made:
        alone = [generate(made, [prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)]
    for name, (ep_size, options) in WAYS.items():
        with engine(rank_pool, tmp_path, ep_size, **options_of(options, model)) as made:
            assert generate(made, prompts, params) == alone, name


def test_log_probabilities_are_those_of_transformers(rank_pool: Pools, tmp_path: Path) -> None:
    model = make_model("qwen3 normalised")
    save(model, tmp_path)
    prompt = torch.randint(2, VOCAB, (20,)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    with engine(rank_pool, tmp_path, 2, max_num_batched_tokens=6, max_num_seqs=4) as made:
        made.add_request("a", prompt, params)
        deltas = []
        while made.has_work:
            deltas += made.step()
    tokens = [token for delta in deltas for token in delta.token_ids]
    with torch.no_grad():
        exact = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    entries = [entry for delta in deltas for entry in delta.logprobs or []]
    prompt_entries = next(delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs)
    assert prompt_entries[0] is None and len(prompt_entries) == len(prompt)
    for position, entry in enumerate([*prompt_entries[1:], *entries]):
        token = (prompt + tokens)[position + 1]
        best = exact[position].topk(2 if position + 1 < len(prompt) else 3).indices.tolist()
        assert entry is not None and set(entry) == {token, *best}
        for token_id, found in entry.items():
            assert found.logprob == pytest.approx(exact[position, token_id].item(), abs=1e-4)
            assert found.rank == int((exact[position] > exact[position, token_id]).sum()) + 1
