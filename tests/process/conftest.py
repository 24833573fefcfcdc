"""Fixtures for tests that drive real processes."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from banger.guest.agent import Agent
from banger.guest.binary import agent_binary
from tests.process.agents import AgentProcess, Fifo, agent_process

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", params=["release", "sanitizers"])
def agent_program(request: pytest.FixtureRequest) -> Path:
    """The agent as it is shipped, and with address and undefined behaviour sanitizers."""
    if request.param == "release":
        subprocess.run([sys.executable, _ROOT / "scripts/build_agent.py"], check=True)
        return agent_binary({"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine])
    if not _compiler_has_sanitizers():
        pytest.skip("the C compiler has no address sanitizer (Debian: apt-get install gcc)")
    with open(_ROOT / "agent/Makefile") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test workers build it too
        subprocess.run(["make", "-s", "-C", _ROOT / "agent", "asan"], check=True)
    return _ROOT / "agent/build/banger-agent-asan"


def _compiler_has_sanitizers() -> bool:
    if shutil.which("cc") is None or shutil.which("make") is None:
        return False
    command = ["cc", "-fsanitize=address,undefined", "-x", "c", "-o", "/dev/null", "-"]
    return subprocess.run(command, input=b"int main(void) {}", stderr=subprocess.DEVNULL).returncode == 0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def process(agent_program: Path, tmp_path: Path, log: Path) -> Iterator[AgentProcess]:
    with agent_process(agent_program, tmp_path, log) as running:
        yield running


@pytest.fixture
async def agent(process: AgentProcess) -> AsyncIterator[Agent]:
    async with process.connected() as connected:
        yield connected


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    with contextlib.closing(Fifo(tmp_path / "fifo")) as pipe:
        yield pipe


@pytest.fixture
def no_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither logins nor proxies."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "no-logins"))
