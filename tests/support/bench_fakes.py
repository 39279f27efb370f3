"""Fake engines for tests of the benchmark."""

from __future__ import annotations

from serve_fakes import FakeEngine


class BenchEngine(FakeEngine):
    """A fake engine with a vocabulary and everything that a report contains about an engine."""

    def health(self):
        return super().health() | {"dtype": "float32", "device": "cpu", "max_model_len": self.max_model_len}


class KnownVocabulary(BenchEngine):
    def health(self):
        return super().health() | {"vocab_size": 1000}
