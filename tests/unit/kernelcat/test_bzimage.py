"""Kernel files are recognised and unpacked, and damaged or foreign ones refused."""

import gzip
import hashlib
import lzma
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger import hostpackages
from banger.api.errors import BangerError, Code
from banger.job import Job, Progress
from banger.kernelcat import bzimage
from banger.kernelcat.bzimage import Kernel, embedded_config, unpack_kernel
from tests.unit.kernelcat import builders
from tests.unit.kernelcat.builders_kernel import BANNERS, efi_arm64_image, efi_program, elf32


def unpack(data: bytes, *, move: bool = False) -> tuple[Kernel, bytes]:
    """The kernel in a file with this content, and its image."""
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "vmlinuz-9"), Path(directory, "vmlinux")
        source.write_bytes(data)
        kernel = unpack_kernel(source, target, Job(), move=move)
        image = target.read_bytes()
        assert source.exists() == (not move or image != data)
        assert kernel.sha256 == hashlib.sha256(image).hexdigest()
        assert target.stat().st_mode & 0o777 == 0o644
        return kernel, image


def refusal(data: bytes) -> BangerError:
    with pytest.raises(BangerError) as caught:
        unpack(data)
    assert caught.value.message.startswith("'vmlinuz-9' ")
    return caught.value


def packed(image: bytes, kind: str = "gzip") -> bytes:
    return builders.bzimage(builders.COMPRESSORS[kind](image), len(image))


def nameless(extra: bytes) -> bytes:
    """An ELF that is a kernel only by what `extra` says."""
    return builders.elf().replace(b"Linux version", b"Other version") + extra


@pytest.mark.parametrize("kind", builders.COMPRESSORS)
def test_bzimage_gives_its_elf_whatever_the_compression(kind: str) -> None:
    # more than one block of the legacy lz4 format
    image = builders.elf(extra=bytes(9 << 20) + b"the end")
    kernel, unpacked = unpack(packed(image, kind))
    assert unpacked == image
    assert (kernel.arch, kernel.bzimage, kernel.pvh, kernel.version) == ("amd64", True, True, builders.VERSION)


def test_xz_with_the_filter_for_x86() -> None:
    """As scripts/xz_wrap.sh packs kernels."""
    image = builders.elf(extra=b"\xe8\x10\x00\x00\x00" * 1000)
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 << 20}]
    payload = lzma.compress(image, check=lzma.CHECK_CRC32, filters=filters)
    assert unpack(builders.bzimage(payload, len(image)))[1] == image


def test_gzip_carries_its_own_size() -> None:
    """The build appends none then: the last 4 bytes of the payload are ISIZE (RFC 1952)."""
    image = builders.elf()
    payload = gzip.compress(image)
    whole = builders.bzimage(payload[:-4], len(image))
    assert unpack(whole)[1] == image
    assert "unpacks to" in refusal(builders.bzimage(payload, len(image) + 1)).message


@pytest.mark.parametrize("kind", builders.COMPRESSORS)
def test_truncated_payload_is_refused(kind: str) -> None:
    image = builders.elf(extra=bytes(range(256)) * 64)
    payload = builders.COMPRESSORS[kind](image)
    assert refusal(builders.bzimage(payload[:-8], len(image))).code is Code.CORRUPT


@pytest.mark.parametrize("kind", builders.COMPRESSORS)
def test_size_that_the_build_appended_is_checked(kind: str) -> None:
    image = builders.elf(extra=bytes(range(256)) * 64)
    error = refusal(builders.bzimage(builders.COMPRESSORS[kind](image), len(image) + 1))
    assert f"unpacks to {len(image)} bytes instead of {len(image) + 1}" in error.message
    assert error.code is Code.CORRUPT


