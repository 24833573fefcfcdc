"""The boot archive holds the boot modules and the agent, and is built once for both."""

from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.guest.bootarchive import boot_archive, write_boot_modules
from tests.unit.guest.test_cpio import Member, read_archives

MODULES = [("kernel/virtio/virtio.ko", b"\x7fELF one"), ("kernel/fs/overlay.ko.xz", b"\x7fELF three")]


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_bytes(b"\x7fELF agent")
    return path


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    directory = tmp_path / "kernel"
    directory.mkdir()
    write_boot_modules(directory / "boot-modules.cpio", MODULES)
    return directory


def members(archive: Path) -> dict[str, Member]:
    return {member.name.decode(): member for part in read_archives(archive.read_bytes()) for member in part}


def test_modules_stand_in_load_order(kernel: Path, agent: Path) -> None:
    files = members(boot_archive(kernel, agent))
    order = files["modules/order"].data.decode().splitlines()
    assert order == ["/modules/000-virtio.ko", "/modules/001-overlay.ko"]
    assert [files[path.lstrip("/")].data for path in order] == [content for _, content in MODULES]


def test_agent_is_init(kernel: Path, agent: Path) -> None:
    files = members(boot_archive(kernel, agent))
    assert files["init"].data == agent.read_bytes()
    assert files["init"].mode == 0o100755
    assert files["dev/console"].device == (5, 1)
    assert files["dev/null"].device == (1, 3)


def test_every_member_has_its_directory(kernel: Path, agent: Path) -> None:
    seen: set[str] = {""}
    for name in members(boot_archive(kernel, agent)):
        assert name.rpartition("/")[0] in seen
        seen.add(name)


def test_archive_is_built_once(kernel: Path, agent: Path) -> None:
    first = boot_archive(kernel, agent)
    before = first.stat()
    assert boot_archive(kernel, agent) == first
    assert first.stat().st_ino == before.st_ino


def test_new_agent_or_modules_get_a_new_archive(kernel: Path, agent: Path) -> None:
    first = boot_archive(kernel, agent)
    agent.write_bytes(b"\x7fELF newer agent")
    second = boot_archive(kernel, agent)
    assert second != first
    (kernel / "boot-modules.cpio").unlink()
    third = boot_archive(kernel, agent)
    assert third != second
    assert "modules/order" not in members(third)
    # only the last one stays, and nothing else is touched
    assert [path.name for path in kernel.iterdir()] == [third.name]


def test_missing_agent_is_explained(kernel: Path, tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="absent") as caught:
        boot_archive(kernel, tmp_path / "absent")
    assert caught.value.code is Code.MISSING_TOOL
    assert "make" in caught.value.hint
