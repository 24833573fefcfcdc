"""The list of host packages, the commands that install them, and scripts/setup-host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from banger import hostpackages
from banger.api.errors import BangerError, Code
from banger.hostpackages import HostTool, Need, Purpose, Use
from banger.job import Job

SETUP_HOST = Path(__file__).parents[2] / "scripts/setup-host"
QEMU = f"qemu-system-{os.uname().machine}"
SUDO = "" if os.geteuid() == 0 else "sudo "

DEBIAN = {"ID": "debian", "VERSION_ID": "12"}
UBUNTU = {"ID": "ubuntu", "ID_LIKE": "debian"}
MINT = {"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}
FEDORA = {"ID": "fedora"}
ROCKY = {"ID": "rocky", "ID_LIKE": "rhel centos fedora"}
ARCH = {"ID": "arch"}
MANJARO = {"ID": "manjaro", "ID_LIKE": "arch"}


def tools_named(*names: str) -> list[HostTool]:
    return [tool for tool in hostpackages.load() if tool.name in names]


def names(tools: list[HostTool]) -> set[str]:
    return {tool.name for tool in tools}


def tool(name: str, files: tuple[str, ...] = (), module: str = "") -> HostTool:
    return HostTool(name, "", Purpose.RUN, Need.REQUIRED, {}, files=files, module=module)


def setup_host(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    # -I and -S: no environment and no site-packages, as on a host where nothing is installed yet
    command = [sys.executable, "-I", "-S", str(SETUP_HOST), *arguments]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)


@pytest.mark.parametrize("tool", hostpackages.load(), ids=lambda tool: tool.name)
def test_every_entry_is_complete(tool: HostTool) -> None:
    assert tool.why
    assert tool.packages.keys() == {"apt", "dnf", "pacman"}
    assert all(name and name == name.strip() for name in tool.packages.values())
    assert not (tool.files and tool.module)
    assert tool.arch in ("", "amd64", "arm64")
    assert all(pattern.startswith("/") for pattern in tool.files)


def test_each_purpose_includes_those_before_it() -> None:
    run, build, test = (names(hostpackages.required(purpose)) for purpose in Purpose)
    assert run < build < test
    assert {"passt", "mke2fs", "tar2sqfs"} <= run
    assert {"cc", "libc.a", "ensurepip"} <= build - run
    assert {"clang"} <= test - build


def test_only_unprivileged_users_need_newuidmap() -> None:
    needed = "newuidmap" in names(hostpackages.required(Purpose.RUN))
    assert needed == (os.geteuid() != 0)


def test_one_qemu_is_for_this_architecture() -> None:
    machine = os.uname().machine
    qemus = [tool.name for tool in hostpackages.tools(Purpose.RUN) if tool.name.startswith("qemu-system-")]
    assert qemus == [f"qemu-system-{machine}"]


@pytest.mark.parametrize(
    ("os_release", "command"),
    [
        (DEBIAN, "apt-get install --no-install-recommends passt squashfs-tools-ng"),
        (UBUNTU, "apt-get install --no-install-recommends passt squashfs-tools-ng"),
        (MINT, "apt-get install --no-install-recommends passt squashfs-tools-ng"),
        (FEDORA, "dnf install passt squashfs-tools-ng"),
        (ROCKY, "dnf install passt squashfs-tools-ng"),
        (ARCH, "pacman -S --needed passt  # and from the AUR: squashfs-tools-ng"),
        (MANJARO, "pacman -S --needed passt  # and from the AUR: squashfs-tools-ng"),
    ],
    ids=lambda value: value["ID"] if isinstance(value, dict) else "",
)
def test_install_command(os_release: dict[str, str], command: str) -> None:
    assert hostpackages.install_command(tools_named("passt", "tar2sqfs"), os_release) == SUDO + command


def test_install_command_for_the_aur_alone_is_only_a_comment() -> None:
    assert hostpackages.install_command(tools_named("tar2sqfs"), ARCH) == "# and from the AUR: squashfs-tools-ng"


@pytest.mark.parametrize("os_release", [{}, {"ID": "alpine"}, {"ID": "nixos", "ID_LIKE": ""}])
def test_install_command_is_empty_where_no_packages_are_known(os_release: dict[str, str]) -> None:
    assert hostpackages.install_command(tools_named("passt"), os_release) == ""


def test_a_package_that_brings_two_tools_is_named_once() -> None:
    firmware = tools_named("qboot.rom", "bios-256k.bin")
    assert len(firmware) == 2
    assert hostpackages.package_names(firmware, "pacman") == ["qemu-system-x86-firmware"]


def test_missing_looks_for_commands_files_and_modules(tmp_path: Path) -> None:
    (tmp_path / "firmware.rom").touch()
    here = [
        tool("sh"),
        tool("firmware", files=("/nonexistent/*.rom", f"{tmp_path}/*.rom")),
        tool("a module", module="json"),
    ]
    gone = [
        tool("no-such-command"),
        tool("firmware", files=(f"{tmp_path}/*.bin",)),
        tool("a module", module="no_such_module"),
    ]
    assert hostpackages.missing(here + gone) == gone


def test_administrators_commands_are_found_without_them_on_path(tmp_path: Path) -> None:
    assert hostpackages.find_command("mke2fs", path=str(tmp_path)) is not None
    assert hostpackages.find_command("sh", path=str(tmp_path)) is None


def test_a_missing_tool_is_reported_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(BangerError) as caught:
        Job().run(["passt", "--version"], env={"PATH": str(tmp_path)})
    assert caught.value.code is Code.MISSING_TOOL
    assert "'passt'" in caught.value.message
    command = hostpackages.install_command(tools_named("passt"), hostpackages.read_os_release())
    if command:
        assert "(package passt)" in caught.value.message
        assert command in caught.value.hint


@pytest.mark.parametrize("command", ["pasta", "resize2fs", "rdsquashfs", "apt-cache"])
def test_a_command_that_comes_with_another_has_its_package(command: str) -> None:
    tool = hostpackages.find_tool(command)
    assert tool is not None
    assert command in tool.also


@pytest.mark.parametrize(
    ("uses", "vmm", "some", "others"),
    [
        ({Use.VM, Use.NETWORK}, "qemu", {"passt", QEMU}, {"mke2fs", "tar2sqfs", "mmdebstrap"}),
        ({Use.VM, Use.DISK}, "firecracker", {"mke2fs", "debugfs"}, {"passt", QEMU}),
        ({Use.IMAGE, Use.DEBIAN_IMAGE}, "", {"mmdebstrap", "apt-get", "tar2sqfs", "sqfs2tar"}, {"depmod", QEMU}),
        ({Use.KERNEL}, "", {"depmod", "tar2sqfs"}, {"apt-get", "mmdebstrap"}),
        (set(), "", set(), {"passt", QEMU}),
    ],
    ids=["start", "disks", "debian image", "kernel", "nothing"],
)
def test_what_work_takes(uses: set[Use], vmm: str, some: set[str], others: set[str]) -> None:
    needed = names(hostpackages.needed(uses, vmm))
    assert some <= needed
    assert not others & needed


def test_setup_host_is_silent_when_nothing_is_missing() -> None:
    done = setup_host("--check", "--test", path=os.environ["PATH"])
    missing = hostpackages.missing(hostpackages.required(Purpose.TEST))
    if missing:
        assert done.returncode == 1
        assert all(tool.name in done.stderr for tool in missing)
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_setup_host_says_what_is_missing_and_how_to_install_it(tmp_path: Path) -> None:
    done = setup_host("--check", path=str(tmp_path))
    assert done.returncode == 1
    assert "passt" in done.stderr
    assert "clang" not in done.stderr
    manager = hostpackages.package_manager(hostpackages.read_os_release())
    if manager:
        command = done.stderr.splitlines()[-1]
        assert command.startswith(f"  {SUDO}")
        assert set(hostpackages.package_names(tools_named("passt", "git", "cc"), manager)) <= set(command.split())
    assert "clang" in setup_host("--check", "--test", path=str(tmp_path)).stderr


def test_setup_host_refuses_unknown_options() -> None:
    assert setup_host("--no-such-option", path=os.environ["PATH"]).returncode == 2
