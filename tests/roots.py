"""Small root filesystems for tests, made of programs of this host, and images of them with a configuration."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from banger.imagecat.build import build_image
from banger.imagecat.manifest import ImageConfig
from banger.job import Job

_REPORT = r"""
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
    char directory[256] = "?", host[65] = "?";
    gethostname(host, sizeof host);
    printf("%d:%d %s on %s, HOME=%s, %d words\n", (int)getuid(), (int)getgid(), getcwd(directory, sizeof directory),
           host, getenv("HOME"), argc);
    return access("/bin/sh", F_OK) == 0 ? 9 : 0;
}
"""


def compile_report(target: Path, *compiler: str) -> None:
    """A program that prints who and where it is, and fails with status 9 when there is a shell."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*compiler, "-x", "c", "-o", target, "-"], input=_REPORT.encode(), check=True)


def distroless_root(root: Path) -> None:
    """A dynamic program with its loader and libraries, without a shell, without users."""
    compile_report(root / "app/report", "cc")
    listed = subprocess.run(["ldd", root / "app/report"], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+) \(0x", listed):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)


def busybox_commands() -> list[str]:
    """The names of what the host's busybox does."""
    listed = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if name != "busybox"]


def alpine_root(root: Path) -> None:
    """What makes Alpine different: busybox for all commands, and musl instead of glibc."""
    for directory in ("bin", "sbin", "usr/bin", "usr/sbin", "lib", "etc", "home/app", "data"):
        (root / directory).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin/busybox")
    for applet in busybox_commands():
        (root / "bin" / applet).symlink_to("/bin/busybox")
    compile_report(root / "usr/bin/report", "musl-gcc")
    (loader,) = Path("/lib").glob("ld-musl-*.so.1")
    shutil.copy(loader, root / "lib" / loader.name)
    (root / "etc/os-release").write_text('ID=alpine\nPRETTY_NAME="Alpine-like"\n')
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/ash\napp:x:1000:1000::/home/app:/bin/ash\n")
    (root / "etc/group").write_text("root:x:0:\napp:x:1000:\nwheel:x:10:app\n")


def image_of(images_dir: Path, name: str, root: Path, config: ImageConfig) -> Path:
    """The entry of an image of the tree at `root`, all of whose files are root's."""
    archive = subprocess.run(
        ["tar", "--create", "--owner=0", "--group=0", f"--directory={root}", "."], stdout=subprocess.PIPE, check=True
    ).stdout
    return image_of_stream(images_dir, name, lambda: io.BytesIO(archive), config)


def image_of_stream(images_dir: Path, name: str, open_tar: Callable[[], BinaryIO], config: ImageConfig) -> Path:
    """The entry of an image of a tar stream."""
    images_dir.mkdir(exist_ok=True)

    def opened() -> AbstractContextManager[BinaryIO]:
        return contextlib.closing(open_tar())

    build_image(images_dir, name, Job(), opened, label=name, source="a test", config=config)
    return images_dir / name


class ManyFiles(io.RawIOBase):
    """A tar archive of busybox and `directories`, each with `files` empty files, made while it is read."""

    def __init__(self, directories: int, files: int) -> None:
        self._members = self._make(directories, files)
        self._rest = b""

    def _make(self, directories: int, files: int) -> Iterator[bytes]:
        busybox = shutil.which("busybox")
        assert busybox is not None
        program = Path(busybox).read_bytes()
        member = tarfile.TarInfo("bin/busybox")
        member.mode, member.size = 0o755, len(program)
        yield member.tobuf(tarfile.USTAR_FORMAT) + program + bytes(-len(program) % tarfile.BLOCKSIZE)
        for directory in range(directories):
            names = (f"many/{directory}/{file}" for file in range(files))
            yield b"".join(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT) for name in names)
        yield bytes(2 * tarfile.BLOCKSIZE)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # what BufferedReader gives
        self._rest = self._rest or next(self._members, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
