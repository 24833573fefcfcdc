"""The CPU that emulated guests get: what the QEMU at hand offers, without flags that mean nothing alone."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from banger.vmm import detect, qemu

_ERMS_AND_ITS_KIND = ("erms", "fsrm", "fzrm", "fsrs", "fsrc")
_LISTING = "Available CPUs:\\nx86 max\\n\\nRecognized CPUID flags:\\n  3dnow erms {flags}\\n  la57 xsave\\n"


def expanded(cpu: str) -> dict[str, bool]:
    """The properties that a CPU model has in the real QEMU, as it says itself."""
    model, *settings = cpu.split(",")
    properties = {name: value == "on" for name, _, value in (setting.partition("=") for setting in settings)}
    question = {"type": "full", "model": {"name": model, "props": properties}}
    commands = [
        {"execute": "qmp_capabilities"},
        {"execute": "query-cpu-model-expansion", "arguments": question},
        {"execute": "quit"},
    ]
    done = subprocess.run(
        [detect.emulator("amd64"), "-machine", "none", "-accel", "tcg", "-display", "none", "-qmp", "stdio"],
        input="\n".join(json.dumps(command) for command in commands),
        capture_output=True,
        text=True,
        check=True,
    )
    (reply,) = (
        answer for line in done.stdout.splitlines() if "model" in (answer := json.loads(line).get("return", {}))
    )
    found: dict[str, bool] = reply["model"]["props"]
    return found


@pytest.mark.skipif(shutil.which(detect.emulator("amd64")) is None, reason="QEMU is not installed")
def test_without_erms_there_is_no_other_flag_of_its_kind() -> None:
    _, cpu, _, _ = qemu.hardware("amd64", "tcg")
    found = expanded(cpu)
    assert not any(found.get(flag, False) for flag in _ERMS_AND_ITS_KIND)
    assert found["xsave"]
    assert not found["la57"]


def emulator(directory: Path, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    program = directory / detect.emulator("amd64")
    program.write_text(f"#!/bin/sh\nprintf '{_LISTING.format(flags=flags)}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("flags", "added"),
    [("avx", ""), ("fsrm", ",fsrm=off"), ("fsrc fsrm fsrs fzrm", ",fsrm=off,fzrm=off,fsrs=off,fsrc=off")],
)
def test_only_flags_that_qemu_knows_are_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, added: str
) -> None:
    emulator(tmp_path, monkeypatch, flags)
    assert qemu.hardware("amd64", "tcg")[1] == f"max,la57=off,erms=off{added}"
    assert qemu.hardware("amd64", "kvm")[1] == "host"


def test_a_vm_of_an_older_qemu_gets_what_the_newer_one_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator(tmp_path, monkeypatch, "fsrm fzrm")
    assert qemu.without_string_flags("max,la57=off,erms=off", "amd64") == "max,la57=off,erms=off,fsrm=off,fzrm=off"
    assert qemu.without_string_flags("max,erms=off,fsrm=off,fzrm=off", "amd64") == "max,erms=off,fsrm=off,fzrm=off"
    assert qemu.without_string_flags("host", "amd64") == "host"
