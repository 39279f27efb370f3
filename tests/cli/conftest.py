import pytest
from serve_fakes import FakeEngine


@pytest.fixture
def built(monkeypatch):
    """Engines that the command built: their configurations, and the engines themselves."""
    engines = []

    def build_engine(config):
        engines.append(FakeEngine(config, tokenizer=None) if config.skip_tokenizer_init else FakeEngine(config))
        return engines[-1]

    monkeypatch.setattr("moe_runtime.build.build_engine", build_engine)
    return engines
