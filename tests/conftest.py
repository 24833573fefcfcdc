"""What holds for every test: markers by folder, time limits, hypothesis settings."""

from pathlib import Path

import hypothesis
import pytest

# no test asserts speed, so none may fail for it on a busy machine
hypothesis.settings.register_profile("banger", deadline=None)
hypothesis.settings.load_profile("banger")

_GUEST_TESTS = Path(__file__).parent / "vm"
_GUEST_TIMEOUT_SECONDS = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_GUEST_TESTS):
            item.add_marker(pytest.mark.vm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_GUEST_TIMEOUT_SECONDS))
