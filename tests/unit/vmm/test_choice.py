"""Which VMM a new VM gets, on hosts of every kind, and what keeps Firecracker from being one."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.net import tap
from banger.vmm import choice, detect, programs
from banger.vmm.choice import choose, require_firecracker
from banger.vmm.detect import Acceleration
from tests.firecracker import FirecrackerBinaries

WITH_KVM, WITHOUT = Acceleration("kvm", "/dev/kvm works"), Acceleration("tcg", "/dev/kvm does not exist")


def _program(directory: Path, name: str, says: str) -> str:
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host where KVM works, its device being this file."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(detect, "detect", lambda: WITH_KVM)
    monkeypatch.setattr(choice, "require_kvm", lambda path: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return device


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(b"\x7fELF".ljust(56, b"\0") + b"ARM\x64")
    return path


def test_firecracker_where_kvm_works(kvm: Path, kernel: Path, firecracker_binaries: FirecrackerBinaries) -> None:
    config = Config(firecracker=str(firecracker_binaries.firecracker))
    found = choose(config, kernel=kernel)
    assert (found.driver, found.accelerator) == ("firecracker", "kvm")
    assert firecracker_binaries.version in found.reason
    assert choose(config, "qemu", kernel).driver == "qemu"
    assert choose(Config(vmm="qemu"), kernel=kernel).accelerator == "kvm"


def test_root_gets_what_gives_up_being_root(
    kvm: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch, firecracker_binaries: FirecrackerBinaries
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    config = Config(firecracker=str(firecracker_binaries.firecracker), jailer=str(firecracker_binaries.jailer))
    assert choose(config, kernel=kernel).driver == "firecracker"
    without = dataclasses.replace(config, jailer="off")
    found = choose(without, kernel=kernel)
    assert (found.driver, found.reason) == ("qemu", "Firecracker is not used as root without its jailer")
    assert choose(without, "firecracker", kernel).driver == "firecracker"
    missing = dataclasses.replace(config, jailer="/nonexistent/jailer")
    assert "/nonexistent/jailer is not a program" in choose(missing, kernel=kernel).reason
    with pytest.raises(BangerError, match="/nonexistent/jailer is not a program"):
        choose(missing, "firecracker", kernel)


def test_qemu_where_there_can_be_no_taps(
    kvm: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch, firecracker_binaries: FirecrackerBinaries
) -> None:
    monkeypatch.setattr(tap, "reason_unusable", lambda: "pasta is not installed")
    config = Config(firecracker=str(firecracker_binaries.firecracker))
    assert "pasta is not installed" in choose(config, kernel=kernel, net="user").reason
    assert choose(config, kernel=kernel, net="none").driver == "firecracker"
    with pytest.raises(BangerError, match="cannot have the network 'user' here: pasta is not installed"):
        choose(config, "firecracker", kernel, "user")


def test_more_processors_than_firecracker_has(
    kvm: Path, kernel: Path, firecracker_binaries: FirecrackerBinaries
) -> None:
    config = Config(firecracker=str(firecracker_binaries.firecracker))
    assert choose(config, kernel=kernel, vcpu=32).driver == "firecracker"
    assert "Firecracker has no more than 32 virtual CPUs, not 33" in choose(config, kernel=kernel, vcpu=33).reason
    with pytest.raises(BangerError, match="no more than 32 virtual CPUs"):
        choose(config, "firecracker", kernel, vcpu=40)


def test_qemu_where_firecracker_is_missing(kvm: Path, kernel: Path, tmp_path: Path) -> None:
    found = choose(Config(firecracker=str(tmp_path / "none")), kernel=kernel)
    assert (found.driver, found.accelerator) == ("qemu", "kvm")
    assert f"{tmp_path / 'none'} is not a program" in found.reason


def test_emulation_where_kvm_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(detect, "detect", lambda: WITHOUT)
    found = choose(Config(firecracker=_program(tmp_path, "firecracker", "Firecracker v1.12.1")))
    assert (found.driver, found.accelerator, found.reason) == ("qemu", "tcg", WITHOUT.reason)
    assert choose(Config(accelerator="tcg")).reason == "config.toml sets the accelerator to tcg"


@pytest.mark.parametrize(
    ("says", "code", "message"),
    [
        ("Firecracker v1.4.1", Code.UNSUPPORTED, r"has version 1\.4\.1, and banger works with 1\.5 to"),
        ("Firecracker v2.0.0", Code.UNSUPPORTED, r"has version 2\.0\.0, and banger works with 1\.5 to"),
        ("Jailer v1.12.1", Code.UNSUPPORTED, "does not say its version as firecracker does: 'Jailer"),
        ("", Code.UNSUPPORTED, "does not say its version"),
    ],
)
def test_versions_that_do_not_fit(kvm: Path, kernel: Path, tmp_path: Path, says: str, code: Code, message: str) -> None:
    config = Config(firecracker=_program(tmp_path, "firecracker", says))
    with pytest.raises(BangerError, match=message) as caught:
        choose(config, "firecracker", kernel)
    assert caught.value.code is code
    assert choose(config, kernel=kernel).driver == "qemu"


@pytest.mark.parametrize("version", ["1.5.0", "1.12.1", "1.13.0-dev", "1.20.3"])
def test_versions_that_fit(tmp_path: Path, version: str) -> None:
    path = _program(tmp_path, "firecracker", f"Firecracker v{version}")
    assert str(programs.firecracker(Config(firecracker=path))) == f"{path} {version.removesuffix('-dev')}"


def test_the_real_programs(firecracker_binaries: FirecrackerBinaries) -> None:
    config = Config(firecracker=str(firecracker_binaries.firecracker), jailer=str(firecracker_binaries.jailer))
    for program in (programs.firecracker(config), programs.jailer(config)):
        assert str(program).endswith(f" {firecracker_binaries.version}")


def test_a_program_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "firecracker"
    path.write_bytes(b"no program")
    path.chmod(0o755)
    with pytest.raises(BangerError, match=r"cannot be run") as caught:
        programs.firecracker(Config(firecracker=str(path)))
    assert caught.value.code is Code.UNSUPPORTED


def test_missing_from_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BangerError, match="firecracker is not installed") as caught:
        programs.firecracker(Config())
    assert caught.value.code is Code.MISSING_TOOL


def test_a_kernel_without_an_entry(kvm: Path, tmp_path: Path) -> None:
    config = Config(firecracker=_program(tmp_path, "firecracker", "Firecracker v1.12.1"))
    path = tmp_path / "packed" / "vmlinux"
    path.parent.mkdir()
    path.write_bytes(b"MZ" + bytes(100))
    with pytest.raises(BangerError, match="Firecracker cannot boot the kernel 'packed': it is no") as caught:
        choose(config, "firecracker", path)
    assert "--vmm qemu" in caught.value.hint
    assert "cannot boot the kernel" in choose(config, kernel=path).reason


def test_without_the_device(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match=rf"Firecracker needs KVM, and {tmp_path}/kvm does not exist") as caught:
        require_firecracker(Config(), kvm=tmp_path / "kvm")
    assert caught.value.hint == f"{detect.kvm_fix()}; or use --vmm qemu"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another group")
def test_without_access_to_the_device(tmp_path: Path) -> None:
    """Asked as an ordinary user, since root may open anything."""
    kvm = tmp_path / "kvm"
    kvm.touch(mode=0o660)
    os.chown(kvm, 0, 424242)
    tmp_path.chmod(0o755)
    script = (
        "import grp, os, sys\nfrom pathlib import Path\nfrom banger.api.errors import BangerError\n"
        "from banger.vmm.choice import require_kvm\nos.chdir(sys.argv[1]); os.setuid(65534)\n"
        "try: require_kvm(Path('kvm'))\nexcept BangerError as error: print(error.message, error.hint, sep='; ')"
    )
    said = subprocess.run([sys.executable, "-c", script, tmp_path], check=True, capture_output=True, text=True).stdout
    assert said.startswith("Firecracker needs KVM, and kvm may not be opened by this user (it belongs to group 424242)")
    assert "usermod -aG 424242 $USER" in said


def test_an_unknown_one() -> None:
    with pytest.raises(BangerError, match="'bochs' is not a VMM"):
        choose(Config(), "bochs")
