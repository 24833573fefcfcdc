"""Programs are asked for what they are once, and again when they are others."""

import os
import subprocess
import threading
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.vmm import detect, programs
from banger.vmm.ask import ask

TIMEOUT = 60.0


def program(path: Path, says: str, status: int = 0) -> Path:
    """A program that says something and leaves a line in `asked` beside it."""
    new = path.with_suffix(".new")
    new.write_text(f"#!/bin/sh\necho \"$@\" >>{path.parent}/asked\necho '{says}'\nexit {status}\n")
    new.chmod(0o755)
    new.rename(path)
    return path


def asked(directory: Path) -> list[str]:
    return (directory / "asked").read_text().splitlines()


def test_once_for_each_file_and_question(tmp_path: Path) -> None:
    path = str(program(tmp_path / "tool", "one"))
    assert [ask(path, "--version"), ask(path, "--version"), ask(path, "--help", "me")] == ["one\n"] * 3
    assert asked(tmp_path) == ["--version", "--help me"]
    program(tmp_path / "tool", "two")  # an upgrade
    assert [ask(path, "--version"), ask(path, "--version")] == ["two\n"] * 2
    os.utime(path, ns=(1, 1))
    ask(path, "--version")
    assert asked(tmp_path).count("--version") == 3


def test_failures_are_not_remembered(tmp_path: Path) -> None:
    path = str(program(tmp_path / "tool", "no", status=1))
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            ask(path, "--version")
    assert len(asked(tmp_path)) == 2
    with pytest.raises(FileNotFoundError):
        ask(str(tmp_path / "none"), "--version")


def test_what_was_looked_up_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(
        firecracker=str(program(tmp_path / "firecracker", "Firecracker v1.12.1")),
        jailer=str(program(tmp_path / "jailer", "Jailer v1.12.1")),
    )
    thread = threading.Thread(target=programs.look_up, args=(config, "firecracker"))
    thread.start()
    thread.join(TIMEOUT)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("a program was run"))
    assert programs.firecracker(config).version == (1, 12, 1)
    assert programs.jailer(config).version == (1, 12, 1)


def test_a_missing_program_matters_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = str(program(tmp_path / "firecracker", "Firecracker v1.12.1"))
    without = Config(firecracker=found, jailer=str(tmp_path / "none"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    programs.look_up(without, "firecracker")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    programs.look_up(Config(firecracker=found, jailer="off"), "firecracker")
    with pytest.raises(BangerError, match="is not a program"):
        programs.look_up(without, "firecracker")
    programs.look_up(Config(firecracker=str(tmp_path / "none")), "qemu")
    with pytest.raises(BangerError, match="is not a program"):
        programs.look_up(Config(firecracker=str(tmp_path / "none")), "firecracker")


def test_an_alias_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    name = detect.emulator("amd64")
    program(tmp_path / name, "q35   Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)\nnone  empty machine")
    assert [detect.versioned_machine("amd64", alias) for alias in ("q35", "q35", "none")] == [
        *("pc-q35-7.2", "pc-q35-7.2", "none")
    ]
    assert len(asked(tmp_path)) == 1
    program(tmp_path / name, "q35   Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-9.0)")
    assert detect.versioned_machine("amd64", "q35") == "pc-q35-9.0"
    program(tmp_path / name, "broken", status=1)
    with pytest.raises(BangerError, match="cannot be run") as caught:
        detect.versioned_machine("amd64", "q35")
    assert caught.value.code is Code.UNSUPPORTED
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(BangerError) as caught:
        detect.versioned_machine("amd64", "q35")
    assert caught.value.code is Code.MISSING_TOOL
