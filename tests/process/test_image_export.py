"""Exported images are what other tools take: the same tree to the owner, mode, xattr and link, and the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.imagecat import configuration
from banger.imagecat.export import export_oci
from banger.imagecat.importer import import_image
from banger.imagecat.manifest import ImageConfig, ImageManifest, Layer, read_local, write_local
from banger.imagecat.register import register_image
from banger.job import Job, Progress
from banger.vmm.detect import host_arch
from tests.daemons import running_daemon
from tests.process.test_image_register import banger, ext4, install_kernel, root_directory

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep, <linux/capability.h>
CONFIG = {
    "created": "2024-05-06T07:08:09Z",
    "architecture": host_arch(),
    "os": "linux",
    "container": "of docker",
    "config": {"Cmd": ["/usr/bin/tool", "a b"], "Labels": {"b": "2", "a": "1"}, "StopSignal": "SIGINT"},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "1" * 64, "sha256:" + "2" * 64]},
    "history": [
        {"created": "2024-05-06T07:08:07Z", "created_by": "ADD rootfs.tar"},
        {"created_by": "CMD tool", "empty_layer": True, "comment": "no layer"},
        {"created": "2024-05-06T07:08:09Z", "created_by": "RUN make"},
    ],
}
LAYERS = (
    Layer("sha256:" + "3" * 64, "sha256:" + "1" * 64, 1000),
    Layer("sha256:" + "4" * 64, "sha256:" + "2" * 64, 20),
)


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """An image without anything that only root can make."""
    root_directory(tmp_path / "root")
    (tmp_path / "root/usr/bin/copy").hardlink_to(tmp_path / "root/usr/bin/tool")
    import_image(tmp_path / "images", "tiny", tmp_path / "root", Job())
    return tmp_path / "images/tiny"


def with_config(entry: Path) -> ImageManifest:
    """The same image as if it had been pulled."""
    manifest = read_local(entry.parent, entry.name)
    pulled = ImageManifest(**{**vars(manifest), "layers": LAYERS})
    write_local(entry, pulled)
    (entry / "config.json").write_text(json.dumps(CONFIG))
    return pulled


def export(entry: Path, output: Path, replace: bool = False) -> str:
    return export_oci(entry, read_local(entry.parent, entry.name), output, Job(), replace=replace).digest


def run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def described(tree: Path) -> dict[str, tuple[object, ...]]:
    """All that a file system tells of each file; hard links by the first path that they share."""
    first: dict[int, str] = {}
    found: dict[str, tuple[object, ...]] = {}
    for path in [tree, *sorted(tree.rglob("*"))]:
        name = path.relative_to(tree).as_posix()
        status = path.lstat()
        content = ""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        shared = first.setdefault(status.st_ino, name) if status.st_nlink > 1 and not path.is_dir() else ""
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        }
        device = status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0
        owner = (status.st_uid, status.st_gid)
        found[name] = (oct(status.st_mode), owner, int(status.st_mtime), device, content, shared, xattrs)
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make devices, owners and file capabilities")
@pytest.mark.parametrize("name", ["layout", "archive.tar"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    tree = root_directory(tmp_path / "root")
    (tree / "usr/bin/copy").hardlink_to(tree / "usr/bin/tool")
    os.setxattr(tree / "usr/bin/tool", "security.capability", CAPABILITY)
    os.setxattr(tree / "etc", "user.note", b"binary\0\xff")
    os.chown(tree / "usr/bin/a script", 1000, 60_000_000)
    (tree / "usr/bin/a script").chmod(0o6711)
    os.chown(tree / "bin", 12, 13, follow_symlinks=False)
    (tree / "tmp").mkdir()
    (tree / "tmp").chmod(0o1777)
    os.mknod(tree / "usr/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(tree / "usr/disk", stat.S_IFBLK | 0o640, os.makedev(259, 70_000))
    os.mkfifo(tree / "usr/fifo", 0o620)
    (tree / "usr" / ("ü" * 120)).write_bytes(b"")
    deep = tree / "/".join(["usr", *["d" * 100] * 6])
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(os.urandom(3 << 20))
    with open(tree / "usr/sparse", "wb") as stream:
        stream.truncate(5 << 20)
    tree.chmod(0o750)
    os.chown(tree, 5, 6)
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, (1_700_000_000, 1_700_000_000), follow_symlinks=False)
    import_image(tmp_path / "images", "tiny", tree, Job())
    output = tmp_path / name
    export(tmp_path / "images/tiny", output)
    layout = output
    if name.endswith(".tar"):
        layout = tmp_path / "copied"
        run("skopeo", "copy", "--quiet", f"oci-archive:{output}", f"oci:{layout}:latest")
    run("umoci", "unpack", "--image", layout, tmp_path / "bundle")
    assert described(tmp_path / "bundle/rootfs") == described(tree)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_archive_can_be_read_without_root(entry: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:  # which others may enter, unlike pytest's
        shared = Path(directory)
        shared.chmod(0o777)
        export(entry, shared / "archive.tar")
        with tarfile.open(shared / "archive.tar") as archive:
            directories = [(member.name, member.mode) for member in archive if member.isdir()]
        assert directories == [("blobs", 0o755), ("blobs/sha256", 0o755)]
        argv = ["skopeo", "copy", "--quiet", "--insecure-policy", "oci-archive:archive.tar", "oci:copied:latest"]
        environment = {"PATH": os.environ["PATH"], "HOME": directory, "TMPDIR": directory}
        done = subprocess.run(
            argv, cwd=shared, env=environment, user=65534, group=65534, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_the_same_bytes_every_time(tmp_path: Path, entry: Path) -> None:
    with_config(entry)
    digests = {export(entry, tmp_path / name) for name in ("one", "two", "one.tar", "two.tar")}
    assert len(digests) == 1
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        if file.parent.name == "sha256":
            assert hashlib.sha256((tmp_path / "one" / file).read_bytes()).hexdigest() == file.name
    with tarfile.open(tmp_path / "one.tar") as archive:
        assert {Path(member.name) for member in archive if member.isfile()} == set(files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "one", "one.tar", "root", "two", "two.tar"]


def inspected(where: str) -> tuple[dict[str, object], dict[str, object]]:
    """What skopeo says of an image, and its configuration."""
    return json.loads(run("skopeo", "inspect", where)), json.loads(run("skopeo", "inspect", "--config", where))


def test_the_configuration_of_a_pulled_image_stays(tmp_path: Path, entry: Path) -> None:
    with_config(entry)
    digest = export(entry, tmp_path / "layout")
    image, config = inspected(f"oci:{tmp_path / 'layout'}")
    assert (image["Digest"], image["Architecture"], image["Os"]) == (digest, host_arch(), "linux")
    assert (config["created"], config["config"]) == (CONFIG["created"], CONFIG["config"])
    assert "container" not in config
    history = config["history"]
    assert isinstance(history, list)
    assert [step.get("created_by") for step in history] == [
        "ADD rootfs.tar", "CMD tool", "RUN make", "banger image export tiny",
    ]  # fmt: skip
    assert [step.get("empty_layer", False) for step in history] == [True, True, True, False]


def test_the_configuration_of_an_image_without_one(tmp_path: Path, entry: Path) -> None:
    manifest = read_local(entry.parent, "tiny")
    config = ImageConfig(
        entrypoint=("/usr/bin/tool",),
        cmd=("x",),
        env=("A=1",),
        user="1:2",
        workdir="/usr",
        volumes=("/data",),
        exposed_ports=("80/tcp",),
        stop_signal="SIGQUIT",
    )
    write_local(entry, ImageManifest(**{**vars(manifest), "config": config}))
    export(entry, tmp_path / "layout.tar")
    _, written = inspected(f"oci-archive:{tmp_path / 'layout.tar'}")
    assert written["created"] == manifest.imported_at
    assert written["config"] == {
        "Entrypoint": ["/usr/bin/tool"],
        "Cmd": ["x"],
        "Env": ["A=1"],
        "User": "1:2",
        "WorkingDir": "/usr",
        "Volumes": {"/data": {}},
        "ExposedPorts": {"80/tcp": {}},
        "StopSignal": "SIGQUIT",
    }


def test_what_is_replaced_and_what_never(tmp_path: Path, entry: Path) -> None:
    layout, archive = tmp_path / "layout", tmp_path / "layout.tar"
    for output in (layout, archive):
        export(entry, output)
        with pytest.raises(BangerError, match="exists already") as caught:
            export(entry, output)
        assert (caught.value.code, caught.value.hint) == (Code.EXISTS, "replace it with --force")
        export(entry, output, replace=True)

    (layout / "notes").write_text("mine")
    with pytest.raises(BangerError, match="no export of banger alone"):
        export(entry, layout, replace=True)
    assert (layout / "notes").read_text() == "mine"
    (layout / "notes").unlink()
    run("skopeo", "copy", "--quiet", f"oci-archive:{archive}", f"oci:{layout}:other")
    with pytest.raises(BangerError, match="no export of banger alone"):
        export(entry, layout, replace=True)

    makers: list[tuple[str, Callable[[Path], object], str]] = [
        ("directory", lambda path: path.mkdir(), "no export of banger alone"),
        ("directory.tar", lambda path: path.mkdir(), "is not a regular file"),
        ("file", lambda path: path.write_text("mine"), "exists already and is no directory"),
        ("absent/layout", lambda path: None, "there is no directory"),
        ("file/layout.tar", lambda path: None, "cannot be written|there is no directory"),
    ]
    for name, make, message in makers:
        make(tmp_path / name)
        with pytest.raises(BangerError, match=message):
            export(entry, tmp_path / name, replace=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert not list(tmp_path.rglob(".staging-*"))


@pytest.mark.parametrize("name", ["layout", "layout.tar"])
def test_an_export_that_fails_leaves_nothing(tmp_path: Path, entry: Path, name: str) -> None:
    manifest = read_local(entry.parent, "tiny")

    def fail(progress: Progress) -> None:
        raise BangerError(Code.CANCELLED, "stopped")

    with pytest.raises(BangerError, match="stopped"):
        export_oci(entry, manifest, tmp_path / name, Job(fail))
    rootfs = entry / "rootfs.squashfs"
    rootfs.write_bytes(rootfs.read_bytes()[:200])
    with pytest.raises(BangerError, match="sqfs2tar failed"):
        export_oci(entry, manifest, tmp_path / name, Job())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "root"]


def test_limits(tmp_path: Path, entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("banger.imagecat.export.TAR_LIMIT", 100 << 10)
    with pytest.raises(BangerError, match="has more than 100 KiB of files"):
        export(entry, tmp_path / "layout")
    monkeypatch.setattr("banger.disk.space.RESERVE", 1 << 60)
    monkeypatch.setattr("banger.imagecat.export.TAR_LIMIT", 1 << 40)
    with pytest.raises(BangerError, match="not enough disk space in") as caught:
        export(entry, tmp_path / "layout")
    assert caught.value.code is Code.EXHAUSTED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "root"]


def test_ext4_is_refused(tmp_path: Path) -> None:
    rootfs = ext4(tmp_path / "rootfs.ext4", root_directory(tmp_path / "root"))
    register_image(tmp_path / "images", "disk", rootfs, install_kernel(tmp_path / "kernels"), Job())
    with pytest.raises(BangerError, match="the image 'disk' is an ext4 filesystem") as caught:
        export(tmp_path / "images/disk", tmp_path / "out")
    assert caught.value.code is Code.UNSUPPORTED
    assert "banger image import" in caught.value.hint


def test_history(entry: Path) -> None:
    steps = configuration.history(configuration.read(entry), read_local(entry.parent, "tiny"))
    assert [(step.created_by, step.comment) for step in steps] == [(str(entry.parent.parent / "root"), "")]
    manifest = with_config(entry)
    steps = configuration.history(configuration.read(entry), manifest)
    assert [(step.created_by, step.size_bytes, step.comment) for step in steps] == [
        ("RUN make", 20, ""),
        ("CMD tool", 0, "no layer"),
        ("ADD rootfs.tar", 1000, ""),
    ]
    assert configuration.labels(configuration.read(entry)) == {"a": "1", "b": "2"}
    for hostile in ("", "[]", "null", '{"history": 1}', '{"history": [1, null, {"created_by": []}]}', "[" * 100_000):
        (entry / "config.json").write_text(hostile)
        config = configuration.read(entry)
        assert configuration.labels(config) == {}
        assert configuration.created(config) == ""
        assert sum(step.size_bytes for step in configuration.history(config, manifest)) == 1020


def test_by_command(tmp_path: Path, entry: Path) -> None:
    with_config(entry)
    with running_daemon(tmp_path / "daemon", entries=[entry]) as daemon:
        said = banger(daemon, "image", "export", "tiny", "--oci", "-o", "out.tar", cwd=tmp_path)
        digest = inspected(f"oci-archive:{tmp_path / 'out.tar'}")[0]["Digest"]
        assert said.startswith(f"exported tiny to {tmp_path / 'out.tar'}: {digest}, ")
        assert "replace it with --force" in banger(
            daemon, "image", "export", "tiny", "--oci", "-o", "out.tar", status=1, cwd=tmp_path
        )
        told = json.loads(
            banger(daemon, "image", "export", "tiny", "--oci", "-o", "out.tar", "--force", "--json", cwd=tmp_path)
        )
        assert told["digest"] == digest
        assert "--oci" in banger(daemon, "image", "export", "tiny", "-o", "x.tar", status=2)
        assert "there is no directory" in banger(
            daemon, "image", "export", "tiny", "--oci", "-o", "/nowhere/x", status=2
        )
        shown = json.loads(banger(daemon, "image", "show", "tiny", "--json"))
        assert (shown["layers"], shown["created"], shown["labels"]) == (2, CONFIG["created"], {"a": "1", "b": "2"})
        assert "RUN make" in banger(daemon, "image", "history", "tiny")
        for request, message in (
            (m.ImageExport("tiny", "out.tar"), "is not an absolute path"),
            (m.ImageExport("tiny", str(tmp_path / "x"), format="zip"), "'zip' is not a format"),
            (m.ImageExport("tinu", str(tmp_path / "x")), "there is no image 'tinu'"),
        ):
            with pytest.raises(BangerError, match=message):
                daemon.client.call(op.IMAGE_EXPORT, request)
        assert [path.name for path in daemon.layout.images.iterdir()] == ["tiny"]
