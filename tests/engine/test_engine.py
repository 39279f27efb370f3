from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
from fakes import (
    EOS,
    fake_logprobs,
    generate_alone,
    make_engine,
    model_config,
    random_next_token,
    save_byte_tokenizer,
)

from moe_runtime.engine.engine import Engine
from moe_runtime.text.tokenizer import Tokenizer
from moe_runtime.types.outputs import OutputDelta
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.types.version import __version__


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def drain(engine: Engine) -> dict[str, list[OutputDelta]]:
    deltas = defaultdict(list)
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    return deltas


def says(token_ids: list[int], prompt_length: int):
    """A model that answers any prompt of that length with `token_ids`, then with end-of-sequence."""
    return lambda context, seed: [*token_ids, EOS][min(len(context) - prompt_length, len(token_ids))]


def answer(tokenizer: Tokenizer, text_ids: list[int], max_inflight: int = 2, **params) -> list[OutputDelta]:
    """Deltas of one request whose model says `text_ids`; what an end-of-sequence token is, the model knows."""
    prompt = tokenizer.encode("The sea")
    engine, _ = make_engine(
        max_inflight=max_inflight,
        next_token=says(text_ids, len(prompt)),
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
    )
    engine.add_request("a", "The sea", SamplingParams(**{"max_tokens": None, **params}))
    return drain(engine)["a"]


def test_idle():
    engine, executor = make_engine()
    assert not engine.has_work
    assert engine.step() == []
    assert executor.plans == []


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_request_comes_out_token_by_token(max_inflight):
    engine, executor = make_engine(max_inflight=max_inflight)
    engine.add_request("a", [5, 6, 7], SamplingParams(max_tokens=4, seed=1, ignore_eos=True))
    deltas = drain(engine)["a"]
    token_ids, _ = generate_alone([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True), 1, 64)
    assert [delta.token_ids for delta in deltas] == [[token] for token in token_ids]
    assert [delta.num_output_tokens for delta in deltas] == [1, 2, 3, 4]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "length"]
    assert {delta.text for delta in deltas} == {""}
    assert len(executor.plans) == 4, "a length is known ahead, so no row is planned in vain"


def test_steps_are_planned_while_one_runs_and_what_overshoots_is_thrown_away():
    prompt = [5, 6, 7]
    params = SamplingParams(max_tokens=None, stop_token_ids=[9])
    engine, executor = make_engine(max_inflight=2, next_token=says([8, 8, 9], len(prompt)))
    engine.add_request("a", prompt, params)
    assert [delta.token_ids for delta in engine.step()] == [[8]]
    assert len(executor.plans) == 2
    deltas = drain(engine)["a"]
    assert [delta.token_ids for delta in deltas] == [[8], [9]]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", 9)
    assert len(executor.plans) == 4, "one row was planned in vain"
    assert engine.stats().generation_tokens == 3
    engine.add_request("b", prompt, params)
    drain(engine)
    assert executor.num_sequences == 1, "the ranks hear of an ended sequence with the next plan"


def test_context_end_is_a_length():
    engine, _ = make_engine(max_model_len=10, num_pages=[2])
    engine.add_request("a", list(range(1, 8)), SamplingParams(max_tokens=None, ignore_eos=True))
    deltas = drain(engine)["a"]
    assert (len(deltas), deltas[-1].finish_reason) == (3, "length")


def test_seeds_are_drawn_by_the_front():
    def seeds(seed: int) -> list[int]:
        engine, executor = make_engine(seed=seed)
        for index, asked in enumerate([None, 7, None, None]):
            engine.add_request(str(index), [1], SamplingParams(max_tokens=1, seed=asked))
        drain(engine)
        return [new.seed for plan in executor.plans for new in plan.ranks[0].new_sequences]

    drawn = seeds(0)
    assert drawn == seeds(0)
    assert drawn[1] == 7
    assert len(set(drawn + seeds(1))) == 7, "each its own, but for the one that was asked for"


