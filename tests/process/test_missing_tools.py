"""First use of a host that lacks tools: the command names all of them before it fetches or builds anything."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import hostpackages
from banger.hostpackages import HostTool, Use
from banger.vmm.detect import emulator, host_arch
from tests.daemons import DaemonProcess, running_daemon
from tests.process.test_image_register import install_kernel
from tests.tiny import tiny_rootfs

BANGER = [sys.executable, "-m", "banger.cli"]
QEMU = emulator(host_arch())
pytestmark = pytest.mark.skipif(
    bool(hostpackages.missing(hostpackages.needed(set(Use), "qemu"))), reason="tools are not installed anyway"
)


def path_without(directory: Path, *hidden: str) -> str:
    """A PATH of links to all that is on ours but some programs, and what comes with them."""
    directory.mkdir()
    names = {name for tool in hidden if (known := hostpackages.find_tool(tool)) for name in (known.name, *known.also)}
    for place in os.environ["PATH"].split(":"):
        for program in os.scandir(place) if Path(place).is_dir() else ():
            if program.name not in names and not (directory / program.name).is_symlink():
                (directory / program.name).symlink_to(program.path)
    assert not [name for name in names if hostpackages.find_command(name, str(directory))]
    return str(directory)


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon with an empty state that sees neither QEMU nor passt, nor what images and kernels are made with."""
    path = path_without(tmp_path / "bin", QEMU, "passt", "mmdebstrap", "apt-get", "tar2sqfs", "sqfs2tar")
    variables = {"PATH": path}
    with running_daemon(tmp_path, config='vmm = "qemu"', variables=variables) as daemon:
        yield daemon
        assert not [*daemon.layout.images.iterdir(), *daemon.layout.kernels.iterdir()]
        assert not [*daemon.layout.cache.rglob("*.deb"), *daemon.layout.cache.glob("apt/*/*")]


def fails(daemon: DaemonProcess, *arguments: str) -> tuple[str, str]:
    """The error and the hint of a command that must fail because of the host."""
    done = subprocess.run(
        [*BANGER, *arguments], env=daemon.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode in (1, 125), done.stderr
    error, hint = (line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: ")))
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


def named(*names: str) -> list[HostTool]:
    return [tool for tool in hostpackages.load() if tool.name in names]


def check(said: tuple[str, str], *names: str) -> None:
    """That these tools, and no others, are named at once, and one command that brings all."""
    assert said[0] == f"host tools are not installed: {', '.join(tool.name for tool in named(*names))}"
    command = hostpackages.install_command(named(*names), hostpackages.read_os_release())
    assert said[1] == (f"install them with: {command}" if command else said[1])


def test_a_first_run_names_all_that_it_takes(bare: DaemonProcess) -> None:
    builds = ("mmdebstrap", "apt-get", "tar2sqfs", "sqfs2tar")
    check(fails(bare, "vm", "run", "--rm", "--", "true"), QEMU, "passt", *builds)
    check(fails(bare, "vm", "run", "--rm", "--net", "none", "--", "true"), QEMU, *builds)
    pulls = ("apt-get", "tar2sqfs", "sqfs2tar")
    check(fails(bare, "vm", "create", "--image", "localhost:1/no/such"), QEMU, "passt", *pulls)


def test_pulls_name_all_that_they_take(bare: DaemonProcess) -> None:
    check(fails(bare, "image", "pull", "debian-bookworm"), "mmdebstrap", "apt-get", "tar2sqfs", "sqfs2tar")
    check(fails(bare, "image", "pull", "localhost:1/no/such"), "tar2sqfs", "sqfs2tar")
    check(fails(bare, "kernel", "pull", "debian-cloud"), "apt-get", "tar2sqfs")


def test_what_is_here_takes_no_more_tools(tmp_path: Path) -> None:
    """Only those of the VM itself."""
    path = path_without(tmp_path / "bin", QEMU, "passt", "mmdebstrap", "apt-get")
    with running_daemon(tmp_path, config='vmm = "qemu"', variables={"PATH": path}) as daemon:
        install_kernel(daemon.layout.kernels)
        daemon.link([])
        subprocess.run(
            [*BANGER, "image", "import", "tiny", "--from", tiny_rootfs(tmp_path / "tiny.tar"), "--kernel-ref", "mine"],
            env=daemon.environment,
            check=True,
            capture_output=True,
        )
        check(fails(daemon, "vm", "create", "--image", "tiny"), QEMU, "passt")
        error, hint = fails(daemon, "vm", "create", "--image", "tiny", "--net", "none")
        assert error.startswith(f"the host tool {QEMU!r} is not installed")
        assert hint.startswith("install it with")
        assert list(daemon.layout.vms.iterdir()) == []


def test_a_qemu_that_is_too_old_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / QEMU).write_text("#!/bin/sh\necho 'QEMU emulator version 6.2.0 (Debian 1:6.2+dfsg-2ubuntu6)'\n")
    (fake / QEMU).chmod(0o755)
    path = f"{fake}:{path_without(tmp_path / 'bin', QEMU)}"
    with running_daemon(tmp_path, config='vmm = "qemu"', variables={"PATH": path}) as daemon:
        error, _ = fails(daemon, "vm", "create")
        assert error == f"{fake}/{QEMU} has version 6.2, and banger works with 7.2 and newer"
        assert not list(daemon.layout.kernels.iterdir())
