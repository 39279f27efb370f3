"""llama.cpp as a driver: `python -m peers.llamacpp_engine GGUF_FILE THREADS`.

It uses llama-cpp-python's C functions. One batch holds all sequences, as in llama.cpp's own server and batched
benchmark. Logits are computed only for the last token of each prompt.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from typing import Any

import llama_cpp
import numpy as np

from peers.protocol import Stopwatch, serve, take_stdout

Prompts = list[list[int]]
N_BATCH = 4096  # tokens per call
N_UBATCH = 2048  # tokens that the kernels process at once
CONTEXT_STEP = 256


class LlamaCppEngine:
    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.threads = threads
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self._shape: tuple[int, int] | None = None
        self._context: Any = None
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)

    def info(self) -> dict[str, Any]:
        system = llama_cpp.llama_print_system_info().decode()
        return {"version": llama_cpp.__version__, "system": system, "n_batch": N_BATCH, "n_ubatch": N_UBATCH}

    def generate(self, prompts: Prompts, new_tokens: int) -> dict[str, float]:
        context = self._context_for(len(prompts), len(prompts[0]) + new_tokens)
        everyone = range(len(prompts))
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        last = [0] * len(prompts)
        watch = Stopwatch(len(prompts))
        for first in range(0, len(rows), N_BATCH):
            part = rows[first : first + N_BATCH]
            done = [row[2] for row in part if row[3]]
            for sequence, logits_V in zip(done, self._decode(context, part), strict=True):
                last[sequence] = int(logits_V.argmax())
            watch.step(done)
        for position in range(len(prompts[0]), len(prompts[0]) + new_tokens - 1):
            rows = [(last[sequence], position, sequence, True) for sequence in everyone]
            last = [int(logits_V.argmax()) for logits_V in self._decode(context, rows)]
            watch.step(everyone)
        return watch.result()

    def logprobs(self, prompts: Prompts, top: int) -> list[Any]:
        """See `OursEngine.logprobs`."""
        found = []
        for prompt in prompts:
            logits_TV = self._all_logits(prompt)[:-1].astype(np.float64)
            shifted_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
            logprobs_TV = shifted_TV - np.log(np.exp(shifted_TV).sum(axis=1, keepdims=True))
            best = np.argsort(-logprobs_TV, axis=1)[:, :top]
            ids = np.concatenate([np.array(prompt[1:])[:, None], best], axis=1)
            values = np.take_along_axis(logprobs_TV, ids, axis=1)
            found.append([list(pair) for pair in zip(ids.tolist(), values.tolist(), strict=True)])
        return found

    def write_logits(self, prompt: list[int], file: str) -> None:
        """Write the logits of all positions, float32 `[len(prompt), V]`, as a `.npy` file."""
        np.save(file, self._all_logits(prompt))

    def _all_logits(self, prompt: list[int]) -> np.ndarray:
        context = self._context_for(1, len(prompt))
        return np.stack(self._decode(context, [(token, i, 0, True) for i, token in enumerate(prompt)]))

    def _decode(self, context: Any, rows: Iterable[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """Run (token, position, sequence, wanted) rows; logits of the wanted rows, valid until the next call."""
        batch, wanted, count = self._batch, [], 0
        for count, (token, position, sequence, want) in enumerate(rows, start=1):
            index = count - 1
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = want
            if want:
                wanted.append(index)
        batch.n_tokens = count
        if (code := llama_cpp.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama_decode failed with {code}")
        llama_cpp.llama_synchronize(context)
        kind = ctypes.POINTER(ctypes.c_float * self.vocab_size)
        logits = [llama_cpp.llama_get_logits_ith(context, index) for index in wanted]
        return [np.ctypeslib.as_array(ctypes.cast(row, kind).contents) for row in logits]

    def _context_for(self, sequences: int, length: int) -> Any:
        """An empty context for `sequences` sequences of this length."""
        shape = (sequences, -(-length // CONTEXT_STEP) * CONTEXT_STEP)
        if shape != self._shape:
            if self._context is not None:
                llama_cpp.llama_free(self._context)
            params = llama_cpp.llama_context_default_params()
            params.n_seq_max, params.n_ctx = sequences, shape[0] * shape[1]
            params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
            params.n_threads = params.n_threads_batch = self.threads
            self._context = llama_cpp.llama_init_from_model(self.model, params)
            if not self._context:
                raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences of {length} tokens")
            self._shape = shape
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        return self._context


def main() -> None:
    answers = take_stdout()
    path, threads = sys.argv[1:]
    engine = LlamaCppEngine(path, int(threads))
    serve(answers, {name: getattr(engine, name) for name in ("info", "generate", "logprobs", "write_logits")})


if __name__ == "__main__":
    main()
