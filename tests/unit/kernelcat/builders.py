"""Small kernels, packages and module trees that are right in every detail the importer looks at."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import lz4.block
import zstandard

VERSION = "6.1.0-9-test"


def banner(version: str) -> bytes:
    return f"Linux version {version} (builder@host) (gcc) #1 SMP\n".encode()


def elf(version: str = VERSION, pvh: bool = True, machine: int = 62, extra: bytes = b"") -> bytes:
    """An ELF64 executable with a PT_LOAD segment, which it is entered in, and a PT_NOTE (System V ABI, elf(5))."""
    kind = 18 if pvh else 1
    notes = struct.pack("<III", 4, 4, 6) + b"Abc\0" + bytes(4) + struct.pack("<III", 4, 8, kind) + b"Xen\0" + bytes(8)
    entry, start = 0x1000000, 64 + 2 * 56
    content = notes + banner(version) + extra
    header = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, entry, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, start, 0xFFFFFFFF81000000, entry, len(content), len(content), 4)
    note = struct.pack("<IIQQQQQQ", 4, 4, start, 0, 0, len(notes), len(notes), 4)
    return header + load + note + content


def arm64_image(version: str = VERSION) -> bytes:
    return bytes(0x38) + b"ARM\x64" + bytes(4) + banner(version)


def zboot(image: bytes) -> bytes:
    payload = gzip.compress(image)
    return b"MZ\0\0zimg" + struct.pack("<II", 64, len(payload)) + bytes(8) + b"gzip".ljust(40, b"\0") + payload


def lz4_legacy(data: bytes) -> bytes:
    blocks = (lz4.block.compress(data[at : at + (8 << 20)], store_size=False) for at in range(0, len(data), 8 << 20))
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "lz4": lz4_legacy,
}


def bzimage(payload: bytes, unpacked_size: int) -> bytes:
    """A bzImage: one setup sector, then 32 bytes of code, the payload and its unpacked size, as the build adds."""
    payload += struct.pack("<I", unpacked_size)
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x208] = b"HdrS" + struct.pack("<H", 0x20C)
    setup[0x248:0x250] = struct.pack("<II", 32, len(payload))
    return bytes(setup) + bytes(32) + payload + bytes(16)


def module(name: str) -> bytes:
    return b"\x7fELF" + name.encode() * 50


def module_tree(root: Path, dependencies: dict[str, list[str]], builtin: Iterable[str] = ()) -> Path:
    """A lib/modules/<version> directory with its indexes; paths as depmod writes them."""
    for path in dependencies:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(module(path))
    root.mkdir(parents=True, exist_ok=True)
    (root / "modules.dep").write_text("".join(f"{path}: {' '.join(needs)}\n" for path, needs in dependencies.items()))
    (root / "modules.dep.bin").write_bytes(b"index")
    (root / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in builtin))
    return root


# what Debian's cloud kernel has as modules, in short
VIRTIO = {
    "kernel/virtio/virtio.ko": [],
    "kernel/virtio/virtio_ring.ko": [],
    "kernel/virtio/virtio_pci.ko": ["kernel/virtio/virtio.ko", "kernel/virtio/virtio_ring.ko"],
    "kernel/virtio/virtio_mmio.ko": ["kernel/virtio/virtio.ko", "kernel/virtio/virtio_ring.ko"],
    "kernel/block/virtio_blk.ko": ["kernel/virtio/virtio.ko", "kernel/virtio/virtio_ring.ko"],
    "kernel/char/virtio_console.ko": ["kernel/virtio/virtio.ko", "kernel/virtio/virtio_ring.ko"],
    "kernel/char/virtio-rng.ko": ["kernel/virtio/virtio.ko"],
    "kernel/net/virtio_net.ko": ["kernel/virtio/virtio.ko"],
    "kernel/net/vmw_vsock_virtio_transport.ko": ["kernel/virtio/virtio.ko"],
    "kernel/fs/overlay.ko": [],
}
BUILTIN = ("fs/squashfs/squashfs", "fs/ext4/ext4")


def kernel_directory(root: Path, version: str = VERSION) -> Path:
    """A staged kernel as a distribution lays it out, without metadata.json."""
    (root / "boot").mkdir(parents=True, exist_ok=True)
    (root / f"boot/vmlinux-{version}").write_bytes(elf(version))
    module_tree(root / "lib/modules" / version, VIRTIO, BUILTIN)
    return root


def tar_member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(data)
    return member, data


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def ar(members: Iterable[tuple[str, bytes]]) -> bytes:
    output = b"!<arch>\n"
    for name, data in members:
        output += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}".encode()
            + b"`\n"
            + data
            + b"\n" * (len(data) % 2)
        )
    return output


def deb(members: Iterable[tuple[tarfile.TarInfo, bytes]], suffix: str = ".xz") -> bytes:
    """A Debian package (deb(5)) with this data.tar."""
    kind = {".xz": "xz", ".gz": "gzip", ".zst": "zstd"}.get(suffix)
    control = gzip.compress(tar([tar_member("./control", b"Package: linux-image-test\n")]))
    data = tar(members)
    data = COMPRESSORS[kind](data) if kind else data
    return ar([("debian-binary", b"2.0\n"), ("control.tar.gz", control), (f"data.tar{suffix}", data)])


def kernel_deb_members(version: str = VERSION, modules: str = "lib/modules") -> list[tuple[tarfile.TarInfo, bytes]]:
    image = elf(version)
    dependencies = "".join(f"{path}: {' '.join(needs)}\n" for path, needs in VIRTIO.items())
    return [
        tar_member("./", kind=tarfile.DIRTYPE),
        tar_member("./boot/", kind=tarfile.DIRTYPE),
        tar_member(f"./boot/vmlinuz-{version}", bzimage(lz4_legacy(image), len(image))),
        *(tar_member(f"./{modules}/{version}/{path}", module(path)) for path in VIRTIO),
        tar_member(f"./{modules}/{version}/modules.dep", dependencies.encode()),
        tar_member(f"./{modules}/{version}/modules.dep.bin", b"index"),
        tar_member(f"./{modules}/{version}/modules.builtin", "".join(f"{name}.ko\n" for name in BUILTIN).encode()),
        tar_member(f"./{modules}/{version}/build", kind=tarfile.SYMTYPE, link="/usr/src/linux"),
        tar_member("./usr/share/doc/linux/changelog", b"no part of the kernel"),
    ]
