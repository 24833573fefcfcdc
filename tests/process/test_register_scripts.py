"""scripts/register-*-image: a staged kernel and a root filesystem become an image that refers to the kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from tests.daemons import DaemonProcess, running_daemon
from tests.process.test_image_register import ext4, root_directory
from tests.unit.kernelcat import builders

SCRIPTS = Path(__file__).parents[2] / "scripts"

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the kernels of these tests are for x86_64")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path_factory.mktemp("daemon")) as running:
        yield running


@pytest.fixture
def manual(tmp_path: Path) -> Path:
    """What a user has made by hand: build/manual, with the kernels of two distributions and one root filesystem."""
    for distro in ("void", "alpine"):
        directory = builders.kernel_directory(tmp_path / "manual" / f"{distro}-kernel")
        metadata = {
            "distro": distro,
            "arch": "amd64",
            "kernel_version": builders.VERSION,
            "kernel": f"boot/vmlinux-{builders.VERSION}",
            "initrd": "",
            "modules": f"lib/modules/{builders.VERSION}",
        }
        (directory / "metadata.json").write_text(json.dumps(metadata))
    ext4(tmp_path / "manual/void-rootfs.ext4", root_directory(tmp_path / "root"))
    return tmp_path / "manual"


@pytest.fixture
def banger(tmp_path: Path) -> Path:
    """The banger command of these tests, as an installation has it."""
    command = tmp_path / "bin/banger"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m banger.cli "$@"\n')
    command.chmod(0o755)
    return command


def register(
    daemon: DaemonProcess, distro: str, *words: str | Path, **variables: str | Path
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"register-{distro}-image"), *map(str, words)]
    environment = {**daemon.environment, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_kernel_and_root_filesystem_become_an_image(daemon: DaemonProcess, manual: Path, banger: Path) -> None:
    done = register(daemon, "void", BANGER_BIN=banger, BANGER_MANUAL_DIR=manual)
    assert done.returncode == 0, done.stderr
    image = daemon.client.call(op.IMAGE_SHOW, m.NameRequest("void"))
    assert (image.kernel_ref, image.managed, image.problem) == ("void", False, "")
    kernel = daemon.client.call(op.KERNEL_SHOW, m.NameRequest("void"))
    assert (kernel.distro, kernel.kernel_version, kernel.problem) == ("void", builders.VERSION, "")

    again = register(daemon, "void", BANGER_BIN=banger, BANGER_MANUAL_DIR=manual)
    assert again.returncode == 1
    assert "'void'" in again.stderr
    forced = register(daemon, "void", "--force", BANGER_BIN=banger, BANGER_MANUAL_DIR=manual)
    assert forced.returncode == 0, forced.stderr


def test_every_setting_comes_from_the_environment_or_an_option(
    daemon: DaemonProcess, manual: Path, banger: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    seed = ext4(tmp_path / "seed.ext4", tmp_path / "home")
    variables: dict[str, str | Path] = {
        "ALPINE_ROOTFS": manual / "void-rootfs.ext4",
        "ALPINE_KERNEL_DIR": manual / "alpine-kernel",
        "ALPINE_KERNEL_REF": "alpine-virt",
        "ALPINE_WORK_SEED": seed,
        "ALPINE_IMAGE_NAME": "dev",
        "PATH": f"{banger.parent}:{os.environ['PATH']}",
    }
    done = register(daemon, "alpine", "--name", "dev2", **variables)
    assert done.returncode == 0, done.stderr
    image = daemon.client.call(op.IMAGE_SHOW, m.NameRequest("dev2"))
    assert (image.kernel_ref, image.work_seed) == ("alpine-virt", str(seed))
    assert daemon.client.call(op.KERNEL_SHOW, m.NameRequest("alpine-virt")).distro == "alpine"


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--kernel", "absent"], "error: 'absent' is no staged kernel\nhint: stage one with 'make void-kernel'\n"),
        (["--rootfs", "absent.ext4"], "error: there is no file 'absent.ext4'\n"),
        (["--work-seed", "absent.ext4"], "error: there is no file 'absent.ext4'\n"),
        (["--banger", "/absent/banger"], "error: there is no banger command\n"),
    ],
)
def test_nothing_is_imported_when_something_is_missing(
    daemon: DaemonProcess, manual: Path, banger: Path, words: list[str], pattern: str
) -> None:
    before = daemon.client.call(op.KERNEL_LIST, m.Empty())
    variables = {"BANGER_BIN": banger, "BANGER_MANUAL_DIR": manual}
    done = register(daemon, "void", *words, "--kernel-ref", "other", **variables)
    assert done.returncode == 1
    assert done.stderr.startswith(pattern)
    assert daemon.client.call(op.KERNEL_LIST, m.Empty()) == before
