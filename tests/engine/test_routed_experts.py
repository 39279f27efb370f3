"""Expert policies and routed experts through the engine: the same however requests run; others are not affected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import WAYS, Pools, in_bytes, pool_engine, possible, run, tokens
from tiny_models import VOCAB, make_model, save

from moe_runtime import LLM
from moe_runtime.balancer.trace import UNUSED, RoutingTrace
from moe_runtime.types.expert_policy import ExpertPolicy
from moe_runtime.types.outputs import OutputDelta
from moe_runtime.types.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3, return_routed_experts=True)
POLICIES = {
    "qwen3 normalised": [
        None,
        ExpertPolicy(top_k=1),
        ExpertPolicy(top_p=0.6),
        ExpertPolicy(threshold=(0.3, 0.5, 0)),
    ],
    "glm4 groups": [
        None,
        ExpertPolicy(top_k=(2, 3)),
        ExpertPolicy(top_p=0.5, temperature=1.5),
        ExpertPolicy(threshold=0.4, temperature=(0.7, 2.0)),
    ],
}


def experts_of(deltas: list[OutputDelta]) -> np.ndarray:
    assert all(delta.routed_experts is None for delta in deltas[:-1])
    experts = deltas[-1].routed_experts
    assert experts is not None
    return experts


@pytest.mark.parametrize("case", list(POLICIES))
def test_policies_and_experts_are_the_same_however_requests_run(rank_pool: Pools, tmp_path: Path, case: str) -> None:
    model = make_model(case)
    save(model, tmp_path)
    prompts = [torch.randint(2, VOCAB, (length,)).tolist() for length in (3, 17, 30, 45, 9, 50, 40, 40)]
    params = [replace(GREEDY, max_tokens=20, routing=POLICIES[case][index % 4]) for index in range(len(prompts))]
    with pool_engine(rank_pool, tmp_path, 1, dtype="float32") as made:
        alone = [run(made, [prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)]
        config = made.model_config
        full = [tokens(run(made, [prompt], [replace(GREEDY, max_tokens=20)])[0]) for prompt in prompts]
    assert full != [tokens(deltas) for deltas in alone], "the policies change something"
    for prompt, p, deltas in zip(prompts, params, alone, strict=True):
        experts = experts_of(deltas)
        assert experts.shape == (len(prompt) + 19, len(config.moe_layers), config.moe.top_k)
        assert experts.dtype == np.uint8
        assert (experts[experts != 0xFF] < config.moe.num_experts).all()
        assert (experts[:, :, :1] != 0xFF).any()
        assert (experts == 0xFF).any() == (p.routing is not None)
    for name, (ep_size, options) in possible(WAYS).items():
        with pool_engine(rank_pool, tmp_path, ep_size, dtype="float32", **in_bytes(options, model)) as made:
            for found, expected in zip(run(made, prompts, params), alone, strict=True):
                assert tokens(found) == tokens(expected), name
                assert np.array_equal(experts_of(found), experts_of(expected)), name
            assert (made.stats().num_preemptions > 0) == ("preempted" in name)


def test_experts_are_those_that_transformers_chooses(tmp_path: Path) -> None:
    model = make_model("qwen3")
    save(model, tmp_path)
    prompt = torch.randint(2, VOCAB, (30,)).tolist()
    with LLM(tmp_path, skip_tokenizer_init=True, device="cpu", max_num_batched_tokens=64) as llm:
        (out,) = llm.generate({"prompt_token_ids": prompt}, replace(GREEDY, max_tokens=5), use_tqdm=False)
    ids = torch.tensor([prompt + out.outputs[0].token_ids[:-1]])
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    expected = torch.stack([layer.topk(3).indices for layer in logits], dim=1)
    experts = out.outputs[0].routed_experts
    assert experts is not None
    assert np.array_equal(np.sort(experts, -1), np.sort(expected.numpy(), -1))


def test_a_token_that_overshoots_a_stop_leaves_nothing(rank_pool: Pools, tmp_path: Path) -> None:
    model = make_model("mixtral")
    save(model, tmp_path)
    prompts = [torch.randint(2, VOCAB, (length,)).tolist() for length in (4, 20, 33)]
    with pool_engine(rank_pool, tmp_path, 2, dtype="float32") as made:
        whole = run(made, prompts, GREEDY)
        stops = [replace(GREEDY, stop_token_ids=[tokens(deltas)[5]]) for deltas in whole]
        for prompt, before, after in zip(prompts, whole, run(made, prompts, stops), strict=True):
            length = tokens(before).index(tokens(before)[5]) + 1
            assert tokens(after) == tokens(before)[:length]
            assert np.array_equal(experts_of(after), experts_of(before)[: len(prompt) + length - 1])


def test_an_aborted_request_gets_what_is_known(rank_pool: Pools, tmp_path: Path) -> None:
    model = make_model("mixtral")
    save(model, tmp_path)
    with pool_engine(rank_pool, tmp_path, 2, dtype="float32") as made:
        made.add_request("0", [5, 6, 7], GREEDY)
        made.step()
        made.abort("0")
        (last,) = [delta for _ in range(4) for delta in made.step()]
    assert last.finish_reason == "abort"
    assert last.routed_experts is not None
    assert last.routed_experts.shape[1:] == (3, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_neighbours_without_a_policy_keep_their_bits(tmp_path: Path, dtype: str) -> None:
    model = make_model("glm4 groups")
    save(model.bfloat16(), tmp_path)
    prompts = [{"prompt_token_ids": torch.randint(2, VOCAB, (length,)).tolist()} for length in (5, 19, 28, 40)]
    plain = replace(GREEDY, return_routed_experts=False)
    with LLM(tmp_path, skip_tokenizer_init=True, device="cpu", dtype=dtype) as llm:
        if llm._engine.health()["placement_invariance"] != "bitwise":
            pytest.skip("no native CPU kernels here")
        alone = [llm.generate(prompt, plain, use_tqdm=False)[0].outputs[0] for prompt in prompts]
        mixed = [replace(GREEDY, routing=POLICIES["glm4 groups"][1 + index % 3]) for index in range(4)]
        together = llm.generate([*prompts, *prompts], [plain] * 4 + mixed, use_tqdm=False)
    for before, after in zip(alone, together[:4], strict=True):
        assert after.outputs[0].logprobs == before.logprobs  # all digits of float32
        assert after.outputs[0].token_ids == before.token_ids
        assert after.outputs[0].routed_experts is None
    assert any(after.outputs[0].logprobs != before.logprobs for before, after in zip(alone, together[4:], strict=True))


def test_the_server_has_a_default_which_requests_override(tmp_path: Path) -> None:
    save(make_model("qwen3"), tmp_path)
    prompt = {"prompt_token_ids": torch.randint(2, VOCAB, (20,)).tolist()}
    with LLM(tmp_path, skip_tokenizer_init=True, device="cpu", routing="top_k=1") as llm:
        used = [
            (llm.generate(prompt, replace(GREEDY, routing=routing), use_tqdm=False)[0].outputs[0].routed_experts != 255)
            .sum(-1)
            .max()
            for routing in (None, "full", "top_k=2")
        ]
        assert used == [1, 3, 2]
        with pytest.raises(ValueError, match="routing: 'fast' is not allowed for this model"):
            llm.generate(prompt, replace(GREEDY, routing="fast"), use_tqdm=False)
    with pytest.raises(ValueError, match=r"routing\.top_k: 4 is not allowed; the model uses 3"):
        LLM(tmp_path, skip_tokenizer_init=True, device="cpu", routing="top_k=4")


def test_a_trace_holds_every_step(rank_pool: Pools, tmp_path: Path) -> None:
    model = make_model("qwen3 dense between")
    save(model, tmp_path)
    path = tmp_path / "routing.npz"
    prompts = [torch.randint(2, VOCAB, (length,)).tolist() for length in (5, 30, 12)]
    params = [replace(GREEDY, routing=policy) for policy in (None, ExpertPolicy(top_k=1), None)]
    with pool_engine(
        rank_pool, tmp_path, 2, dtype="float32", record_trace=str(path), max_num_batched_tokens=64
    ) as made:
        found = run(made, prompts, params)
        load = made.expert_load()
        num_steps = made.stats().steps
    trace = RoutingTrace.load(path)
    assert np.array_equal(trace.counts(), np.stack([load.tokens["prefill"], load.tokens["decode"]]))
    assert (trace.layer_ids, trace.num_experts, trace.top_k) == ((0, 2), 7, 3)
    assert set(trace.rank.tolist()) == {0, 1}
    assert trace.num_steps <= num_steps
    assert (~trace.is_decode).sum() == sum(map(len, prompts))
    # the first prompt's tokens stand together, in the first step
    experts = experts_of(found[0])[:5].astype(np.uint16)
    first = trace.experts[trace.step == trace.step[0]]
    assert any(np.array_equal(first[row : row + 5], experts) for row in range(len(first) - 4))
    assert (trace.experts == UNUSED).any()


def test_a_trace_needs_a_place(tmp_path: Path) -> None:
    save(make_model("mixtral"), tmp_path)
    for name in ("routing.json", "no/such/folder/routing.npz"):
        with pytest.raises(ValueError, match=r"record_trace: .* is not allowed; it must (end in \.npz|be in a folder)"):
            LLM(tmp_path, skip_tokenizer_init=True, device="cpu", record_trace=str(tmp_path / name))
