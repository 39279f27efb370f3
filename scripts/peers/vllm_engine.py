"""vLLM for CPUs as a driver: `python -m peers.vllm_engine MODEL MAX_NUM_SEQS MAX_MODEL_LEN`, compiled (its default)."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import vllm
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from peers.protocol import Stopwatch, serve, take_stdout

Prompts = list[list[int]]
MAX_NUM_BATCHED_TOKENS = 4096


class VLLMEngine:
    def __init__(self, path: str, max_num_seqs: int, max_model_len: int) -> None:
        self.llm = LLM(
            model=path,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        )
        self._ids = map(str, itertools.count())

    def info(self) -> dict[str, Any]:
        return {"version": vllm.__version__}

    def generate(self, prompts: Prompts, new_tokens: int) -> dict[str, float]:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine, number = self.llm.llm_engine, {}
        watch = Stopwatch(len(prompts))
        for index, prompt in enumerate(prompts):
            request_id = next(self._ids)
            number[request_id] = index
            engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = [output for output in engine.step() if output.outputs[0].token_ids]
            if outputs:
                watch.step(number[output.request_id] for output in outputs)
        return watch.result()

    def logprobs(self, prompts: Prompts, top: int) -> list[Any]:
        """See `OursEngine.logprobs`."""
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=top)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [
            [[list(position), [entry.logprob for entry in position.values()]] for position in out.prompt_logprobs[1:]]
            for out in outputs
        ]


def main() -> None:
    answers = take_stdout()
    path, max_num_seqs, max_model_len = sys.argv[1:]
    engine = VLLMEngine(path, int(max_num_seqs), int(max_model_len))
    serve(answers, {name: getattr(engine, name) for name in ("info", "generate", "logprobs")})


if __name__ == "__main__":
    main()
