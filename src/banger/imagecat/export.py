"""Writes local images as OCI layouts that other tools take: the whole tree as one layer, byte for byte the same."""

from __future__ import annotations

import contextlib
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk import SQUASHFS, space
from banger.imagecat import configuration
from banger.imagecat.manifest import ImageManifest, registered_problem
from banger.job import Job, command_failed, widen_pipe
from banger.oci import layout

TAR_LIMIT = 64 << 30  # bytes of the tar that a root filesystem becomes

_PRODUCER = "banger image export"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Exported:
    """What was written: the digest of the manifest ("sha256:...") and the bytes of all blobs' files."""

    digest: str
    size_bytes: int


def refuse_output(output: Path, replace: bool) -> None:
    """Raise an error when nothing can be written there, or not without replacing what is there.

    Only regular files, and directories that are such a layout and hold nothing else, are ever replaced.
    """
    try:
        mode = output.stat().st_mode
    except FileNotFoundError:
        if not output.parent.is_dir():
            raise BangerError(Code.NOT_FOUND, f"there is no directory {output.parent}") from None
        return
    except OSError as error:
        raise _not_written(output, error) from error
    if is_archive(output) and not stat.S_ISREG(mode):
        raise BangerError(Code.INVALID, f"{output} is not a regular file")
    if not is_archive(output) and not stat.S_ISDIR(mode):
        raise BangerError(
            Code.EXISTS, f"{output} exists already and is no directory", hint="an archive must end in .tar"
        )
    if not replace:
        raise BangerError(Code.EXISTS, f"{output} exists already", hint="replace it with --force")
    if not is_archive(output) and not layout.is_made_by(output, _PRODUCER):
        raise BangerError(
            Code.EXISTS,
            f"{output} is no export of banger alone: it is not replaced",
            hint="remove it yourself, or choose another --output",
        )


def is_archive(output: Path) -> bool:
    """Whether an export to this path is one file."""
    return output.name.endswith(".tar")


def export_oci(entry: Path, manifest: ImageManifest, output: Path, job: Job, *, replace: bool = False) -> Exported:
    """Write the image whose files are in `entry` as an OCI layout: a tar archive of one if `output` ends in .tar.

    It appears whole or not at all. Raises EXISTS without `replace`, UNSUPPORTED for ext4, EXHAUSTED without disk space
    or for a tree too large, INVALID for an output that cannot be written.
    """
    if manifest.filesystem != SQUASHFS:
        raise BangerError(
            Code.UNSUPPORTED,
            f"the image {manifest.name!r} is an ext4 filesystem, which cannot be read without mounting it",
            hint="mount it with 'mount -o ro,loop', 'banger image import' that directory, and export the new image",
        )
    refuse_output(output, replace)
    try:
        if is_archive(output):
            with system.staged_file(output, mode=0o644) as stream:
                archive = layout.Archive(stream)
                digest = _write(archive, entry, manifest, output, job)
                archive.finish()
                size = stream.tell()
                refuse_output(output, replace)
            return Exported(digest, size)
        with system.staging(output.parent, output.name) as staged:
            directory = staged / "layout"
            digest = _write(layout.Directory(directory), entry, manifest, output, job)
            size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            refuse_output(output, replace)
            system.sync_tree(directory)
            system.publish(directory, output)
        return Exported(digest, size)
    except OSError as error:
        raise _not_written(output, error) from error


def _write(target: layout.Target, entry: Path, manifest: ImageManifest, output: Path, job: Job) -> str:
    with target.blob() as blob, _tar_of_squashfs(entry / manifest.rootfs, job) as stream:
        layer = layout.LayerWriter(blob)
        done = 0
        while chunk := stream.read(_CHUNK):
            layer.write(chunk)
            done += len(chunk)
            job.progress("export", manifest.name, done)
            if done > TAR_LIMIT:
                raise BangerError(
                    Code.EXHAUSTED, f"the image {manifest.name!r} has more than {system.human_size(TAR_LIMIT)} of files"
                )
            if space.is_short(output.parent):
                raise BangerError(
                    Code.EXHAUSTED, f"not enough disk space in {output.parent}", hint="choose another --output"
                )
        diff_id = layer.finish()
    if not manifest.managed and (problem := registered_problem(manifest)):
        raise BangerError(Code.CORRUPT, problem, hint=f"run 'banger image verify {manifest.name}'")
    config = configuration.of_one_layer(configuration.read(entry), manifest, diff_id)
    return layout.write_image(target, blob.blob, config, _PRODUCER)


@contextlib.contextmanager
def _tar_of_squashfs(rootfs: Path, job: Job) -> Iterator[BinaryIO]:
    # without --root-becomes the root directory's own owner and mode would be lost
    argv: list[str | Path] = ["sqfs2tar", "--no-skip", "--root-becomes", ".", rootfs]
    with tempfile.TemporaryFile() as errors, job.popen(argv, stderr=errors) as child:
        stdout = cast(BinaryIO, child.stdout)
        widen_pipe(stdout)
        yield stdout
        if child.wait() != 0:
            errors.seek(0)
            raise command_failed(argv, child.returncode, errors.read(1 << 20))


def _not_written(output: Path, error: OSError) -> BangerError:
    full = space.means_full(error)
    code = Code.EXHAUSTED if full else Code.INVALID
    return BangerError(code, f"{output} cannot be written: {error.strerror}")
