"""What holds for every test: markers by folder, time limits, hypothesis settings."""

import signal
from pathlib import Path

import hypothesis
import pytest

from tests.firecracker import FirecrackerBinaries, fetch_binaries

# no test asserts speed, so none may fail for it on a busy machine
hypothesis.settings.register_profile("banger", deadline=None)
hypothesis.settings.load_profile("banger")

# a run in the background of a shell may have been started with these ignored, and so would be all that tests start
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

_GUEST_TESTS = Path(__file__).parent / "vm"
_GUEST_TIMEOUT_SECONDS = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_GUEST_TESTS):
            item.add_marker(pytest.mark.vm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_GUEST_TIMEOUT_SECONDS))


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Names for data by argument and number: compressed data may differ from one worker of a test run to the next."""
    return argname if isinstance(val, bytes) and len(val) > 16 else None


@pytest.fixture(scope="session")
def firecracker_binaries() -> FirecrackerBinaries:
    """The real Firecracker and jailer; every user may read and execute them."""
    return fetch_binaries()
