"""The smallest image: one static program and its os-release, and the kernel to make VMs of it with."""

import io
import tarfile
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.guest.binary import agent_binary
from banger.vmm.detect import host_arch
from tests.daemons import debian_kernel, running_daemon, shared_directory


def tiny_rootfs(path: Path) -> Path:
    """Its root filesystem."""
    with tarfile.open(path, "w") as archive:
        for name, data in (
            ("etc/os-release", b'ID=tiny\nPRETTY_NAME="Tiny 1"\n'),
            ("bin/tool", agent_binary(host_arch()).read_bytes()),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
    return path


def tiny_entries(factory: pytest.TempPathFactory) -> list[Path]:
    """The entries of kernel and image, made once in a test run through the API."""
    kernel = debian_kernel(factory)
    with shared_directory(factory, "tiny-image") as shared:
        image = shared / "images/tiny"
        if not image.exists():
            tiny_rootfs(shared / "tiny.tar")
            with running_daemon(shared / "daemon") as daemon:
                daemon.client.call(op.IMAGE_IMPORT, m.ImageImport("tiny", str(shared / "tiny.tar")))
                daemon.export("images", "tiny", shared)
    return [kernel, image]