@pytest.mark.parametrize(
    "data",
    [
        packed(builders.elf())[:-40],
        packed(builders.elf())[:0x210],
        builders.zboot(builders.arm64_image())[:-1],
        builders.elf()[:-1],
        builders.elf()[:100],
        gzip.compress(builders.elf()[:-1]),
        efi_program({b".linux": packed(builders.elf())})[:-600],
        efi_arm64_image(builders.arm64_image())[:-1],
    ],
)
def test_files_that_were_cut_off_are_refused(data: bytes) -> None:
    error = refusal(data)
    assert error.code is Code.CORRUPT
    assert (
        "ends early" in error.message or "beginning of a larger" in error.message or "program header" in error.message
    )


@pytest.mark.parametrize("move", [False, True])
def test_bare_elf_and_pvh_note(move: bool) -> None:
    assert unpack(builders.elf(pvh=True), move=move)[0].pvh
    kernel, image = unpack(builders.elf(pvh=False), move=move)
    assert not kernel.pvh
    assert not kernel.bzimage
    assert image == builders.elf(pvh=False)


@pytest.mark.parametrize("kind", builders.COMPRESSORS)
def test_compressed_elf_is_no_bzimage(kind: str) -> None:
    kernel, image = unpack(builders.COMPRESSORS[kind](builders.elf()), move=True)
    assert (image, kernel.bzimage, kernel.arch) == (builders.elf(), False, "amd64")


def test_a_link_is_never_moved(tmp_path: Path) -> None:
    kernel, link = tmp_path / "vmlinux-9", tmp_path / "link"
    kernel.write_bytes(builders.elf())
    link.symlink_to(kernel)
    unpack_kernel(link, tmp_path / "target", Job(), move=True)
    assert not (tmp_path / "target").is_symlink()
    assert kernel.exists()


@pytest.mark.parametrize("efi", [bytes, efi_arm64_image])
@pytest.mark.parametrize("wrap", [bytes, builders.zboot, *builders.COMPRESSORS.values()])
def test_arm64_images(wrap: Callable[[bytes], bytes], efi: Callable[[bytes], bytes]) -> None:
    image = efi(builders.arm64_image())
    kernel, unpacked = unpack(wrap(image))
    assert (unpacked, kernel.arch, kernel.version) == (image, "arm64", builders.VERSION)
    assert not kernel.bzimage


@pytest.mark.parametrize("inner", [packed(builders.elf()), builders.elf(), gzip.compress(builders.elf())])
def test_unified_kernel_image(inner: bytes) -> None:
    """What is around the kernel makes it no bzImage that a VMM could load."""
    kernel, image = unpack(efi_program({b".text": b"stub", b".linux": inner, b".initrd": b"initrd"}))
    assert image == builders.elf()
    assert not kernel.bzimage


def test_unified_kernel_image_of_arm64() -> None:
    image = efi_arm64_image(builders.arm64_image())
    for inner in (image, builders.zboot(image)):
        assert unpack(efi_program({b".linux": inner}, machine=0xAA64))[1] == image


def test_unified_kernel_image_that_holds_itself_ends() -> None:
    whole = bytearray(efi_program({b".linux": bytes(512)}))
    struct.pack_into("<IIII", whole, 0x40 + 24 + 240 + 8, len(whole), 0, len(whole), 0)
    assert refusal(bytes(whole)).code is Code.UNSUPPORTED


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (builders.elf(machine=183), "for arm64, not a 64-bit x86 kernel"),
        (builders.elf(machine=243), "for RISC-V"),
        (builders.elf(machine=2000), "machine type 2000"),
        (elf32(), "for 32-bit x86"),
        (gzip.compress(elf32()), "for 32-bit x86"),  # xen.gz
        (packed(elf32()), "for 32-bit x86"),
        (packed(builders.elf(machine=183)), "for arm64"),
        (bytes(0x38) + b"RSC\x05" + bytes(100), "for RISC-V"),
        (bytes(0x24) + b"\x18\x28\x6f\x01" + bytes(100), "for 32-bit ARM"),
        (efi_program({b".text": b"xen.efi"}), "EFI program without a Linux kernel"),
        (nameless(b""), "not a Linux kernel: it has no version"),
        (b"#!/bin/sh\n", "not a Linux kernel"),
        (b"", "not a Linux kernel"),
        (gzip.compress(b"text"), "not a Linux kernel"),
        (builders.bzimage(b"\x01unknown" * 9, 99), "unknown compression"),
        (builders.zboot(builders.arm64_image()).replace(b"\x1f\x8b\x08", b"new"), "unknown compression 'gzip'"),
        (packed(builders.elf()).replace(b"HdrS\x0c\x02", b"HdrS\x04\x02"), "boot protocol 2.04"),
    ],
)
def test_what_no_guest_can_run_is_refused(data: bytes, message: str) -> None:
    error = refusal(data)
    assert message in error.message
    assert error.code is Code.UNSUPPORTED


