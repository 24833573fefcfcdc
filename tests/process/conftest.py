"""Fixtures for tests that drive real processes."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
