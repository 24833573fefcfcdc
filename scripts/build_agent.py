"""Compile the guest agent, agent/*.c, into the package: `make agent` and every wheel and editable install do this.

build_agent.py [ARCH]    compile it for amd64 or arm64, without a word about warnings: compilers learn new ones
build_agent.py --lint    compile it with every compiler at hand, and fail for any warning
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}
MACHINES = {arch: machine for machine, arch in _ARCHES.items()}

ZIGLANG = "ziglang==0.17.1"  # one version, so that everybody who builds a wheel makes the same

_FLAGS = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-O2",
    "-fPIE",
    "-static-pie",
    "-fstack-protector-strong",
    "-D_FORTIFY_SOURCE=2",
    "-ffunction-sections",
    "-Wl,--gc-sections",
    "-Wl,-z,relro,-z,now",
    "-s",
]
_WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# zig links statically for musl by itself, and warns of -static-pie
_ZIG_FLAGS = [flag for flag in _FLAGS if flag != "-static-pie"] + ["-static"]


def host_arch() -> str:
    """amd64 or arm64; SystemExit on any other machine."""
    machine = os.uname().machine
    if machine not in _ARCHES:
        raise SystemExit(f"banger runs on {' and '.join(_ARCHES)}, not on {machine}")
    return _ARCHES[machine]


def system_compiler(arch: str) -> list[str] | None:
    """$CC, else the host's own cc when it is for that architecture, else None: ziglang compiles then."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    return ["cc"] if shutil.which("cc") and arch == host_arch() else None


def output_path(root: Path, arch: str) -> Path:
    """Where the agent for an architecture lies in the source tree `root`."""
    return root / "src/banger/_agent" / f"banger-agent-{arch}"


def build(root: Path, arch: str) -> Path:
    """Compile the agent of the source tree `root` unless it is newer than all it is made of, and return its path.

    Raises SystemExit when there is nothing to compile or the compiler fails, having said why.
    """
    target = output_path(root, arch)
    sources = sorted((root / "agent").glob("*.c"))
    if not sources:
        raise SystemExit(f"{root / 'agent'} holds no C sources: the guest agent cannot be built")
    inputs = [*sources, *(root / "agent").glob("*.h"), Path(__file__)]
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return target

    compiler = system_compiler(arch)
    command = [*compiler, *_FLAGS] if compiler is not None else _zig(arch)
    target.parent.mkdir(exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        status = subprocess.run([*command, "-o", unfinished, *sources]).returncode
        if status != 0:
            raise SystemExit(f"the guest agent does not compile: {shlex.join(command)} ended with status {status}")
        unfinished.rename(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _zig(arch: str) -> list[str]:
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{MACHINES[arch]}-linux-musl", *_ZIG_FLAGS]


def compilers() -> list[list[str]]:
    """The command lines of all C compilers at hand, each once, with the flags of the agent that ships."""
    named = [os.environ.get("CC", "cc"), "gcc", "clang"]
    programs = {os.path.realpath(path): name for name in reversed(named) if (path := shutil.which(name))}
    found = [[name, *_FLAGS] for name in programs.values()]
    return [*found, *([_zig(host_arch())] if importlib.util.find_spec("ziglang") else [])]


def lint(root: Path) -> None:
    """Compile the agent with every compiler at hand; SystemExit for any warning, which the compiler has said."""
    sources = sorted((root / "agent").glob("*.c"))
    with tempfile.TemporaryDirectory() as directory:
        for command in compilers():
            checked = [*command, *_WARNINGS, "-o", f"{directory}/agent", *map(str, sources)]
            if subprocess.run(checked).returncode != 0:
                raise SystemExit(f"the guest agent does not compile without warnings: {shlex.join(command)}")


if __name__ == "__main__":
    source_tree = Path(__file__).resolve().parent.parent
    if sys.argv[1:] == ["--lint"]:
        lint(source_tree)
    else:
        build(source_tree, sys.argv[1] if len(sys.argv) > 1 else host_arch())
