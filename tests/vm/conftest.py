"""Fixtures of the guest tests: one daemon a module, with kernel and images that all modules share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.config import Config
from tests.daemons import debian_kernel, running_daemon
from tests.images import cached_image, minimal_image
from tests.vm.host import IMAGE, KERNEL, Host

# a state that holds kernel and image, where they can neither be pulled nor built: test_nested says so
_GIVEN = os.environ.get("BANGER_TEST_STATE", "")


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel debian-cloud, pulled once."""
    if _GIVEN:
        return Path(_GIVEN, "kernels", KERNEL)
    return debian_kernel(tmp_path_factory)


@pytest.fixture(scope="session")
def image() -> Path:
    """The image debian-bookworm-minimal, built once."""
    if _GIVEN:
        return Path(_GIVEN, "images", IMAGE)
    return minimal_image() / IMAGE


@pytest.fixture(scope="session")
def development_image() -> Path:
    """The default image, built once."""
    name = Config().default_image
    return cached_image(name) / name


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, kernel: Path, image: Path) -> Iterator[Host]:
    """A daemon with that kernel and image, the image being its default; nobody listens at its default registry."""
    config = f'default_image = "{IMAGE}"\nvcpu = 1\nmemory = {512 << 20}\ndefault_registry = "127.0.0.1:1"\n'
    with running_daemon(tmp_path_factory.mktemp("host"), entries=[kernel, image], config=config) as daemon:
        yield Host(daemon)


@pytest.fixture(scope="module")
def guest(host: Host) -> str:
    """The name of a VM that runs as long as the module's tests."""
    host.ok("vm", "run", "-d", "--name", "guest", "--", "sleep", "infinity")
    return "guest"