def test_arm64_elf_gets_a_hint() -> None:
    assert "Image" in refusal(builders.elf(machine=183)).hint


@pytest.mark.parametrize(
    ("offset", "value"),
    [(16, b"\x01\x00"), (24, bytes(8)), (24, struct.pack("<Q", 0x999)), (64, b"\x06")],
    ids=["an object file", "no entry", "an entry outside", "no segment to load"],
)
def test_elf_that_cannot_be_entered_is_refused(offset: int, value: bytes) -> None:
    image = bytearray(builders.elf())
    image[offset : offset + len(value)] = value
    error = refusal(bytes(image))
    assert "no entry point" in error.message
    assert error.code is Code.UNSUPPORTED


def test_elf_may_be_entered_by_its_virtual_address() -> None:
    image = bytearray(builders.elf())
    struct.pack_into("<Q", image, 24, 0xFFFFFFFF81000000)
    assert unpack(bytes(image))[0].arch == "amd64"


@pytest.mark.parametrize("segment", [64, 64 + 56])
def test_segment_of_nothing_may_be_anywhere(segment: int) -> None:
    """What is only zeroed in memory has no place in the file."""
    image = bytearray(builders.elf())
    struct.pack_into("<Q", image, segment + 8, 1 << 63)
    struct.pack_into("<Q", image, segment + 32, 0)
    assert unpack(bytes(image))[0].pvh == (segment == 64)


@pytest.mark.parametrize("count", [0, 0xFFFF])
def test_absurd_program_header_tables_are_refused(count: int) -> None:
    image = bytearray(builders.elf())
    struct.pack_into("<H", image, 56, count)
    assert "program header table" in refusal(bytes(image) + bytes(4 << 20)).message


@pytest.mark.parametrize("kind", builders.COMPRESSORS)
def test_unpacking_is_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bzimage, "UNPACKED_LIMIT", 1 << 20)
    assert "larger than 1 MiB" in refusal(packed(bytes(5 << 20), kind)).message
    assert "larger than 1 MiB" in refusal(builders.elf(extra=bytes(1 << 20))).message


def test_memory_does_not_grow_with_the_kernel() -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "vmlinuz"), Path(directory, "vmlinux")
        extra = bytes(32 << 20) + b"IKCFG_ST" + gzip.compress(b"CONFIG_X=y\n")
        for data in (packed(builders.elf(extra=extra)), builders.elf(extra=extra)):
            source.write_bytes(data)
            target.unlink(missing_ok=True)
            tracemalloc.start()
            try:
                unpack_kernel(source, target, Job())
                assert embedded_config(target) == "CONFIG_X=y\n"
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < 12 << 20


def test_progress_and_cancellation(tmp_path: Path) -> None:
    def cancel(progress: Progress) -> None:
        seen.append(progress)
        job.cancel()

    seen: list[Progress] = []
    job = Job(cancel)
    image = builders.elf(extra=bytes(9 << 20))
    (tmp_path / "vmlinuz").write_bytes(packed(image))
    with pytest.raises(BangerError) as caught:
        unpack_kernel(tmp_path / "vmlinuz", tmp_path / "vmlinux", job)
    assert caught.value.code is Code.CANCELLED
    (only,) = seen
    assert only.stage == "unpack"
    assert only.done is not None
    assert 0 < only.done < len(image) == only.total


