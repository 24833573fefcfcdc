"""Debian's own kernels, as they are and packed anew by the commands that kernel builds use."""

import hashlib
import re
import struct
import subprocess
from pathlib import Path

import pytest

from banger import debian
from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.kernelcat.bzimage import unpack_kernel
from tests.daemons import shared_directory

# what scripts/Makefile.lib and scripts/xz_wrap.sh of Linux run, at levels that do not take half a minute; zstd --ultra
# -22 is about its window of 128 MiB here
COMMANDS = {
    "gzip": ["gzip", "-n", "-1"],
    "bzip2": ["bzip2", "-9"],
    "lzma": ["lzma", "-0"],
    "xz": ["xz", "--check=crc32", "--x86", "--lzma2=preset=0,dict=32MiB"],
    "lzo": ["lzop", "-1"],
    "lz4": ["lz4", "-l", "-c1"],
    "zstd": ["zstd", "-1", "--long=27"],
}
FAST = ["gzip", "lzo", "lz4", "zstd"]


def package(factory: pytest.TempPathFactory, name: str, arch: str) -> Path:
    """The unpacked files of a Debian kernel package, downloaded once for all workers of a test run."""
    with shared_directory(factory, f"{name}-{arch}") as shared:
        root = shared / "root"
        if not root.exists():
            (file,) = debian.download(
                [name], "bookworm", arch, Job(), into=shared, cache=shared / "cache", mirror=debian.find_mirror()
            )
            partial = shared / "partial"
            subprocess.run(["dpkg-deb", "-x", file, partial], check=True)
            partial.rename(root)
    return root


def vmlinuz(root: Path) -> Path:
    (file,) = (root / "boot").glob("vmlinuz-*")
    return file


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vmlinuz(package(tmp_path_factory, "linux-image-cloud-amd64", "amd64"))


@pytest.fixture(scope="session")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vmlinuz(package(tmp_path_factory, "linux-image-cloud-arm64", "arm64"))


