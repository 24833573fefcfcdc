"""Where the home disks of an image belong, and its seed, kept up to date with the key."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.disk.squashfs import write_squashfs
from banger.disk.work_seed import write_seed_keys
from banger.imagecat.home import home_of
from banger.imagecat.importer import import_image
from banger.imagecat.manifest import WORK_SEED, ImageManifest, delete_local, read_local, write_local
from banger.imagecat.seeds import refresh_seed
from banger.job import Job
from banger.ssh_keys import SshKey, managed_key

PASSWD = """root:x:0:0:root:/root:/bin/sh
bin:x:2:2::/usr/bin:/bin/sh
slash:x:3:3::/:/bin/sh
missing:x:4:4::/nonexistent:/bin/sh
linked:x:5:5::/home/link:/bin/sh
up:x:6:6::/home/../etc:/bin/sh
lib:x:8:8::/var/lib:/bin/sh
short:x:9
app:x:1000:1000::/home/app/:/bin/sh
second:x:1000:1000::/home/second:/bin/sh
db:x:70:70::/var/lib/db:/bin/sh
2000:x:7:7::/home/digits:/bin/sh
other:x:2000:2000::/home/app:/bin/sh
"""


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in ("usr/bin", "home/app", "home/second", "home/digits", "var/lib/db", "root"):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        link = tarfile.TarInfo("home/link")
        link.type, link.linkname = tarfile.SYMTYPE, "app"
        archive.addfile(link)
        passwd = tarfile.TarInfo("etc/passwd")
        passwd.size = len(PASSWD)
        archive.addfile(passwd, io.BytesIO(PASSWD.encode()))
    path = tmp_path_factory.mktemp("rootfs") / "rootfs.squashfs"
    write_squashfs(lambda: io.BytesIO(packed.getvalue()), path, Job(), "test")
    return path


@pytest.mark.parametrize(
    ("user", "home"),
    [
        ("", "/root"),
        ("root", "/root"),
        ("0:0", "/root"),
        ("app", "/home/app"),
        ("app:staff", "/home/app"),
        ("1000", "/home/app"),
        ("1000:1000", "/home/app"),
        ("second", "/home/second"),
        ("2000", "/home/digits"),
        ("db", "/var/lib/db"),
        *(
            (user, "/root")
            for user in ("bin", "slash", "missing", "linked", "up", "lib", "short", "nobody", "4294967295")
        ),
    ],
)
def test_home_of_a_user(rootfs: Path, user: str, home: str) -> None:
    assert home_of(rootfs, user, Job()) == home


def test_an_image_without_a_passwd(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    write_squashfs(lambda: open(tmp_path / "empty.tar", "rb"), tmp_path / "rootfs", Job(), "test")
    assert home_of(tmp_path / "rootfs", "app", Job()) == "/root"


@pytest.fixture
def image(tmp_path: Path) -> ImageManifest:
    """A managed image with a file in its /root."""
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/true").write_bytes(Path("/bin/true").read_bytes())
    (tree / "bin/true").chmod(0o755)
    (tree / "root").mkdir()
    (tree / "root/note").write_text("of the image")
    return import_image(tmp_path / "images", "one", tree, Job())


def keys_in(images: Path) -> str:
    seed = images / "one" / WORK_SEED
    subprocess.run(["e2fsck", "-fn", seed], check=True, capture_output=True)
    argv = ["debugfs", "-R", "cat /.ssh/authorized_keys", str(seed)]
    return subprocess.run(argv, check=True, capture_output=True).stdout.decode()


def refresh(images: Path, image: ImageManifest, key: SshKey, lock: threading.Lock | None = None) -> ImageManifest:
    return refresh_seed(images, image, key, lambda: lock or threading.Lock(), Job())


def test_a_seed_follows_the_key(tmp_path: Path, image: ImageManifest) -> None:
    images = tmp_path / "images"
    first, second = managed_key(tmp_path / "first"), managed_key(tmp_path / "second")
    assert image.home == "/root"
    assert image.key_fingerprint == ""
    renewed = refresh(images, image, first)
    assert renewed == dataclasses.replace(image, key_fingerprint=first.fingerprint) == read_local(images, "one")
    assert first.public in keys_in(images)
    before = (images / "one" / WORK_SEED).stat()
    assert refresh(images, renewed, first) == renewed
    assert (images / "one" / WORK_SEED).stat() == before
    # whoever still has the old manifest gets the same
    assert refresh(images, image, first) == renewed
    assert refresh(images, renewed, second).key_fingerprint == second.fingerprint
    assert first.public not in keys_in(images)
    assert second.public in keys_in(images)
    assert sorted(entry.name for entry in images.iterdir()) == ["one"]


def test_many_refresh_at_once(tmp_path: Path, image: ImageManifest) -> None:
    images, key, lock = tmp_path / "images", managed_key(tmp_path / "key"), threading.Lock()
    results: list[ImageManifest] = []
    threads = [threading.Thread(target=lambda: results.append(refresh(images, image, key, lock))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.key_fingerprint for result in results] == [key.fingerprint] * 8
    assert key.public in keys_in(images)


def test_killed_between_seed_and_manifest(tmp_path: Path, image: ImageManifest) -> None:
    """The seed has the key, the manifest does not say so: it is done again."""
    images, key = tmp_path / "images", managed_key(tmp_path / "key")
    refresh(images, image, key)
    write_local(images / "one", image)
    assert refresh(images, image, key).key_fingerprint == key.fingerprint
    assert keys_in(images).count(key.public) == 1


def test_an_image_that_is_removed_meanwhile(tmp_path: Path, image: ImageManifest) -> None:
    delete_local(tmp_path / "images", "one")
    without = dataclasses.replace(image)
    assert refresh(tmp_path / "images", without, managed_key(tmp_path / "key")) == image  # there is no seed to refresh
    assert list((tmp_path / "images").iterdir()) == []


def test_a_seed_that_cannot_take_the_key(tmp_path: Path, image: ImageManifest) -> None:
    seed = tmp_path / "images/one" / WORK_SEED
    seed.write_bytes(b"no filesystem" * 1000)
    with pytest.raises(BangerError) as caught:
        refresh(tmp_path / "images", image, managed_key(tmp_path / "key"))
    assert caught.value.code is Code.CORRUPT
    assert seed.read_bytes() == b"no filesystem" * 1000
    assert read_local(tmp_path / "images", "one") == image


def test_a_nested_home_is_repaired(tmp_path: Path, image: ImageManifest) -> None:
    """In a seed that came with its image."""
    key, seed = managed_key(tmp_path / "key"), tmp_path / "images/one" / WORK_SEED
    (tmp_path / "nested/root").mkdir(parents=True)
    (tmp_path / "nested/root/note").write_text("nested")
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tmp_path / "nested"), str(seed)]
    subprocess.run(argv, check=True, capture_output=True)
    write_seed_keys(seed, [], Job())
    refresh(tmp_path / "images", image, key)
    assert key.public in keys_in(tmp_path / "images")
    note = subprocess.run(["debugfs", "-R", "cat /note", seed], check=True, capture_output=True).stdout
    assert note == b"nested"