BAD_PROMPTS = [
    ([], r"^prompt: it is empty; at least one token is needed$"),
    ("text", r"^prompt: text needs a tokenizer"),
    ([50], r"^prompt: token id 50 is not allowed; it must be an integer from 0 to 49$"),
    ([3, -1], r"^prompt: token id -1 is not allowed"),
    ([True], r"^prompt: token id True is not allowed"),
    (["a"], r"^prompt: token id 'a' is not allowed"),
    ([1] * 64, r"^prompt: 64 tokens, but max_model_len is 64 and at least one must be left for the output$"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompts_are_refused_and_leave_nothing(prompt, message):
    engine, _ = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.add_request("a", prompt, SamplingParams())
    assert not engine.has_work
    engine.add_request("a", [1] * 63, SamplingParams())
    assert len(drain(engine)["a"]) == 1


def test_a_request_for_no_tokens_runs_its_prompt():
    engine, _ = make_engine()
    prompt = [5, 6, 7, 8] * 16  # as long as the context
    engine.add_request("a", prompt, SamplingParams(max_tokens=0, prompt_logprobs=2, logprobs=1))
    (delta,) = drain(engine)["a"]
    assert (delta.finish_reason, delta.token_ids, delta.logprobs) == ("length", [], [])
    assert (delta.num_prompt_tokens, delta.num_output_tokens, delta.prompt_token_ids) == (64, 0, prompt)
    assert [entry is None for entry in delta.prompt_logprobs] == [True] + [False] * 63
    assert (engine.stats().prompt_tokens, engine.stats().generation_tokens) == (64, 0)
    with pytest.raises(ValueError, match=r"^prompt: 65 tokens, but max_model_len is 64$"):
        engine.add_request("b", [*prompt, 5], SamplingParams(max_tokens=0))


def test_logits_that_are_not_finite_end_one_request():
    def next_token(token_ids, seed):
        return -1 if token_ids[0] == 9 and len(token_ids) == 5 else 4

    engine, executor = make_engine(next_token=next_token)
    for name, first in (("good", 1), ("bad", 9), ("other", 2)):
        engine.add_request(name, [first, 3], SamplingParams(max_tokens=6, logprobs=1))
    deltas = drain(engine)
    *before, last = deltas["bad"]
    assert [delta.token_ids for delta in before] == [[4]] * 3
    assert (last.finish_reason, last.token_ids, last.logprobs) == ("error", [], [])
    assert last.error == "the model's logits after token 5 are NaN or infinite; its weights may be damaged"
    for name in ("good", "other"):
        assert [token for delta in deltas[name] for token in delta.token_ids] == [4] * 6
        assert deltas[name][-1].finish_reason == "length"
    assert engine.stats().finished == {"error": 1, "length": 2}
    assert executor.num_sequences <= 3 and not engine.has_work


def test_a_token_of_the_bias_must_exist():
    engine, _ = make_engine()
    with pytest.raises(
        ValueError, match=r"^logit_bias: token id 50 is not allowed; it must be an integer from 0 to 49"
    ):
        engine.add_request("a", [1], SamplingParams(logit_bias={3: 1, 50: 2}))


def test_bad_texts_are_refused(tokenizer):
    engine, _ = make_engine(tokenizer=tokenizer, vocab_size=300)
    with pytest.raises(ValueError, match=r"^prompt: it is empty"):
        engine.add_request("a", "", SamplingParams())
    with pytest.raises(ValueError, match=r"^prompt: the text is not valid Unicode"):
        engine.add_request("a", "half \ud83d", SamplingParams())
    beyond = tokenizer.decode([300, 301, 302])
    with pytest.raises(
        ValueError, match=r"^prompt: token id 3\d\d is not allowed; it must be an integer from 0 to 299$"
    ):
        engine.add_request("a", beyond, SamplingParams())
    assert not engine.has_work


def test_stop_strings_need_a_tokenizer():
    engine, _ = make_engine()
    with pytest.raises(ValueError, match=r"^stop: stop strings need a tokenizer"):
        engine.add_request("a", [1], SamplingParams(stop="x"))


def test_an_id_is_in_use_until_its_last_delta():
    engine, _ = make_engine()
    engine.add_request("a", [1], SamplingParams())
    with pytest.raises(ValueError, match=r"^request_id: 'a' is in use$"):
        engine.add_request("a", [2], SamplingParams())
    engine.abort("a")
    with pytest.raises(ValueError, match=r"^request_id: 'a' is in use$"):
        engine.add_request("a", [2], SamplingParams())
    assert [delta.finish_reason for delta in engine.step()] == ["abort"]
    engine.add_request("a", [2], SamplingParams(max_tokens=1))
    assert [delta.prompt_token_ids for delta in drain(engine)["a"]] == [[2]]


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_an_abort_frees_its_pages_within_two_steps(max_inflight):
    engine, executor = make_engine(max_inflight=max_inflight, max_num_seqs=2)
    params = SamplingParams(max_tokens=None, ignore_eos=True, logprobs=1)
    for name in "abc":
        engine.add_request(name, [1, 2, 3], params)
    for _ in range(3):
        engine.step()
    assert engine.stats().num_waiting == 1
    before = engine.stats().kv_cache_usage
    engine.abort("c")
    engine.abort("a")
    engine.abort("a")
    engine.abort("nobody")
    assert engine.stats().kv_cache_usage == before / 2
    deltas = engine.step()
    ended = {delta.request_id: delta for delta in deltas if delta.finish_reason}
    assert {name: delta.finish_reason for name, delta in ended.items()} == {"a": "abort", "c": "abort"}
    assert ended["c"].prompt_token_ids == [1, 2, 3], "it is the first delta too"
    assert (ended["a"].token_ids, ended["a"].logprobs, ended["a"].prompt_token_ids) == ([], [], None)
    engine.step()
    assert executor.num_sequences == 1
    assert engine.stats().finished == {"abort": 2}


def test_logprobs_are_vllms(tokenizer):
    engine, _ = make_engine(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size)
    prompt = [40, 41, 42]
    engine.add_request(
        "a", prompt, SamplingParams(max_tokens=2, logprobs=2, prompt_logprobs=0, ignore_eos=True, seed=3)
    )
    first, second = drain(engine)["a"]
    (entries,) = first.logprobs
    found = fake_logprobs(prompt, first.token_ids[0], 2)
    assert next(iter(entries)) == first.token_ids[0], "the chosen one comes first"
    assert set(entries) == set(found.token_ids)
    for token_id, logprob, rank in zip(found.token_ids, found.logprobs, found.ranks, strict=True):
        entry = entries[token_id]
        assert (entry.logprob, entry.rank) == (logprob, rank)
        assert entry.decoded_token == tokenizer.token_text(token_id)
    assert len(second.logprobs) == 1
    nothing, *others = first.prompt_logprobs
    assert nothing is None and [list(entry) for entry in others] == [[41], [42]]
    assert second.prompt_logprobs is None


def test_a_prompt_of_one_token_has_no_logprobs():
    engine, _ = make_engine()
    engine.add_request("a", [4], SamplingParams(max_tokens=1, prompt_logprobs=3, logprobs=0))
    (delta,) = drain(engine)["a"]
    assert delta.prompt_logprobs == [None]
    assert [entry.decoded_token for entry in delta.logprobs[0].values()] == [None]


def text_of(deltas: list[OutputDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_text_is_streamed_in_whole_characters(tokenizer, max_inflight):
    text = " is full, 🙂🚀🦀 and naïve"
    token_ids = tokenizer.encode(text)
    deltas = answer(tokenizer, token_ids, max_inflight)
    assert text_of(deltas) == text
    assert all("\ufffd" not in delta.text for delta in deltas)
    assert [token for delta in deltas for token in delta.token_ids] == [*token_ids, EOS], "its id stays, its text not"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    token_ids = tokenizer.encode(" a🦀")[:-1]
    deltas = answer(tokenizer, token_ids, max_tokens=len(token_ids))
    assert text_of(deltas) == tokenizer.decode(token_ids) == " a\ufffd"
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_stop_string_over_token_borders(tokenizer, include, max_inflight):
    token_ids = tokenizer.encode(" stop and stopping, the end of the story")
    stop = "ng, the e"
    deltas = answer(tokenizer, token_ids, max_inflight, stop=[stop, "nowhere"], include_stop_str_in_output=include)
    assert text_of(deltas) == " stop and stoppi" + (stop if include else "")
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    told = ""
    for delta in deltas:
        told += delta.text
        assert " stop and stopping, the end".startswith(told)
        assert include or not told.endswith("n"), "text was shown that the stop string takes back"
    assert deltas[-1].num_output_tokens < len(token_ids)


def test_what_was_held_back_for_a_stop_string_is_shown_if_it_does_not_come(tokenizer):
    text = " stop and sto"
    for params in ({}, {"max_tokens": len(tokenizer.encode(text))}):
        assert text_of(answer(tokenizer, tokenizer.encode(text), stop="stopping", **params)) == text


def test_eos_is_passed_over_if_asked_for(tokenizer):
    token_ids = [*tokenizer.encode(" is"), EOS, *tokenizer.encode(" full")]
    deltas = answer(tokenizer, token_ids, ignore_eos=True, max_tokens=len(token_ids))
    assert (text_of(deltas), deltas[-1].finish_reason) == (" is full", "length")
    shown = answer(tokenizer, token_ids, ignore_eos=True, max_tokens=len(token_ids), skip_special_tokens=False)
    assert text_of(shown) == " is<|end|> full"


def test_preempted_requests_stream_the_same_text(tokenizer):
    """Two ranks with pages for one request each, and four requests."""
    text = tokenizer.decode(list(range(70, 110)))
    token_ids = tokenizer.encode(text)[:40]
    prompt = tokenizer.encode("The sea")
    engine, executor = make_engine(
        num_pages=[8, 8],
        max_inflight=2,
        next_token=says(token_ids, len(prompt)),
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
    )
    for name in "abcd":
        engine.add_request(name, "The sea", SamplingParams(max_tokens=None))
    deltas = drain(engine)
    assert {text_of(parts) for parts in deltas.values()} == {tokenizer.decode(prompt + token_ids)[len("The sea") :]}
    assert engine.stats().num_preemptions > 0
    assert any(rank.dropped for plan in executor.plans for rank in plan.ranks)


def test_max_model_len_is_the_models_unless_given():
    assert make_engine(max_model_len=None)[0].max_model_len == model_config().max_model_len
    assert make_engine(max_model_len=32)[0].max_model_len == 32


def test_stats_count():
    engine, executor = make_engine(num_pages=[64, 64], max_num_batched_tokens=200, max_model_len=256)
    engine.add_request("a", [1] * 100, SamplingParams(max_tokens=3, ignore_eos=True))
    engine.add_request("b", [2] * 20, SamplingParams(max_tokens=2, ignore_eos=True))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (2, 0, (13 + 3) / 128)
    drain(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.steps) == (120, 5, 3)
    assert stats.dispatcher_steps == {"all_to_all": 1, "all_gather": 2}
    assert [plan.dispatcher for plan in executor.plans] == ["all_to_all", "all_gather", "all_gather"]
    assert (stats.finished, stats.last_step_seconds) == ({"length": 2}, 0.25)


def test_expert_load_awaits_the_steps_in_flight_and_loses_nothing():
    engine, executor = make_engine(num_pages=[8, 8], max_inflight=2, served_model_name="name")
    params = SamplingParams(max_tokens=10, ignore_eos=True, seed=1)
    engine.add_request("a", [1, 2, 3], params)
    tokens = [token for delta in engine.step() for token in delta.token_ids]
    load = engine.expert_load()
    assert (load.tokens["prefill"].sum(), load.tokens["decode"].sum()) == (2 * 3, 2 * 1)
    assert (load.layer_ids, load.model, load.top_k) == ((1, 2), "name", 1)
    assert np.array_equal(load.placement.slots, engine.placement().slots)
    assert engine.placement().slots.tolist() == [[[0, 1, -1], [2, 3, -1]]] * 2
    tokens += [token for delta in drain(engine)["a"] for token in delta.token_ids]
    assert tokens == generate_alone([1, 2, 3], params, 1, 64)[0]
    assert len(executor.plans) == 10


def test_health_is_plain_and_tells_what_was_chosen():
    engine, _ = make_engine(num_pages=[8, 9], served_model_name="name")
    health = json.loads(json.dumps(engine.health()))
    assert health["model"] == "name" and health["version"] == __version__
    assert (health["dtype"], health["device"], health["ep_size"]) == ("float32", "cpu", 2)
    assert (health["max_model_len"], health["block_size"], health["num_blocks"]) == (64, 8, [8, 9])
    assert health["kv_cache_dtype"] == "float32"
    assert (health["dispatcher"], health["kernels"]) == ("auto", {"gate": "torch"})
    assert [(rank["rank"], rank["num_blocks"]) for rank in health["ranks"]] == [(0, [8]), (1, [9])]
    assert health["placement_invariance"] == "greedy tokens, float32"


def test_close_ends_the_ranks():
    engine, executor = make_engine()
    engine.close()
    assert executor.closed == 1


def test_random_requests_share_the_machine(seed):
    rng = np.random.default_rng(seed)
    engine, _ = make_engine(num_pages=[9, 12], max_inflight=2, max_num_batched_tokens=30, max_num_seqs=6)
    expected = {}
    for index in range(40):
        prompt = rng.integers(1, 50, rng.integers(1, 40)).tolist()
        params = SamplingParams(max_tokens=int(rng.integers(1, 30)), seed=index)
        engine.add_request(str(index), prompt, params)
        expected[str(index)] = generate_alone(prompt, params, index, 64, random_next_token)
    deltas = drain(engine)
    got = {
        name: ([token for part in parts for token in part.token_ids], parts[-1].finish_reason)
        for name, parts in deltas.items()
    }
    assert got == expected
