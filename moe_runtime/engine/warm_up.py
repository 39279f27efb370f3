"""Prompts that the engine runs before it is ready, so that the first request waits no longer than later ones. No torch.

What runs for the first time is slow: code and tables are read from disk, kernels that are compiled on first use are
compiled, ranks open their connections for a collective, allocators take their memory.
"""

from __future__ import annotations

from moe_runtime.types.sampling_params import SamplingParams

SHORT, LONG = 8, 72  # tokens of a prompt; above 64 tokens on a rank, `auto` takes another dispatcher
STRIDE = 7919  # of token ids
OUTPUT = 3  # tokens: decode rows beside a prompt, and alone
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
SAMPLED = SamplingParams(
    temperature=0.8, top_p=0.9, top_k=50, repetition_penalty=1.1, logprobs=1, seed=0, max_tokens=OUTPUT, ignore_eos=True
)


def warm_up_requests(num_ranks: int, vocab_size: int, max_model_len: int) -> list[tuple[list[int], SamplingParams]]:
    """A long sampled and a short greedy prompt for each rank, of tokens from all over the vocabulary."""
    room = max_model_len - 1  # for the prompt; one token of output
    kinds = [(min(LONG, room), SAMPLED), (min(SHORT, room), GREEDY)] if room else []
    return [
        ([(rank + position) * STRIDE % vocab_size for position in range(length)], params)
        for length, params in kinds
        for rank in range(num_ranks)
    ]
