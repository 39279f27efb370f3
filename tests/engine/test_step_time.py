"""Prompt budgets from simulated step times: no clock is read."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.engine.step_time import LEAST_CHUNK, REFRESH, StepTime

Seconds = Callable[[int, int, int], float]  # of decode rows, prompt tokens, and the prompt's tokens before them


def machine(decode: float = 0.01, row: float = 0.001, fixed: float = 0.005, token: float = 0.0005, growth: float = 0):
    """A machine whose chunks take a fixed time, a time per token, and more with each token of context."""

    def seconds(num_decode: int, num_prompt: int, start: int) -> float:
        time = (decode + row * num_decode) * (num_decode > 0)
        return time + (fixed + num_prompt * token * (1 + growth * start)) * (num_prompt > 0)

    return seconds


def prefill(times: StepTime, seconds: Seconds, num_decode: int, length: int, most: int = 2048) -> list[float]:
    """Run a prompt beside decode rows, with two steps in flight. Returns the times of the steps with both."""
    found, planned, done = [], [], 0
    while done < length or planned:
        while len(planned) < 2 and done < length:
            budget = times.prompt_budget(num_decode)
            count = min(length - done, most if budget is None else budget)
            times.planned(num_decode, count)
            planned.append((count, seconds(num_decode, count, done)))
            done += count
        count, spent = planned.pop(0)
        times.took(spent)
        if count:
            found.append(spent)
        assert len(found) <= length, "a prompt makes no progress"
    return found


def decode(times: StepTime, seconds: Seconds, num_decode: int, count: int = 5) -> None:
    for _ in range(count):
        times.planned(num_decode, 0)
        times.took(seconds(num_decode, 0, 0))


@settings(deadline=None)
@given(
    num_decode=st.integers(1, 64),
    slowdown=st.floats(1.3, 4),
    fixed=st.floats(0, 0.003),
    token=st.floats(1e-5, 1e-4),
)
def test_steps_stay_within_the_bound_and_use_it(num_decode, slowdown, fixed, token):
    seconds = machine(fixed=fixed, token=token)
    times = StepTime(slowdown)
    decode(times, seconds, num_decode)
    bound = slowdown * seconds(num_decode, 0, 0)
    found = prefill(times, seconds, num_decode, 20_000)
    least = seconds(num_decode, LEAST_CHUNK, 20_000) - seconds(num_decode, 0, 0)
    if least > 0.9 * (slowdown - 1) * seconds(num_decode, 0, 0):
        return  # the next test but one
    assert max(found) <= bound
    if len(found) > 60:
        late = found[40:-3]
        assert min(late) > 0.7 * bound, "what the bound allows is used"


def test_chunks_shrink_as_their_context_grows():
    """A token takes 1.5 times as long at the end of the prompt as at its beginning, as on CPUs."""
    seconds = machine(growth=0.5 / 4000)
    times = StepTime(2.0)
    decode(times, seconds, 64)
    bound = 2 * seconds(64, 0, 0)
    assert max(prefill(times, seconds, 64, 4000)) <= bound


def test_noise_of_a_tenth_and_slow_steps_keep_most_steps_within_the_bound():
    rng = random.Random(1)
    quiet = machine(token=0.0002)

    def seconds(*step: int) -> float:
        return quiet(*step) * rng.uniform(0.95, 1.05) * (20 if rng.random() < 0.03 else 1)

    times = StepTime(2.0)
    decode(times, seconds, 8, 20)
    found = prefill(times, seconds, 8, 20_000)
    bound = 2 * quiet(8, 0, 0)
    assert sum(each <= bound for each in found) > 0.9 * len(found)
    assert sum(0.6 * bound <= each for each in found) > 0.7 * len(found)


def test_where_no_chunk_is_small_enough_its_size_is_that_of_the_fixed_cost():
    seconds = machine(decode=0.01, row=0, fixed=0.04, token=0.0005)
    times = StepTime(2.0)
    decode(times, seconds, 1)
    found = prefill(times, seconds, 1, 4000)
    assert sum(found) - 0.01 * len(found) < 2.3 * seconds(0, 4000, 0), "about twice as long as in one piece"
    assert max(found) < 0.01 + 3 * 0.04


@pytest.mark.parametrize(("num_decode", "slowdown"), [(0, 2.0), (8, inf)])
def test_without_decode_rows_or_a_bound_any_number_of_tokens(num_decode, slowdown):
    times = StepTime(slowdown)
    decode(times, machine(), 8)
    assert times.prompt_budget(num_decode) is None


def test_unknown_times_of_decode_rows_are_measured_first():
    times = StepTime(2.0)
    assert times.prompt_budget(8) == 0
    decode(times, machine(), 8, 1)
    assert times.prompt_budget(8) == LEAST_CHUNK
    assert times.prompt_budget(9) == LEAST_CHUNK, "near enough"
    assert times.prompt_budget(16) == 0
    assert times.prompt_budget(1) == 0


def test_times_of_decode_rows_are_measured_again_after_a_while():
    times, seconds = StepTime(2.0), machine()
    decode(times, seconds, 8)
    for _ in range(REFRESH - 1):
        times.planned(8, 20)
        times.took(seconds(8, 20, 0))
    assert times.prompt_budget(8) > 0
    times.planned(8, 20)
    times.took(seconds(8, 20, 0))
    assert times.prompt_budget(8) == 0
    slower = machine(decode=0.02)
    decode(times, slower, 8)
    assert times.decode_seconds(8) == slower(8, 0, 0)


def test_a_step_without_decode_rows_teaches_nothing():
    times = StepTime(2.0)
    decode(times, machine(), 8, 1)
    times.planned(0, 2048)
    times.took(5.0)
    assert times.prompt_budget(8) == LEAST_CHUNK
