"""The same request gives the same tokens, whatever else runs and on any rank: the guarantee of design, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import WAYS, Pools, generate, in_bytes, pool_engine, possible
from tiny_models import FIRST_CASES, VOCAB, make_model, save

from moe_runtime.types.sampling_params import SamplingParams


def greedy_reference(model: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            model(ids[:, :1])  # a short input makes "dynamic" rope forget the longest length it has seen
        out = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


# Each must give the tokens that transformers gives for every prompt alone.
ALL_WAYS = WAYS | {
    "four ranks": (4, {}),
    "four ranks, chunks": (4, {"max_num_batched_tokens": 5, "max_num_seqs": 2}),
}


@pytest.mark.parametrize("case", ["qwen3 dense between", "mixtral dynamic", "glm4 groups", *FIRST_CASES[3:]])
def test_greedy_tokens_are_those_of_transformers(rank_pool: Pools, tmp_path: Path, case: str) -> None:
    model = make_model(case)
    model.generation_config.max_length = None
    save(model, tmp_path)
    lengths = [3, 17, 30, 45, 9, 60]
    prompts = [torch.randint(2, VOCAB, (length,)).tolist() for length in lengths]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    expected = greedy_reference(model, prompts, 30)
    for name, (ep_size, options) in possible(ALL_WAYS).items():
        with pool_engine(rank_pool, tmp_path, ep_size, dtype="float32", **in_bytes(options, model)) as made:
            found = generate(made, prompts, params)
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
    with pool_engine(rank_pool, tmp_path, 1, dtype="float32") as made:
        alone = [generate(made, [prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)]
    for name, (ep_size, options) in possible(ALL_WAYS).items():
        with pool_engine(rank_pool, tmp_path, ep_size, dtype="float32", **in_bytes(options, model)) as made:
            assert generate(made, prompts, params) == alone, name


def test_log_probabilities_are_those_of_transformers(rank_pool: Pools, tmp_path: Path) -> None:
    model = make_model("qwen3 normalised")
    save(model, tmp_path)
    prompt = torch.randint(2, VOCAB, (20,)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    with pool_engine(rank_pool, tmp_path, 2, dtype="float32", max_num_batched_tokens=6, max_num_seqs=4) as made:
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