@pytest.fixture(scope="session")
def vmlinux(cloud: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uncompressed ELF in Debian's cloud kernel."""
    target = tmp_path_factory.mktemp("cloud") / "vmlinux"
    unpack_kernel(cloud, target, Job())
    return target


def pack(kind: str, image: Path) -> bytes:
    with open(image, "rb") as stdin:
        return subprocess.run(COMMANDS[kind], stdin=stdin, stdout=subprocess.PIPE, check=True).stdout


def digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def test_real_bzimage(cloud: Path, vmlinux: Path, tmp_path: Path) -> None:
    kernel = unpack_kernel(cloud, tmp_path / "vmlinux", Job())
    assert (kernel.arch, kernel.bzimage, kernel.pvh, kernel.distro) == ("amd64", True, True, "debian")
    assert f"vmlinuz-{kernel.version}" == cloud.name
    assert kernel.sha256 == digest(tmp_path / "vmlinux")
    # binutils reads it as what it is
    header = subprocess.run(["readelf", "-hW", vmlinux], check=True, capture_output=True, text=True).stdout
    assert re.search(r"Type: +EXEC", header)
    assert re.search(r"Machine: +Advanced Micro Devices X86-64", header)


@pytest.mark.parametrize("kind", COMMANDS)
def test_real_kernel_packed_by_real_commands(cloud: Path, vmlinux: Path, tmp_path: Path, kind: str) -> None:
    """As a bzImage with Debian's own setup code, as an EFI zboot image, and alone: always the same bytes."""
    payload = pack(kind, vmlinux)
    trailer = b"" if kind == "gzip" else struct.pack("<I", vmlinux.stat().st_size)  # gzip has it already
    real = cloud.read_bytes()
    offset, length = struct.unpack_from("<II", real, 0x248)
    start = (real[0x1F1] + 1) * 512 + offset
    head = bytearray(real[:start])
    struct.pack_into("<I", head, 0x24C, len(payload + trailer))
    shapes = {"bzImage": bytes(head) + payload + trailer + real[start + length :]}
    if kind in FAST:
        named = b"zstd22" if kind == "zstd" else kind.encode()
        zboot = b"MZ\0\0zimg" + struct.pack("<II8x", 64, len(payload)) + named.ljust(40, b"\0")
        shapes |= {"vmlinuz.efi": zboot + payload + trailer, "vmlinux.packed": payload}
    expected = digest(vmlinux)
    for name, content in shapes.items():
        (tmp_path / name).write_bytes(content)
        target = tmp_path / "vmlinux"
        kernel = unpack_kernel(tmp_path / name, target, Job())
        assert (kernel.sha256, digest(target)) == (expected, expected)
        assert (kernel.bzimage, kernel.distro) == (name == "bzImage", "debian")
        target.unlink()


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_damaged_real_payload_is_refused(vmlinux: Path, tmp_path: Path, kind: str, damage: str) -> None:
    with open(vmlinux, "rb") as stream:
        part = tmp_path / "part"
        part.write_bytes(stream.read(3 << 20))
    payload = bytearray(pack(kind, part))
    if damage == "cut off":
        del payload[-len(payload) // 3 :]
    else:
        middle = len(payload) // 2
        payload[middle : middle + 400] = bytes(400)
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x208] = b"HdrS\x0f\x02"
    payload += struct.pack("<I", part.stat().st_size)
    struct.pack_into("<II", setup, 0x248, 0, len(payload))
    (tmp_path / "vmlinuz").write_bytes(bytes(setup + payload))
    with pytest.raises(BangerError, match="'vmlinuz' is damaged") as caught:
        unpack_kernel(tmp_path / "vmlinuz", tmp_path / "vmlinux", Job())
    assert caught.value.code is Code.CORRUPT


def test_lzo_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("banger.kernelcat.bzimage.UNPACKED_LIMIT", 2 << 20)
    packed = subprocess.run(["lzop", "-1"], input=bytes(64 << 20), stdout=subprocess.PIPE, check=True).stdout
    (tmp_path / "Image.lzo").write_bytes(packed)
    with pytest.raises(BangerError, match="larger than 2 MiB"):
        unpack_kernel(tmp_path / "Image.lzo", tmp_path / "vmlinux", Job())
    assert (tmp_path / "vmlinux").stat().st_size <= 2 << 20


def test_real_arm64_image(arm64: Path, tmp_path: Path) -> None:
    """It begins with 'MZ', as every EFI program does."""
    assert arm64.read_bytes()[:2] == b"MZ"
    kernel = unpack_kernel(arm64, tmp_path / "vmlinux", Job())
    assert (kernel.arch, kernel.bzimage, kernel.distro) == ("arm64", False, "debian")
    assert f"vmlinuz-{kernel.version}" == arm64.name
    assert kernel.sha256 == digest(tmp_path / "vmlinux")
    cut = tmp_path / "cut"
    cut.write_bytes(arm64.read_bytes()[: -(1 << 20)])
    with pytest.raises(BangerError, match="larger arm64 Image"):
        unpack_kernel(cut, tmp_path / "again", Job())


@pytest.mark.parametrize("kind", FAST)
def test_real_arm64_image_packed_by_real_commands(arm64: Path, tmp_path: Path, kind: str) -> None:
    """As arch/arm64/boot makes Image.gz and the like; before Linux 5.19 with the unpacked size after most."""
    image = tmp_path / "Image"
    unpack_kernel(arm64, image, Job())
    payload = pack(kind, image)
    for trailer in (b"", struct.pack("<I", image.stat().st_size)):
        (tmp_path / "packed").write_bytes(payload + trailer)
        kernel = unpack_kernel(tmp_path / "packed", tmp_path / "vmlinux", Job())
        assert kernel.sha256 == digest(image)
        (tmp_path / "vmlinux").unlink()


def test_unified_kernel_image_made_by_objcopy(cloud: Path, vmlinux: Path, tmp_path: Path) -> None:
    """As ukify does it: the kernel is a section of an EFI program, here of the kernel's own stub."""
    unified = tmp_path / "unified.efi"
    argv = ["objcopy", "--add-section", f".linux={cloud}", "--change-section-vma", ".linux=0x80000000"]
    subprocess.run([*argv, cloud, unified], check=True)
    head = bytearray(unified.read_bytes())
    assert head[:2] == b"MZ"
    head[0x202:0x206] = bytes(4)  # the stub of systemd has no setup header
    unified.write_bytes(head)
    kernel = unpack_kernel(unified, tmp_path / "vmlinux", Job())
    assert kernel.sha256 == digest(vmlinux)
    assert not kernel.bzimage
