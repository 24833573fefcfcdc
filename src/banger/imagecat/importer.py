"""Makes local images out of root filesystems: archives and directories."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from banger.api.errors import BangerError, Code
from banger.decompress import open_decompressed
from banger.disk.squashfs import TarSource
from banger.imagecat.build import Publishing, build_image
from banger.imagecat.manifest import ImageManifest
from banger.job import Job, command_failed
from banger.recognise import COMPRESSED, DIRECTORY, TAR, UNKNOWN, recognise


def import_image(
    images_dir: Path,
    name: str,
    source: Path,
    job: Job,
    *,
    source_label: str | None = None,
    kernel: Path | None = None,
    replace: bool = False,
    publishing: Publishing = contextlib.nullcontext,
) -> ImageManifest:
    """Make the image `name` of a root filesystem: a directory, or a tar archive (plain, gzip, xz, zstd or bzip2).

    `kernel` is as for `build_image`. Raises NOT_FOUND without a source, EXISTS without `replace`, INVALID for another
    kind of file, CORRUPT for a bad archive or what is no root filesystem, EXHAUSTED without disk space.
    """
    found = recognise(source)
    open_tar: TarSource
    if found.kind == DIRECTORY:
        open_tar = functools.partial(_tar_of_directory, source, job)
    elif found.kind in (TAR, COMPRESSED, UNKNOWN):  # of a damaged archive its reader says more
        open_tar = functools.partial(open_decompressed, source, job, "import")
    else:
        message = f"{source} is {found.what}, not a root filesystem in a tar archive or a directory"
        raise BangerError(Code.INVALID, message, hint=found.advice)
    return build_image(
        images_dir,
        name,
        job,
        open_tar,
        label=str(source),
        source=source_label or str(source),
        kernel=kernel,
        replace=replace,
        publishing=publishing,
    )


@contextlib.contextmanager
def _tar_of_directory(directory: Path, job: Job) -> Iterator[BinaryIO]:
    job.progress("import", str(directory))
    argv = [
        "tar",
        "--create",
        "--format=pax",
        "--numeric-owner",
        "--xattrs",
        "--xattrs-include=*",
        "--sparse",
        "--one-file-system",
        "--warning=no-file-ignored",  # sockets
        f"--directory={directory}",
        ".",
    ]
    with tar_output(argv, job) as stream:
        yield stream


@contextlib.contextmanager
def tar_output(argv: list[str], job: Job) -> Iterator[BinaryIO]:
    """The standard output of a command that writes a tar archive; raises the command's own error when it fails."""
    with tempfile.TemporaryFile() as errors, job.popen(argv, stderr=errors) as child:
        stdout = cast(BinaryIO, child.stdout)

        def check_status() -> None:
            if child.wait() != 0:
                errors.seek(0)
                raise command_failed(argv, child.returncode, errors.read(1 << 20))

        try:
            yield stdout
        except BangerError as error:
            # an archive that is cut off is the consequence; how the command ended is the reason
            if error.code == Code.CORRUPT and not stdout.read(1):
                check_status()
            raise
        check_status()
