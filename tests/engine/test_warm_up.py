"""A warm engine has run every kind of step, and cannot be told from a new one."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import torch
from engines import Pools, pool_engine, run
from fakes import make_engine, save_byte_tokenizer
from tiny_models import VOCAB, make_model, save

from moe_runtime.balancer.trace import RoutingTrace
from moe_runtime.engine.warm_up import LONG, SHORT
from moe_runtime.types.sampling_params import SamplingParams


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_warm_engine_is_as_new(num_ranks: int, max_inflight: int, caplog) -> None:
    caplog.set_level(logging.DEBUG, logger="moe_runtime")
    options = {"num_pages": [64] * num_ranks, "max_inflight": max_inflight, "seed": random.randrange(1000)}
    (new, new_ranks), (warm, warm_ranks) = make_engine(**options), make_engine(**options)
    warm.warm_up()
    assert not caplog.records
    assert warm_ranks.num_sequences == 0 and warm_ranks.plans == []
    assert (warm.stats(), warm.has_work, warm.decisions()) == (new.stats(), False, [])
    assert not warm.expert_load().tokens["prefill"].any()
    prompts = [[random.randrange(1, 50) for _ in range(random.randint(1, 20))] for _ in range(5)]
    params = SamplingParams(temperature=1.0, max_tokens=7)  # without a seed: the engine draws it
    outputs = [[[delta.token_ids for delta in deltas] for deltas in run(each, prompts, params)] for each in (warm, new)]
    assert outputs[0] == outputs[1]
    assert warm_ranks.plans == new_ranks.plans


def test_every_rank_prefills_and_decodes_with_both_dispatchers() -> None:
    engine, executor = make_engine([64, 64], max_model_len=400, kv_cache_memory_bytes=None)
    plans = []
    submit = executor.submit
    executor.submit = lambda plan: (plans.append(plan), submit(plan))  # type: ignore[assignment]
    engine.warm_up()
    for rank in range(2):
        chunks = [chunk for plan in plans for chunk in plan.ranks[rank].chunks]
        assert {SHORT, LONG} <= {chunk.num_tokens for chunk in chunks}
        assert any(plan.ranks[rank].num_decode for plan in plans)
    assert {plan.dispatcher for plan in plans} == {"all_gather", "all_to_all"}


@pytest.mark.parametrize("max_model_len", [1, 2, 3, SHORT, LONG + 1])
def test_a_short_context_is_enough(max_model_len: int) -> None:
    engine, executor = make_engine([64], max_model_len=max_model_len)
    engine.warm_up()
    assert executor.num_sequences == 0


def test_the_tokenizer_is_warm_whatever_its_template_says(tmp_path: Path) -> None:
    for number, template in enumerate(["{{ messages[0].content }}", "{{ raise_exception('no') }}", None]):
        tokenizer = save_byte_tokenizer(tmp_path / str(number), template)
        make_engine(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size)[0].warm_up()
        assert "max_token_bytes" in vars(tokenizer)
        assert "chat_template" in vars(tokenizer)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_counts_and_traces_of_real_ranks_begin_with_the_first_request(
    rank_pool: Pools, tmp_path: Path, ep_size: int
) -> None:
    save(make_model("qwen3 normalised"), tmp_path)
    options = {"record_trace": str(tmp_path / "trace.npz"), "redundant_experts": 0 if ep_size == 1 else 2}
    with pool_engine(rank_pool, tmp_path, ep_size, dtype="float32", **options) as made:
        made.warm_up()
        assert not any(tokens.any() for tokens in made.expert_load().tokens.values())
        prompt = torch.randint(2, VOCAB, (11,)).tolist()
        run(made, [prompt], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
        load, top_k = made.expert_load(), made.model_config.moe.top_k
        assert (load.tokens["prefill"].sum(axis=1) == 11 * top_k).all()
        assert (load.tokens["decode"].sum(axis=1) == 2 * top_k).all()
    assert len(RoutingTrace.load(tmp_path / "trace.npz").experts) == 13
