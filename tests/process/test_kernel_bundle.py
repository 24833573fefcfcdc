"""Bundles over the real packer: received in one pass, refused when hostile, exported with the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import shutil
import stat
import struct
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger import archives
from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.kernelcat.bundle import Received, receive_bundle, write_bundle
from banger.kernelcat.modules import boot_plan, read_module
from tests.unit.kernelcat import builders

Files = dict[str, bytes]

MODULES: Files = {
    "modules/modules.dep": "".join(f"{path}: {' '.join(needs)}\n" for path, needs in builders.VIRTIO.items()).encode(),
    "modules/modules.dep.bin": b"index",
    "modules/modules.builtin": "".join(f"kernel/{name}.ko\n" for name in builders.BUILTIN).encode(),
    **{f"modules/{path}": builders.module(path) for path in builders.VIRTIO},
}
KERNEL: Files = {"vmlinux": builders.elf(), "config": b"CONFIG_X=y\n", "initrd.img": b"initrd" * 100, **MODULES}


def members(files: Files) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [builders.tar_member(name, data) for name, data in files.items()]


def pack(files: Files, *more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    return builders.tar([*members(files), *more])


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data)


def pieces(data: bytes, size: int = 1000) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory beside which nothing may appear."""
    (tmp_path / "outside").write_bytes(b"sentinel")
    directory = tmp_path / "staging"
    directory.mkdir()
    yield directory
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "staging"]
    assert (tmp_path / "outside").read_bytes() == b"sentinel"
    assert not any(path.is_symlink() for path in directory.rglob("*"))


def receive(scratch: Path, data: bytes) -> Received:
    return receive_bundle(pieces(data), "pull:x.tar.zst", scratch / "modules.squashfs", scratch, Job())


def refusal(scratch: Path, data: bytes) -> BangerError:
    with pytest.raises(BangerError) as caught:
        receive(scratch, data)
    assert caught.value.message.isprintable()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
    return caught.value


def entry(directory: Path, files: Files) -> Path:
    """A kernel's entry with these files, made as the importer does."""
    scratch = directory / "scratch"
    made = directory / "entry"
    scratch.mkdir(parents=True)
    made.mkdir()
    received = receive_bundle(pieces(zstd(pack(files))), "x", made / "modules.squashfs", scratch, Job())
    assert received.skipped == {}
    for path in (received.found.kernel, received.found.initrd, received.found.config):
        if path:
            shutil.copyfile(path, made / path.name)
    shutil.rmtree(scratch)
    return made


def export(made: Path) -> bytes:
    output = io.BytesIO()
    write_bundle(made, output, Job())
    return output.getvalue()


