from __future__ import annotations

import dataclasses
import gc
import math
import os
import signal
import threading
from pathlib import Path

import pytest
from fakes import EOS, MockExecutor, generate_alone, make_engine, random_next_token, save_byte_tokenizer

from moe_runtime import LLM, SamplingParams
from moe_runtime.config.engine import EngineConfig
from moe_runtime.text.tokenizer import Tokenizer
from moe_runtime.wire.executor import RankError

GREEDY = SamplingParams(temperature=0, max_tokens=8, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Fake:
    """Makes LLMs over fake ranks; remembers the options and the executor of the last one."""

    config: EngineConfig
    executor: MockExecutor

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine_options: dict = {"max_inflight": 2}
        monkeypatch.setattr("moe_runtime.llm.build_engine", self.build_engine)

    def build_engine(self, config: EngineConfig):
        self.config = config
        engine, self.executor = make_engine(**self.engine_options)
        return engine


@pytest.fixture
def fake(monkeypatch) -> Fake:
    return Fake(monkeypatch)


@pytest.fixture
def fake_with_text(fake, tokenizer) -> Fake:
    fake.engine_options |= {"tokenizer": tokenizer, "vocab_size": tokenizer.vocab_size}
    return fake


def test_options_are_the_engines_and_others_are_refused_by_name(fake):
    LLM("demo", ep_size=2, dtype="bfloat16", max_num_seqs=3)
    config = EngineConfig("demo", ep_size=2, dtype="bfloat16", max_num_seqs=3)
    assert fake.config == dataclasses.replace(config, decode_slowdown=math.inf)
    LLM("demo", decode_slowdown=3)
    assert fake.config == EngineConfig("demo", decode_slowdown=3)
    LLM(Path("/some/where"))
    assert fake.config.model == "/some/where"
    with pytest.raises(ValueError, match=r"^tensor_parallel_size: no such option; known options are"):
        LLM("demo", tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"^dtype: 'int3' is not allowed"):
        LLM("demo", dtype="int3")


def test_outputs_come_in_order_with_tokens_and_reasons(fake):
    prompts = [[7, 8, index] for index in range(1, 31)]
    params = [SamplingParams(max_tokens=1 + index % 9, seed=index) for index in range(30)]
    outputs = LLM("fake").generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    for output, prompt, wanted in zip(outputs, prompts, params, strict=True):
        (completion,) = output.outputs
        assert (completion.token_ids, completion.finish_reason) == generate_alone(prompt, wanted, wanted.seed, 64)
        assert (output.finished, output.prompt, completion.index, completion.logprobs) == (True, None, 0, None)
    assert len({output.request_id for output in outputs}) == 30


def test_texts(fake_with_text, tokenizer):
    llm = LLM("fake")
    for prompts in ("The sea", ["The sea"], {"prompt": "The sea"}, [{"prompt": "The sea"}]):
        (output,) = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert (output.prompt, output.prompt_token_ids) == ("The sea", tokenizer.encode("The sea"))
        token_ids = [token for token in output.outputs[0].token_ids if token != EOS]
        assert "The sea" + output.outputs[0].text == tokenizer.decode(output.prompt_token_ids + token_ids)


def test_defaults_and_no_prompts(fake):
    llm = LLM("fake")
    assert llm.generate([], use_tqdm=False) == []
    (output,) = llm.generate({"prompt_token_ids": [1, 2]}, use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= 16


def test_cached_tokens_salts_and_forgetting(fake):
    llm = LLM("fake")
    prompt = {"prompt_token_ids": list(range(1, 21))}

    def cached(**more) -> int:
        (output,) = llm.generate([{**prompt, **more}], GREEDY, use_tqdm=False)
        return output.num_cached_tokens

    assert [cached(), cached(), cached(cache_salt="a"), cached(cache_salt="a")] == [0, 19, 0, 19]
    assert llm.reset_prefix_cache() is True
    assert [cached(), cached()] == [0, 19]
    for salt in ("", 5):
        with pytest.raises(ValueError, match=r"^cache_salt: .* is not allowed; it must be a non-empty string$"):
            cached(cache_salt=salt)


def test_several_outputs_of_a_prompt(fake):
    prompts = [[7, 8], [9]]
    params = [SamplingParams(n=3, max_tokens=5, seed=11, prompt_logprobs=1), SamplingParams(max_tokens=5, seed=13)]
    three, one = LLM("fake").generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    assert [output.index for output in three.outputs] == [0, 1, 2] and three.finished
    for seed, output in zip((11, 12, 13), three.outputs, strict=True):
        assert (output.token_ids, output.finish_reason) == generate_alone([7, 8], params[0], seed, 64)
    assert len(three.prompt_logprobs) == 2 and one.prompt_logprobs is None
    assert one.outputs[0].token_ids == generate_alone([9], params[1], 13, 64)[0]


def test_logits_that_are_not_finite_are_told_and_lose_no_other_prompt(fake):
    fake.engine_options |= {"next_token": lambda token_ids, seed: -1 if token_ids[:1] == [3] else 4}
    good, bad = LLM("fake").generate([{"prompt_token_ids": [first]} for first in (5, 3)], GREEDY, use_tqdm=False)
    assert (good.outputs[0].finish_reason, good.outputs[0].error) == ("length", None)
    assert bad.outputs[0].finish_reason == "error" and "NaN or infinite" in bad.outputs[0].error


def test_logprobs_are_gathered(fake):
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    (output,) = LLM("fake").generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)
    nothing, *of_prompt = output.prompt_logprobs
    assert nothing is None
    completion = output.outputs[0]
    for token, entries in zip([2, 3, *completion.token_ids], of_prompt + completion.logprobs, strict=True):
        assert next(iter(entries)) == token


def test_chat(fake_with_text, tokenizer):
    llm = LLM("fake")
    first, second = ([{"role": "user", "content": text}] for text in ("The sea", "the end"))
    (output,) = llm.chat(first, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == tokenizer.apply_chat_template(first).token_ids
    outputs = llm.chat([first, second], GREEDY, use_tqdm=False)
    prompts = [output.prompt_token_ids for output in outputs]
    assert prompts == [tokenizer.apply_chat_template(messages).token_ids for messages in (first, second)]
    for messages in ("hello", [], [["hello"]], [{"role": "user"}], [{"role": "robot", "content": "x"}], 5):
        with pytest.raises(ValueError, match=r"^messages"):
            llm.chat(messages, GREEDY, use_tqdm=False)


def test_chat_needs_a_tokenizer(fake):
    with pytest.raises(ValueError, match=r"^messages: a chat needs a tokenizer"):
        LLM("fake").chat([{"role": "user", "content": "Hi"}])


BAD_PROMPTS = [
    (5, r"^prompts: 5 is not allowed; it must be a prompt or a list of them$"),
    ([5], r"^prompt: 5 is not allowed; it must be a text, "),
    ([{"text": "a"}], r"^prompt: {'text': 'a'} is not allowed"),
    ([{"prompt_token_ids": "12"}], r"^prompt: .* is not allowed"),
    ([{"prompt_token_ids": [1], "prompt": "a"}], r"^prompt: .* is not allowed"),
    ({"prompt_token_ids": []}, r"^prompt: it is empty"),
    ([{"prompt_token_ids": [1]}, {"prompt_token_ids": [99]}], r"^prompts\[1\]: prompt: token id 99 is not allowed"),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS)
def test_bad_prompts_are_refused_before_anything_runs(fake, prompts, message):
    llm = LLM("fake")
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, use_tqdm=False)
    assert fake.executor.plans == []
    assert_usable(llm)


@pytest.mark.parametrize("params", [5, [GREEDY], [GREEDY, GREEDY, GREEDY], [GREEDY, 5], {"max_tokens": 5}])
def test_bad_sampling_params_are_refused(fake, params):
    with pytest.raises(ValueError, match=r"^sampling_params: "):
        LLM("fake").generate([{"prompt_token_ids": [1]}] * 2, params, use_tqdm=False)


def assert_usable(llm: LLM) -> None:
    (output,) = llm.generate({"prompt_token_ids": [7, 8]}, GREEDY, use_tqdm=False)
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == generate_alone([7, 8], GREEDY, 0, 64)
    assert llm._engine.stats().kv_cache_usage == 0


def test_progress_is_shown_on_stderr_unless_turned_off(fake, capsys):
    llm = LLM("fake")
    llm.generate([{"prompt_token_ids": [1]}] * 3, GREEDY)
    out, err = capsys.readouterr()
    assert "3/3" in err and "generating" in err and out == ""
    llm.generate([{"prompt_token_ids": [1]}] * 3, GREEDY, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


def interrupting(times: int):
    """A model that is once hit by Ctrl-C within its fourth token, and so often."""
    hits = [signal.SIGINT] * times

    def next_token(token_ids: list[int], seed: int) -> int:
        while len(token_ids) == 6 and hits:
            os.kill(os.getpid(), hits.pop())
        return random_next_token(token_ids, seed)

    return next_token


INTERRUPTED = SamplingParams(max_tokens=30, ignore_eos=True, seed=1)


def test_ctrl_c_ends_the_requests_and_not_the_llm(fake):
    fake.engine_options["next_token"] = interrupting(1)
    llm = LLM("fake")
    with pytest.raises(KeyboardInterrupt):
        llm.generate([{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}], INTERRUPTED, use_tqdm=False)
    assert len(fake.executor.plans) < 10
    assert llm._engine.stats().num_running == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_usable(llm)


def test_a_second_ctrl_c_does_not_wait_for_the_step(fake):
    fake.engine_options["next_token"] = interrupting(2)
    llm = LLM("fake")
    with pytest.raises(KeyboardInterrupt):
        llm.generate({"prompt_token_ids": [1, 2]}, INTERRUPTED, use_tqdm=False)
    assert fake.executor.closed == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(RuntimeError, match=r"^this LLM has failed and is closed: KeyboardInterrupt$"):
        llm.generate({"prompt_token_ids": [1]}, GREEDY)


def test_another_thread_may_use_it_and_another_handler_stays(fake):
    llm = LLM("fake")
    done: list[bool] = []

    def use() -> None:
        assert_usable(llm)
        done.append(True)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert done == [True]

    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        fake.engine_options["next_token"] = interrupting(1)
        (output,) = LLM("fake").generate({"prompt_token_ids": [1, 2]}, INTERRUPTED, use_tqdm=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (seen, len(output.outputs[0].token_ids)) == ([signal.SIGINT], 30)


def test_an_error_outside_a_step_ends_the_requests_and_not_the_llm(fake, monkeypatch):
    llm = LLM("fake")

    def fail(*args):
        raise OSError("stderr is full")

    with monkeypatch.context() as patch:
        patch.setattr("moe_runtime.types.outputs.Completion.add", fail)
        with pytest.raises(OSError, match="stderr is full"):
            llm.generate([{"prompt_token_ids": [1]}] * 3, INTERRUPTED, use_tqdm=False)
    assert_usable(llm)


def test_a_lost_rank_is_the_end(fake, monkeypatch):
    llm = LLM("fake")

    def collect():
        raise RankError("rank 1 was killed by signal 9")

    monkeypatch.setattr(fake.executor, "collect", collect)
    with pytest.raises(RankError, match="rank 1 was killed"):
        llm.generate({"prompt_token_ids": [1]}, GREEDY, use_tqdm=False)
    assert fake.executor.closed == 1
    for call in (lambda: llm.generate("x"), llm.expert_load):
        with pytest.raises(RuntimeError, match=r"^this LLM has failed and is closed: rank 1 was killed by signal 9$"):
            call()


def test_load_and_placement(fake):
    fake.engine_options["num_pages"] = [8, 8]
    llm = LLM("fake")
    llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    load = llm.expert_load()
    assert {phase: counts.sum() for phase, counts in load.tokens.items()} == {"prefill": 2 * 3, "decode": 2 * 3}
    assert llm.placement().slots.shape == (2, 2, 3)


def test_close_may_be_called_twice_and_is_said_afterwards(fake):
    llm = LLM("fake")
    llm.close()
    llm.close()
    assert fake.executor.closed == 1
    for call in (lambda: llm.generate("x"), lambda: llm.chat([{"role": "user", "content": "x"}]), llm.expert_load):
        with pytest.raises(RuntimeError, match=r"^this LLM is closed$"):
            call()


def test_the_ranks_end_with_the_block_or_with_the_object(fake):
    with LLM("fake") as llm:
        assert_usable(llm)
    assert fake.executor.closed == 1
    llm = LLM("fake")
    executor = fake.executor
    del llm
    gc.collect()
    assert executor.closed == 1


def test_without_parameters_those_of_the_model_are_used_and_an_object_is_taken_whole(fake, monkeypatch):
    llm = LLM("demo")
    engine = llm._engine
    engine.model_config = dataclasses.replace(engine.model_config, default_sampling={"temperature": 0.0, "top_k": 3})
    used = []
    add_request = engine.add_request
    monkeypatch.setattr(engine, "add_request", lambda *args, **more: (used.append(args[2]), add_request(*args, **more)))
    prompt = {"prompt_token_ids": [1, 2, 3]}
    llm.generate(prompt, use_tqdm=False)
    llm.generate(prompt, SamplingParams(top_p=0.5), use_tqdm=False)
    llm.generate([prompt], [SamplingParams()], use_tqdm=False)
    assert used == [SamplingParams(temperature=0.0, top_k=3), SamplingParams(top_p=0.5), SamplingParams()]
