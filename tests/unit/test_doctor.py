"""What doctor says about this host, and about hosts where virtualization is only half there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from banger import doctor, hostpackages
from banger.hostpackages import Need, Purpose
from banger.vmm import cgroups
from banger.vmm.choice import Choice
from banger.vmm.detect import detect, emulator, host_arch, kvm_fix

INTEL = "processor : 0\nflags\t\t: fpu vme sse vmx ssse3\n"
AMD = "flags : fpu svm\n"
PLAIN = "flags\t\t: fpu vmxish nosvm sse\nbugs\t: vmx\n"
amd64_only = pytest.mark.skipif(host_arch() != "amd64", reason="x86 shows virtualization among the CPU flags")


@amd64_only
@pytest.mark.parametrize(("text", "name"), [(INTEL, "kvm"), (AMD, "kvm"), (PLAIN, "tcg"), ("", "tcg")])
def test_kvm_needs_the_cpu_too(tmp_path: Path, text: str, name: str) -> None:
    kvm, cpuinfo = tmp_path / "kvm", tmp_path / "cpuinfo"
    kvm.touch()
    cpuinfo.write_text(text)
    found = detect(kvm, cpuinfo)
    assert found.name == name
    if name == "tcg":
        assert "cannot run ordinary guests" in found.reason
        assert "neither vmx nor svm" in found.reason


def test_without_the_device_guests_are_emulated(tmp_path: Path) -> None:
    found = detect(tmp_path / "kvm")
    assert found.name == "tcg"
    assert "does not exist" in found.reason


@pytest.mark.parametrize(
    ("text", "fix"),
    [(INTEL, "modprobe kvm_intel"), (AMD, "modprobe kvm_amd"), (PLAIN, "in the firmware"), ("", "in the firmware")],
)
def test_what_is_to_be_done_without_the_device(tmp_path: Path, text: str, fix: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert fix in kvm_fix(tmp_path / "cpuinfo")


@amd64_only
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to a group without a name")
def test_device_of_a_group_without_a_name(tmp_path: Path) -> None:
    """As in many containers; asked as an ordinary user, since root may open anything."""
    kvm = tmp_path / "kvm"
    kvm.touch(mode=0o660)
    os.chown(kvm, 0, 424242)
    tmp_path.chmod(0o755)
    (tmp_path / "cpuinfo").write_text(INTEL)
    script = (
        "import grp, os, sys\nfrom pathlib import Path\nfrom banger.vmm.detect import detect\n"
        "os.chdir(sys.argv[1]); os.setuid(65534)\nprint(detect(Path('kvm'), Path('cpuinfo')).reason)"
    )
    said = subprocess.run([sys.executable, "-c", script, tmp_path], check=True, capture_output=True, text=True).stdout
    assert said == "kvm may not be opened by this user (it belongs to group 424242)\n"


def test_checks_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    checks = {check.name: check for check in doctor.look().checks}
    assert checks["architecture"].message == host_arch()
    assert checks["guest agent"].status == "ok"
    assert checks["configuration"].status == "ok"
    assert checks["configuration"].message.endswith("config.toml does not exist: defaults")
    assert checks["state directory"].status == "ok"
    assert checks["acceleration"].message.startswith(detect().reason)
    for tool in hostpackages.tools(Purpose.RUN):
        assert tool.name in checks
    for check in checks.values():
        assert check.status in ("ok", "warn", "fail")
        assert check.fix or check.status == "ok", check


def test_what_is_missing_comes_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "banger").mkdir(mode=0o755)
    (tmp_path / "banger/config.toml").write_text("memry = 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("passt") is None
    checks = {check.name: check for check in doctor.look().checks}
    assert checks["user network"].status == "fail"
    assert "passt" in checks["user network"].fix
    assert checks["state directory"].status == "fail"
    assert "not a private directory" in checks["state directory"].message
    # the configuration has one row; the others go on with defaults
    assert [check.name for check in doctor.look().checks if "memry" in check.message] == ["configuration"]
    assert checks["configuration"].status == "fail"
    assert "known: " in checks["configuration"].fix


@pytest.mark.parametrize(("driver", "status"), [("qemu", "fail"), ("firecracker", "warn")])
def test_qemu_is_needed_where_it_is_the_vmm(monkeypatch: pytest.MonkeyPatch, driver: str, status: str) -> None:
    monkeypatch.setattr(doctor, "choose", lambda settings, net: Choice(driver, "kvm", "it was asked for"))
    monkeypatch.setattr(hostpackages, "missing", list)
    checks = {check.name: check for check in doctor.look().checks}
    assert checks[emulator(host_arch())].status == status
    assert checks["mke2fs"].status == "fail"


def test_what_vmms_cannot_be_kept_from_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether namespaces and control groups can be made is up to the host; each has a line and a fix of its own."""
    checks = {check.name: check for check in doctor.look().checks}
    assert checks["namespaces"].status in ("ok", "warn")
    assert checks["control groups"].status in ("ok", "warn")
    monkeypatch.setattr(cgroups, "find_tree", lambda: None)
    checks = {check.name: check for check in doctor.look().checks}
    assert checks["control groups"].status == "warn"
    assert checks["control groups"].message.startswith("VMMs run without limits on memory, processes and processors: ")
    assert "namespace" not in checks["control groups"].message + checks["control groups"].fix


def test_one_command_installs_all_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hostpackages, "read_os_release", lambda: {"ID": "debian"})
    found = doctor.look()
    lacking = {tool.name: tool for tool in hostpackages.missing(hostpackages.tools(Purpose.RUN))}
    told = {check.name for check in found.checks if check.package}
    assert {"passt", "mmdebstrap", "tar2sqfs"} <= told <= lacking.keys()
    assert all(lacking[name].need is Need.UNPRIVILEGED for name in lacking.keys() - told)
    packages = {lacking[name].packages["apt"] for name in told}
    assert packages <= {*found.install.split(), *found.install_more.split()}
    assert found.install.count("apt-get install") == 1
    assert "passt" in found.install.split()


def test_the_jailer_is_told_of_where_firecracker_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def told() -> list[tuple[str, str]]:
        return [(check.status, check.message) for check in doctor.look().checks if check.name == "jailer"]

    def install(name: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name.capitalize()} v1.12.1\n")
        (tmp_path / name).chmod(0o755)

    (tmp_path / "banger").mkdir(mode=0o700)
    (tmp_path / "banger/config.toml").write_text(
        f'firecracker = "{tmp_path}/firecracker"\njailer = "{tmp_path}/jailer"'
    )
    assert told() == []
    install("firecracker")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert told() == [("ok", "without root Firecracker has no jailer, but its seccomp filters are on")]
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert told() == [("warn", f"{tmp_path}/jailer is not a program")]
    install("jailer")
    assert told() == [("ok", f"{tmp_path}/jailer 1.12.1")]