def test_lzop_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostpackages, "find_command", lambda name, path=None: None)
    monkeypatch.setenv("PATH", "/absent")
    with pytest.raises(BangerError, match="lzop") as caught:
        unpack(builders.bzimage(b"\x89LZO\x00\r\n\x1a\n" * 9, 99))
    assert caught.value.code is Code.MISSING_TOOL
    assert caught.value.hint


@pytest.mark.parametrize(("banner", "distribution"), BANNERS.items())
def test_banner_tells_version_and_distribution(banner: str, distribution: str) -> None:
    kernel, _ = unpack(nameless(banner.encode() + b"\n\0"))
    assert (kernel.version, kernel.distro) == (banner.split()[2], distribution)


def test_distribution_may_be_in_the_second_banner_only() -> None:
    """Kernels since 6.1 have two; the first is compiled before the build number is known."""
    first = b"Linux version 6.8.0-50-generic (buildd@host) (gcc) # SMP PREEMPT_DYNAMIC \n\0"
    other = b"Linux version 6.9.9 (buildd@host) (gcc) #1-Alpine SMP\n\0"
    second = first.replace(b"# SMP", b"#51-Ubuntu SMP")
    kernel, _ = unpack(nameless(first + bytes(2 << 20) + other + second))
    assert (kernel.version, kernel.distro) == ("6.8.0-50-generic", "ubuntu")


@given(st.integers(-300, 300))
def test_banner_is_found_across_the_pieces_that_are_read(shift: int) -> None:
    banner = b"Linux version 6.6.6 (buildozer@build) (gcc) #1-Alpine SMP\n"
    image = nameless(b"")
    kernel, _ = unpack(image.ljust((1 << 20) + shift, b"\0") + banner)
    assert (kernel.version, kernel.distro) == ("6.6.6", "alpine")


@pytest.mark.parametrize("before", [0, (1 << 20) - 6, 3 << 20])
def test_embedded_config(tmp_path: Path, before: int) -> None:
    config = b"CONFIG_OVERLAY_FS=y\n"
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(bytes(before) + b"IKCFG_ST" + gzip.compress(config) + b"IKCFG_ED" + bytes(100))
    assert embedded_config(kernel) == config.decode()


@pytest.mark.parametrize(
    "data", [builders.elf(), b"", b"IKCFG_ST\x1f\x8b\x08 broken", b"IKCFG_ST" + gzip.compress(b"CONFIG_X=y\n")[:-9]]
)
def test_no_embedded_config(tmp_path: Path, data: bytes) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(data)
    assert embedded_config(kernel) is None


WHOLE = {
    "elf": builders.elf(),
    "gzip": packed(builders.elf()),
    "lz4": packed(builders.elf(), "lz4"),
    "zstd": packed(builders.elf(), "zstd"),
    "xz": packed(builders.elf(), "xz"),
    "zboot": builders.zboot(efi_arm64_image(builders.arm64_image())),
    "uki": efi_program({b".text": b"stub", b".linux": packed(builders.elf())}),
    "Image": efi_arm64_image(builders.arm64_image()),
}


@pytest.mark.parametrize("shape", WHOLE)
@given(st.data())
def test_damage_never_escapes_as_another_error(shape: str, data: st.DataObject) -> None:
    whole = WHOLE[shape]
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            # headers are what is parsed
            place = data.draw(st.integers(0, min(0x600, len(damaged)) - 1))
            damaged[place] = data.draw(st.integers(0, 255))
    try:
        kernel, _ = unpack(bytes(damaged))
    except BangerError:
        return
    assert kernel.version
