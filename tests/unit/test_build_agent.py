"""scripts/build_agent.py: what it compiles, when it compiles again, and how it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILD_AGENT = Path(__file__).parents[2] / "scripts/build_agent.py"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with a small agent, older than anything compiled from it."""
    for directory in ("scripts", "agent", "src/banger"):
        (tmp_path / directory).mkdir(parents=True)
    shutil.copy(BUILD_AGENT, tmp_path / "scripts")
    (tmp_path / "agent/answer.h").write_text("#define ANSWER 42\n")
    (tmp_path / "agent/main.c").write_text('#include "answer.h"\nint main(void) { return ANSWER; }\n')
    for path in (tmp_path / "scripts/build_agent.py", tmp_path / "agent/answer.h", tmp_path / "agent/main.c"):
        os.utime(path, (0, 0))
    return tmp_path


def build(tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, tree / "scripts/build_agent.py", *options], capture_output=True, text=True)


def built(tree: Path) -> list[Path]:
    return sorted((tree / "src/banger/_agent").glob("*"))


def test_the_agent_is_static_and_runs(tree: Path) -> None:
    assert build(tree).returncode == 0
    (agent,) = built(tree)
    assert agent.name.startswith("banger-agent-")
    assert subprocess.run([agent]).returncode == 42
    # a program that names no interpreter is not linked to any shared library (elf(5), PT_INTERP)
    assert b"/ld-" not in agent.read_bytes()[:4096]


def test_it_is_compiled_again_only_when_a_source_is_newer(tree: Path) -> None:
    build(tree)
    (agent,) = built(tree)
    first = agent.stat()
    build(tree)
    assert agent.stat().st_ino == first.st_ino

    header = tree / "agent/answer.h"
    header.write_text("#define ANSWER 43\n")
    os.utime(header, (first.st_mtime + 1, first.st_mtime + 1))
    build(tree)
    assert subprocess.run([agent]).returncode == 43


def test_a_compiler_error_leaves_the_old_agent(tree: Path) -> None:
    build(tree)
    (agent,) = built(tree)
    source = tree / "agent/main.c"
    source.write_text("int main(void) { return unknown; }\n")
    os.utime(source, (agent.stat().st_mtime + 1,) * 2)
    failed = build(tree)
    assert failed.returncode != 0
    assert "the guest agent does not compile" in failed.stderr
    assert built(tree) == [agent]
    assert subprocess.run([agent]).returncode == 42


def test_an_empty_agent_directory_is_named(tree: Path) -> None:
    (tree / "agent/main.c").unlink()
    failed = build(tree)
    assert failed.returncode == 1
    assert f"{tree / 'agent'} holds no C sources" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_warnings_stop_the_lint_and_no_build(tree: Path) -> None:
    assert build(tree, "--lint").returncode == 0
    source = tree / "agent/main.c"
    source.write_text("int main(void) { int unused; return 42; }\n")
    failed = build(tree, "--lint")
    assert failed.returncode == 1
    assert "unused" in failed.stderr
    assert "does not compile without warnings" in failed.stderr
    assert built(tree) == []
    done = build(tree)
    assert done.returncode == 0
    assert done.stderr == done.stdout == ""
    assert subprocess.run(built(tree)).returncode == 42


def test_the_lint_uses_every_compiler_at_hand(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("mine", "gcc", "clang"):
        (tools / name).write_text(f"#!/bin/sh\necho {name} >>{tools}/ran\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("CC", "mine")
    assert build(tree, "--lint").returncode == 0
    assert sorted((tools / "ran").read_text().split()) == ["clang", "gcc", "mine"]
