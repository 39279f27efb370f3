"""One server with a real engine for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from real_server import RealServer, start_real_server


@pytest.fixture(scope="package")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    server, real = start_real_server(tmp_path_factory.mktemp("real"))
    with server:
        yield real