def unpack(data: bytes) -> list[tuple[str, bytes]]:
    plain = subprocess.run(["zstd", "-dc"], input=data, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        result = []
        for member in archive:
            assert member.isreg()
            assert (member.mode, member.uid, member.gid, member.mtime) == (0o644, 0, 0, 0)
            content = archive.extractfile(member)
            assert content is not None
            result.append((member.name, content.read()))
        return result


@pytest.mark.parametrize("compress", [zstd, gzip.compress, lzma.compress, bytes], ids=["zst", "gz", "xz", "plain"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_receives_kernel_and_modules(scratch: Path, compress: Callable[[bytes], bytes], prefix: str) -> None:
    received = receive(scratch, compress(pack({prefix + name: data for name, data in KERNEL.items()})))
    found, modules = received.found, received.modules
    assert found.kernel
    assert found.initrd
    assert found.config
    assert found.modules is None
    assert [path.read_bytes() for path in (found.kernel, found.config, found.initrd)] == list(KERNEL.values())[:3]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in scratch.rglob("*") if path.is_file())
    assert modules
    assert received.skipped == {}
    assert modules.index("modules.dep") == KERNEL["modules/modules.dep"]
    assert modules.index("modules.builtin") == KERNEL["modules/modules.builtin"]
    assert modules.index("modules.alias") is None
    plan = boot_plan(modules, None)
    assert set(plan.load) == set(builders.VIRTIO)
    for path in plan.load:
        assert read_module(modules, path, builders.VERSION) == builders.module(path)


def test_module_names_that_look_like_options(scratch: Path) -> None:
    files = {"modules/--help": b"\x7fELFone", "modules/-c": b"\x7fELFtwo", "modules/a b/ä;$x": b"\x7fELFthree"}
    modules = receive(scratch, pack(KERNEL | files)).modules
    assert modules
    for name, data in files.items():
        assert modules.read(name.removeprefix("modules/")) == data


def test_links_among_the_modules_become_files(scratch: Path) -> None:
    path = next(iter(builders.VIRTIO))
    links = [
        builders.tar_member("modules/hard.ko", kind=tarfile.LNKTYPE, link=f"modules/{path}"),
        builders.tar_member("modules/new/soft.ko", kind=tarfile.SYMTYPE, link=f"../{path}"),
        builders.tar_member("modules/kernel.ko", kind=tarfile.SYMTYPE, link="../vmlinux"),
        builders.tar_member("modules/build", kind=tarfile.SYMTYPE, link="/usr/src/linux"),
        builders.tar_member("modules/dangling", kind=tarfile.SYMTYPE, link="nowhere"),
        builders.tar_member("initrd.img", kind=tarfile.SYMTYPE, link=f"modules/{path}"),
        builders.tar_member("modules/null", kind=tarfile.CHRTYPE),
        builders.tar_member("modules/pipe", kind=tarfile.FIFOTYPE),
    ]
    received = receive(scratch, zstd(pack({"vmlinux": builders.elf(), **MODULES}, *links)))
    assert received.skipped == {"link": 2, "device": 1, "fifo": 1}
    assert received.found.skipped == received.skipped
    assert received.modules
    assert received.modules.read("hard.ko") == received.modules.read("new/soft.ko") == builders.module(path)
    assert received.modules.read("kernel.ko") == builders.elf()
    listed = subprocess.run(["rdsquashfs", "-d", scratch / "modules.squashfs"], capture_output=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == {b"file", b"dir"}


@pytest.mark.parametrize("missing", ["modules/modules.dep", "modules/modules.dep.bin"])
def test_modules_without_an_index_come_as_a_directory(scratch: Path, missing: str) -> None:
    files = {name: data for name, data in KERNEL.items() if name != missing}
    received = receive(scratch, zstd(pack(files)))
    assert received.modules is None
    directory = received.found.modules
    assert directory
    assert not (scratch / "modules.squashfs").exists()
    paths = (path for path in directory.rglob("*") if path.is_file())
    assert {f"modules/{path.relative_to(directory)}": path.read_bytes() for path in paths} == {
        name: data for name, data in files.items() if name.startswith("modules/")
    }


def test_a_kernel_without_modules(scratch: Path) -> None:
    received = receive(scratch, zstd(pack({"vmlinux": builders.elf()})))
    assert received.modules is None
    assert received.found.modules is None
    assert not (scratch / "modules.squashfs").exists()


def test_a_vmlinuz_goes_before_the_vmlinux_that_was_in_it(scratch: Path) -> None:
    received = receive(scratch, zstd(pack({"vmlinux": builders.elf(), "vmlinuz": b"bzimage"})))
    assert received.found.kernel
    assert received.found.kernel.read_bytes() == b"bzimage"


def test_a_staged_directory_as_a_tar(tmp_path: Path, scratch: Path) -> None:
    staged = builders.kernel_directory(scratch / "made")
    packed = subprocess.run(["tar", "-cC", staged, "."], capture_output=True, check=True).stdout
    shutil.rmtree(staged)
    received = receive(scratch, zstd(packed))
    assert received.modules is None
    assert received.found.kernel
    assert received.found.kernel.name == f"vmlinux-{builders.VERSION}"
    assert received.found.modules
    assert received.found.modules.is_relative_to(scratch)


def test_without_a_kernel(scratch: Path) -> None:
    assert refusal(scratch, zstd(pack(MODULES))).code == Code.NOT_FOUND


def test_modules_in_two_places_are_refused(scratch: Path) -> None:
    assert "both" in refusal(scratch, zstd(pack(KERNEL | {"lib/modules/v/a.ko": b"x"}))).message


def test_a_planted_manifest_and_boot_archive_are_not_taken(scratch: Path) -> None:
    planted = dict.fromkeys(("manifest.json", "boot-modules.cpio", "boot-agent.cpio", "modules.squashfs"), b"evil")
    assert receive(scratch, zstd(pack(KERNEL | planted))).skipped == {}
    assert not [path for path in scratch.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


def test_a_modules_dep_that_names_files_outside_is_refused(scratch: Path) -> None:
    for path in ("../../../etc/virtio_pci.ko", "/etc/virtio_pci.ko", "kernel/../kernel/virtio/virtio_pci.ko"):
        directory = scratch / hashlib.sha256(path.encode()).hexdigest()
        directory.mkdir()
        received = receive(directory, zstd(pack(KERNEL | {"modules/modules.dep": f"{path}:\n".encode()})))
        with pytest.raises(BangerError, match="not among the modules"):
            boot_plan(received.modules, None)


@pytest.mark.parametrize(
    ("member", "word"),
    [
        (builders.tar_member("/vmlinux", b"x"), "absolute"),
        (builders.tar_member("/etc/passwd", b"x"), "absolute"),
        (builders.tar_member("../outside", b"x"), "'..'"),
        (builders.tar_member("modules/a/../../../outside", b"x"), "'..'"),
        (builders.tar_member("modules/a", kind=tarfile.SYMTYPE, link="../../outside"), "outside of the archive"),
        (builders.tar_member("modules/a", kind=tarfile.SYMTYPE, link="/etc/passwd"), "absolute"),
        (builders.tar_member("modules/a", kind=tarfile.LNKTYPE, link="../outside"), "'..'"),
        (builders.tar_member("modules/a", kind=tarfile.LNKTYPE, link="/etc/passwd"), "absolute"),
        (builders.tar_member("modules/\x1b[31m.ko", b"x"), "control characters"),
        (builders.tar_member("modules/\udcff.ko", b"x"), "UTF-8"),
        (builders.tar_member("modules/" + "/".join("d" * 40), b"x"), "longer"),
        (builders.tar_member("modules/" + "x" * 300, b"x"), "longer"),
        (builders.tar_member("vmlinux", b"second"), "twice"),
        (builders.tar_member("modules/modules.dep", b"second"), "twice"),
        (builders.tar_member("./modules//kernel", b"x"), "directory"),
        (builders.tar_member("modules/modules.dep/x", b"x"), "directory"),
    ],
)
def test_hostile_members_are_refused(scratch: Path, member: tuple[tarfile.TarInfo, bytes], word: str) -> None:
    error = refusal(scratch, zstd(pack(KERNEL, member)))
    assert error.code == Code.CORRUPT
    assert word in error.message
    assert "pull:x.tar.zst" in error.message


def test_a_link_that_is_written_through_later_is_refused(scratch: Path) -> None:
    link = builders.tar_member("modules/extra", kind=tarfile.SYMTYPE, link="../boot")
    assert "link" in refusal(scratch, zstd(pack(KERNEL, link, builders.tar_member("modules/extra/a", b"x")))).message


@pytest.mark.parametrize("compress", [zstd, gzip.compress, lzma.compress, bytes], ids=["zst", "gz", "xz", "plain"])
def test_truncated_at_any_offset(scratch: Path, compress: Callable[[bytes], bytes]) -> None:
    archive = pack(KERNEL)
    end = len(archive.rstrip(b"\0")) if compress is bytes else len(compress(archive))
    for size in sorted({*range(0, end, end // 40), end - 1}):
        directory = scratch / str(size)
        directory.mkdir()
        assert refusal(directory, compress(archive)[:size]).code == Code.CORRUPT


def test_zero_padding_is_allowed_and_garbage_is_not(scratch: Path) -> None:
    archive = pack(KERNEL)
    for number, (data, refused) in enumerate(
        [
            (zstd(archive + bytes(100_000)), False),
            (zstd(archive) + bytes(10_000), False),
            (zstd(archive[:5000]) + zstd(archive[5000:]), False),  # as pzstd writes them
            (zstd(archive + b"garbage"), True),
            (zstd(archive) + b"garbage", True),
            (zstd(archive) + bytes(100) + b"garbage", True),
            (zstd(archive) + zstd(b"garbage"), True),
            (gzip.compress(archive) + b"garbage", True),
            (lzma.compress(archive) + b"garbage", True),
            (archive + b"garbage", True),
            (zstd(archive) + zstd(archive), True),
        ]
    ):
        directory = scratch / str(number)
        directory.mkdir()
        if refused:
            assert refusal(directory, data).code == Code.CORRUPT
        else:
            assert receive(directory, data).modules


def test_what_is_no_archive_is_refused(scratch: Path) -> None:
    for number, data in enumerate((b"", b"<html>" * 200, zstd(b"x" * 1000), bytes(10), b"\x28\xb5\x2f\xfd")):
        directory = scratch / str(number)
        directory.mkdir()
        assert refusal(directory, data).code == Code.CORRUPT


def test_a_wrong_digest_is_what_the_caller_says_it_is(scratch: Path) -> None:
    """The pieces say at their end that they were wrong: that is told, unchanged, and not lost."""
    seen = 0

    def checked() -> Iterator[bytes]:
        nonlocal seen
        for piece in pieces(zstd(pack(KERNEL)) + bytes(5000), 100):
            seen += len(piece)
            yield piece
        raise wrong

    wrong = BangerError(Code.CORRUPT, "the digest is wrong", hint="a hint")
    with pytest.raises(BangerError) as caught:
        receive_bundle(checked(), "x", scratch / "modules.squashfs", scratch, Job())
    assert caught.value is wrong
    assert seen == len(zstd(pack(KERNEL))) + 5000


def test_a_failing_download_ends_it(scratch: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield zstd(pack(KERNEL))[:500]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        receive_bundle(broken(), "x", scratch / "modules.squashfs", scratch, Job())


def test_a_cancelled_job_ends_it(scratch: Path) -> None:
    job = Job()

    def endless() -> Iterator[bytes]:
        yield pack(KERNEL)[:5000]
        job.cancel()
        while True:
            job.check()
            yield bytes(512)

    with pytest.raises(BangerError) as caught:
        receive_bundle(endless(), "x", scratch / "modules.squashfs", scratch, job)
    assert caught.value.code == Code.CANCELLED


def test_bombs_are_refused(scratch: Path) -> None:
    bomb = zstd(pack({"vmlinux": bytes(200 << 20)}))
    assert "times its size" in refusal(scratch, bomb).message
    assert sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()) <= 65 << 20


def test_a_file_larger_than_any_kernel_is_refused(scratch: Path) -> None:
    member = tarfile.TarInfo("modules/huge.ko")
    member.size = 2 << 30
    error = refusal(scratch, zstd(member.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)))
    assert error.code == Code.EXHAUSTED


def test_indexes_larger_than_a_kernels_are_refused(scratch: Path) -> None:
    for number, names in enumerate((["alias"], ["dep"], ["alias", "symbols", "order"])):
        size = (11 << 20) if len(names) > 1 else (16 << 20) + 1
        files = {f"modules/modules.{name}": os.urandom(size) for name in names}
        directory = scratch / str(number)
        directory.mkdir()
        assert "index" in refusal(directory, zstd(pack({"vmlinux": b"k", **files}))).message


@pytest.mark.parametrize(("log", "refused"), [(27, False), (28, True)])
def test_the_window_of_zstd_is_bounded(scratch: Path, log: int, refused: bool) -> None:
    """RFC 8878, 3.1.1: a frame whose header asks for a window of 2^log bytes, with one raw block after another."""
    frame = struct.pack("<IBB", 0xFD2FB528, 0, (log - 10) << 3)
    archive = pack(KERNEL)
    for at in range(0, len(archive), 1 << 16):
        block = archive[at : at + (1 << 16)]
        last = at + (1 << 16) >= len(archive)
        frame += (len(block) << 3 | last).to_bytes(3, "little") + block
    if refused:
        assert refusal(scratch, frame).code == Code.CORRUPT
    else:
        assert receive(scratch, frame).modules


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 5000), noise=st.binary(min_size=1, max_size=600))
def test_damage_is_refused_or_harmless(scratch: Path, at: int, noise: bytes) -> None:
    archive = pack(KERNEL)
    archive = archive[:at] + noise + archive[at + len(noise) :]
    directory = scratch / "one"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        receive(directory, zstd(archive))
    except BangerError as error:
        assert error.code in (Code.CORRUPT, Code.EXHAUSTED, Code.NOT_FOUND), error  # noqa: PT017
        assert error.message.isprintable()  # noqa: PT017
    image = directory / "modules.squashfs"
    if image.exists() and image.stat().st_size > 96:
        listed = subprocess.run(["rdsquashfs", "-d", image], capture_output=True, check=False).stdout
        assert {line.split()[0] for line in listed.splitlines()} <= {b"file", b"dir"}


def test_export_writes_what_a_start_needs_first(tmp_path: Path) -> None:
    made = entry(tmp_path, KERNEL | {"modules/modules.alias": b"alias"})
    (made / "manifest.json").write_text("{}")
    (made / "boot-modules.cpio").write_bytes(b"cpio")
    (made / "boot-agent.cpio").write_bytes(b"cpio")
    contents = unpack(export(made))
    names = [name for name, _ in contents]
    indexes = sorted(name for name in names if name.startswith("modules/modules."))
    modules = [name for name in names if name.startswith("modules/kernel/")]
    assert names == ["vmlinux", *indexes, "config", "initrd.img", *modules]
    assert modules == sorted(modules, key=lambda name: name.split("/"))
    assert dict(contents) == KERNEL | {"modules/modules.alias": b"alias"}


def test_export_of_what_was_received_has_the_same_bytes(tmp_path: Path) -> None:
    files = KERNEL | {"vmlinux": builders.elf() + os.urandom(100_000), "modules/extra/x.ko": os.urandom(300_000)}
    first = export(entry(tmp_path / "first", files))
    again = export(entry(tmp_path / "again", dict(reversed(files.items()))))
    assert first == again
    received = tmp_path / "received"
    received.mkdir()
    modules = received / "modules.squashfs"
    found = receive_bundle(pieces(first), "x", modules, received, Job()).found
    for path in (found.kernel, found.initrd, found.config):
        assert path
        path.rename(received / path.name)
    assert export(received) == first


def test_export_does_not_depend_on_the_number_of_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_JOB_SIZE", 1 << 20)
    words = [os.urandom(12) for _ in range(1000)]
    noise = iter(os.urandom(1 << 19))
    tmp_path.joinpath("vmlinux").write_bytes(b"".join(words[3 * next(noise)] for _ in range(1 << 18)))
    exports = set()
    for processors in (1, 2, 5):
        monkeypatch.setattr(os, "cpu_count", lambda count=processors: count)
        exports.add(export(tmp_path))
    assert len(exports) == 1


def test_export_without_modules_and_with_a_bzimage(tmp_path: Path) -> None:
    tmp_path.joinpath("vmlinux").write_bytes(b"elf")
    tmp_path.joinpath("vmlinuz").write_bytes(b"bzimage")
    assert unpack(export(tmp_path)) == [("vmlinux", b"elf"), ("vmlinuz", b"bzimage")]


def test_export_of_damaged_modules_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("vmlinux").write_bytes(b"elf")
    tmp_path.joinpath("modules.squashfs").write_bytes(b"hsqs" * 100)
    with pytest.raises(BangerError) as caught:
        export(tmp_path)
    assert caught.value.code == Code.CORRUPT
