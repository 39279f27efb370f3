"""Lengths, options and the resulting requests of a workload."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.bench.options import BenchOptions, Lengths
from moe_runtime.bench.workload import check_lengths, make_warmups, make_workload, read_text


@given(low=st.integers(1, 500), width=st.integers(0, 500), seed=st.integers(0, 2**32))
def test_uniform_lengths(low, width, seed):
    draws = [Lengths.parse("x", f"{low}-{low + width}").draw(random.Random(seed + n)) for n in range(50)]
    assert all(low <= draw <= low + width for draw in draws)
    assert Lengths.parse("x", str(low)).draw(random.Random(seed)) == low


def test_both_bounds_are_drawn():
    numbers, lengths = random.Random(), Lengths.parse("x", "3-5")
    assert {lengths.draw(numbers) for _ in range(200)} == {3, 4, 5}


def test_lognormal_lengths():
    numbers, lengths = random.Random(5), Lengths.parse("x", "lognormal:200:0.5")
    draws = [lengths.draw(numbers) for _ in range(4000)]
    assert statistics.median(draws) == pytest.approx(200, rel=0.06)
    assert statistics.stdev(map(math.log, draws)) == pytest.approx(0.5, rel=0.1)
    bounded = Lengths.parse("x", "lognormal:200:0.5:100-300")
    draws = [bounded.draw(numbers) for _ in range(500)]
    assert min(draws) == 100 and max(draws) == 300


@pytest.mark.parametrize(
    "text", ["", "0", "a", "5-3", "0-3", "1.5", "-1", "lognormal", "lognormal:0:1", "lognormal:9:1:5-2", "normal:3:1"]
)
def test_lengths_that_are_none(text):
    with pytest.raises(ValueError, match=r"^input_len: '.*' is not allowed; "):
        BenchOptions(input_len=text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"request_rate": 0}, "request_rate: "),
        ({"request_rate": []}, "request_rate: "),
        ({"request_rate": ["fast"]}, "request_rate: "),
        ({"request_rate": [math.nan]}, "request_rate: "),
        ({"num_prompts": 0}, "num_prompts: 0 is not allowed"),
        ({"max_concurrency": 0}, "max_concurrency: 0 is not allowed"),
        ({"num_warmups": -1}, "num_warmups: -1 is not allowed"),
        ({"request_timeout": 0}, "request_timeout: 0 is not allowed"),
        ({"url": "localhost:8000"}, "url: 'localhost:8000' is not allowed"),
        ({"output": ["x.gif"]}, "output: 'x.gif' is not allowed; it must end in .json or .png"),
        ({"output": ["/no/such/x.png"]}, "output: '/no/such/x.png' is not allowed; it must be in a folder"),
        ({"output_len": "many"}, "output_len: 'many' is not allowed"),
    ],
)
def test_options_that_are_not_allowed(values, message):
    with pytest.raises(ValueError) as caught:
        BenchOptions(**values)
    assert str(caught.value).startswith(message)


def test_one_value_passes_for_a_list():
    options = BenchOptions(request_rate=4, output="x.png")
    assert options.request_rate == (4.0,) and options.output == ("x.png",)


def test_the_seed_gives_the_workload():
    options = BenchOptions(request_rate=(2.0,), input_len="5-50", output_len="1-9", num_prompts=20, seed=7)
    again = BenchOptions(request_rate=(2.0,), input_len="5-50", output_len="1-9", num_prompts=20, seed=8)
    jobs = make_workload(options, 0, range(1000))
    assert jobs == make_workload(options, 0, range(1000)) != make_workload(again, 0, range(1000))


def test_rates_share_lengths_and_gaps_but_no_prompt():
    options = BenchOptions(request_rate=(2.0, 8.0, math.inf), input_len="5-50", output_len="1-9", num_prompts=30)
    slow, fast, at_once = (make_workload(options, index, range(1000)) for index in range(3))
    warm = make_warmups(options, range(1000))
    for other in (fast, at_once):
        assert [len(job.prompt) for job in other] == [len(job.prompt) for job in slow]
        assert [job.output_len for job in other] == [job.output_len for job in slow]
    assert [job.arrival for job in slow] == pytest.approx([4 * job.arrival for job in fast])
    assert {job.arrival for job in at_once} == {0.0} == {job.arrival for job in warm}
    assert len(warm) == options.num_warmups
    prompts = [tuple(job.prompt) for jobs in (slow, fast, at_once, warm) for job in jobs]
    assert len(set(prompts)) == len(prompts)


def test_arrivals_are_poisson():
    """Exponential gaps: mean and deviation are one over the rate."""
    jobs = make_workload(BenchOptions(request_rate=(4.0,), num_prompts=4000, input_len="1"), 0, range(9))
    gaps = [after.arrival - before.arrival for before, after in itertools.pairwise(jobs)]
    assert jobs[0].arrival == 0.0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.12)


def test_random_prompts_use_the_whole_vocabulary():
    jobs = make_workload(BenchOptions(input_len="400"), 0, range(50))
    assert {token for job in jobs for token in job.prompt} == set(range(50))


class Words:
    def encode(self, text):
        return [len(word) for word in text.split()]


def test_prompts_are_cut_out_of_a_text(tmp_path):
    file = tmp_path / "text.txt"
    words = ["x" * size for size in range(1, 41)]
    file.write_text(" ".join(words))
    options = BenchOptions(text=str(file), input_len="10-40", num_prompts=50)
    tokens = read_text(str(file), Words(), options)
    for job in make_workload(options, 0, tokens):
        first = job.prompt[0]
        assert job.prompt == list(range(first, first + len(job.prompt)))
    with pytest.raises(ValueError, match=r"has 40 tokens, but the longest prompt needs 41"):
        read_text(str(file), Words(), BenchOptions(input_len="41"))
    with pytest.raises(ValueError, match=r"^text: not allowed without a tokenizer"):
        read_text(str(file), None, options)
    file.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=r"is not UTF-8"):
        read_text(str(file), Words(), options)


def test_requests_must_fit_the_context():
    jobs = make_workload(BenchOptions(input_len="90", output_len="10"), 0, range(9))
    check_lengths(jobs, 100)
    with pytest.raises(ValueError, match=r"90 prompt tokens and 10 output tokens, but max_model_len is 99"):
        check_lengths(jobs, 99)
