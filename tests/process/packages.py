"""Wheels of banger, of any version, for the tests of installing and updating."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from banger.guest.binary import agent_binary
from banger.vmm.detect import host_arch

ROOT = Path(__file__).parents[2]
TIMEOUT = 110.0  # seconds that nothing here takes; only a hang does


def sources(directory: Path, version: str = "") -> Path:
    """A copy of what banger's wheels are built of, with the agent that is there already; maybe of another version."""
    directory.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py"):
        shutil.copy(ROOT / name, directory)
    (directory / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/build_agent.py", directory / "scripts")
    shutil.copytree(ROOT / "agent", directory / "agent", ignore=shutil.ignore_patterns("build"))
    shutil.copytree(ROOT / "src", directory / "src", ignore=shutil.ignore_patterns("__pycache__"))
    os.utime(directory / "src/banger/_agent" / agent_binary(host_arch()).name)  # newer than its sources
    if version:
        (directory / "src/banger/__init__.py").write_text(f'"""banger."""\n\n__version__ = "{version}"\n')
    return directory


def build(source: Path, target: Path) -> Path:
    """Build the wheel of a source tree for this machine into a directory."""
    before = set(target.glob("*.whl"))
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(target)]
    subprocess.run(command, cwd=source, check=True, stderr=subprocess.DEVNULL)
    (wheel,) = set(target.glob("*.whl")) - before
    return wheel


class User:
    """Somebody with a home directory, who runs programs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        names = {"CONFIG": ".config", "STATE": ".local/state", "CACHE": ".cache", "DATA": ".local/share"}
        directories = {f"XDG_{name}_HOME": str(home / path) for name, path in names.items()}
        self.environment: Mapping[str, str] = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("PYTHON", "VIRTUAL_ENV", "DBUS_"))
            },
            **directories,
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "PATH": f"{home}/.local/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            # what is downloaded is shared with whoever runs the tests
            "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache/uv")),
            "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache/pip")),
            "PIPX_HOME": str(home / ".local/share/pipx"),
            "PIPX_BIN_DIR": str(home / ".local/bin"),
        }
        (home / "run").mkdir(mode=0o700, parents=True)
        self.config = home / ".config/banger/config.toml"
        self.config.parent.mkdir(parents=True)

    def run(self, *command: str, launcher: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
        """Run a command, with its output."""
        return subprocess.run(
            [*launcher, *command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            cwd=self.home,
        )

    def banger(self, *arguments: str) -> tuple[int, str, str]:
        """Run the banger that is installed in ~/.local/bin."""
        done = self.run(f"{self.home}/.local/bin/banger", *arguments)
        return done.returncode, done.stdout, done.stderr
