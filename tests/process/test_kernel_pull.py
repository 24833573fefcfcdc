"""Debian's cloud kernel, pulled for real through a private apt, becomes a bootable entry."""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger import debian
from banger.api.errors import BangerError, Code
from banger.guest.bootarchive import boot_archive
from banger.imagecat import debian as image
from banger.imagecat.catalog import IMAGES
from banger.job import Job, Progress
from banger.kernelcat import manifest
from banger.kernelcat.catalog import KERNELS, CatalogEntry
from banger.kernelcat.fetch import Environment, fetch
from banger.kernelcat.modules import DRIVERS
from tests.children import child
from tests.unit.guest.test_cpio import read_archives

CLOUD = "linux-image-cloud-amd64"
NOBODY = 65534
OLD_KEYS = Path("/usr/share/keyrings/debian-archive-bookworm-stable.gpg")

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not installed")


def cloud(arch: str = "amd64") -> CatalogEntry:
    return KERNELS.lookup(KERNELS.embedded().entries, "debian-cloud", arch)


@pytest.fixture(scope="session")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernels directory with debian-cloud in it, and the one for arm64 as `foreign`, pulled once in a test run."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pulled-kernel"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arch, name in (("amd64", "debian-cloud"), ("arm64", "foreign")):
            if not (shared / "kernels" / name).exists():  # other modules' tests share the first of them
                fetch(shared / "kernels", name, cloud(arch), Job(), environment=Environment(shared / "cache"))
    return shared / "kernels"


def test_manifest_names_the_real_package(pulled: Path) -> None:
    kernel = manifest.read_local(pulled, "debian-cloud")
    assert (kernel.distro, kernel.arch, kernel.modules, kernel.missing) == ("debian", "amd64", True, ())
    match = re.fullmatch(r"deb:linux-image-(.+)=(\S+)", kernel.source)
    assert match is not None
    assert match[1] == kernel.kernel_version
    # PVH: the unpacked ELF is enough for QEMU too
    assert kernel.pvh
    assert not (pulled / "debian-cloud/vmlinuz").exists()
    assert (pulled / "debian-cloud/vmlinux").read_bytes()[:4] == b"\x7fELF"


def test_kernel_for_arm64(pulled: Path) -> None:
    """An Image, not an ELF; its modules are those that its own modprobe would load for these drivers."""
    kernel = manifest.read_local(pulled, "foreign")
    assert (kernel.distro, kernel.arch, kernel.modules, kernel.missing) == ("debian", "arm64", True, ())
    assert kernel.kernel_version.endswith("-cloud-arm64")
    assert (pulled / "foreign/vmlinux").read_bytes()[0x38:0x3C] == b"ARM\x64"
    read: list[str | Path] = ["rdsquashfs", "--cat=/modules.builtin", pulled / "foreign/modules.squashfs"]
    builtin = subprocess.run(read, check=True, capture_output=True, text=True).stdout
    names = {Path(path).stem.replace("-", "_") for path in [*kernel.boot_modules, *builtin.splitlines()]}
    assert {driver.module for driver in DRIVERS if driver.needed} - {""} <= names


def test_modprobe_finds_modules_and_dependencies(pulled: Path, tmp_path: Path) -> None:
    """The squashfs is what /lib/modules/<version> must be: modprobe resolves through its indexes."""
    kernel = manifest.read_local(pulled, "debian-cloud")
    target = tmp_path / "lib/modules" / kernel.kernel_version
    target.mkdir(parents=True)
    image = pulled / "debian-cloud/modules.squashfs"
    subprocess.run(["rdsquashfs", "-q", "-u", "/", "-p", target, image], check=True, capture_output=True)
    shown = subprocess.run(
        ["modprobe", "-d", tmp_path, "-S", kernel.kernel_version, "--show-depends", "wireguard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    loaded = [Path(line.split()[1]).name for line in shown.splitlines() if line.startswith("insmod")]
    assert loaded[-1] == "wireguard.ko"
    assert "udp_tunnel.ko" in loaded


@pytest.mark.parametrize("name", ["debian-cloud", "foreign"])
def test_boot_modules_load_after_what_they_need(pulled: Path, tmp_path: Path, name: str) -> None:
    """Checked against what each module itself says that it depends on (modinfo)."""
    agent = tmp_path / "agent"
    agent.write_bytes(b"\x7fELF")
    archive = boot_archive(pulled / name, agent)
    half = (pulled / name / "boot-modules.cpio").read_bytes()
    assert archive.read_bytes().startswith(half)
    (members,) = read_archives(half)
    files = {member.name.decode(): member.data for member in members}
    seen: set[str] = set()
    for line in files["modules/order"].decode().splitlines():
        module = tmp_path / Path(line).name
        module.write_bytes(files[line.lstrip("/")])
        fields = ("-F", "depends", module), ("-F", "name", module)
        depends, own = (
            subprocess.run(["modinfo", *field], check=True, capture_output=True, text=True).stdout.strip()
            for field in fields
        )
        assert set(depends.split(",")) - {""} <= seen
        seen.add(own)
    assert {"virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "overlay", "squashfs"} <= seen


def test_taken_name_is_refused_before_any_download(pulled: Path, tmp_path: Path) -> None:
    with pytest.raises(BangerError) as caught:
        fetch(pulled, "debian-cloud", cloud(), Job(), environment=Environment(tmp_path / "cache"))
    assert caught.value.code is Code.EXISTS
    assert not (tmp_path / "cache").exists()


def test_cancelled_pull_leaves_nothing(tmp_path: Path) -> None:
    def cancel(progress: Progress) -> None:
        if progress.stage == "packages":
            job.cancel()

    job = Job(cancel)
    with pytest.raises(BangerError) as caught:
        fetch(tmp_path / "kernels", "debian-cloud", cloud(), job, environment=Environment(tmp_path / "cache"))
    assert caught.value.code is Code.CANCELLED
    assert not (tmp_path / "kernels").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["apt"]


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that another user can reach and write."""
    with tempfile.TemporaryDirectory() as name:
        if os.getuid() == 0:
            os.chown(name, NOBODY, NOBODY)
        yield Path(name)


def download_as_nobody(directory: Path) -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    os.chdir(directory)
    (package,) = debian.download(
        [CLOUD],
        "bookworm",
        "amd64",
        Job(),
        into=directory,
        cache=directory / "cache",
        mirror=debian.find_mirror(),
    )
    assert package.stat().st_uid == os.getuid() != 0


def test_download_needs_no_root(open_directory: Path) -> None:
    process = child(download_as_nobody, open_directory)
    process.join()
    assert process.exitcode == 0
    # the metapackage was followed, not downloaded
    (package,) = open_directory.glob("*.deb")
    assert re.fullmatch(r"linux-image-6\.1\.0-\d+-cloud-amd64_.*_amd64\.deb", package.name)


def test_unsigned_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "archive/dists/bookworm"
    (archive / "main/binary-amd64").mkdir(parents=True)
    (archive / "main/binary-amd64/Packages").write_text(
        f"Package: {CLOUD}\nVersion: 1\nArchitecture: amd64\nFilename: pool/x.deb\nSize: 0\n"
    )
    (archive / "Release").write_text("Origin: Debian\nSuite: bookworm\nCodename: bookworm\n")
    mirror = debian.Mirror(f"file:{tmp_path / 'archive'}")
    with pytest.raises(BangerError, match="not signed") as caught:
        debian.download([CLOUD], "bookworm", "amd64", Job(), into=tmp_path, cache=tmp_path / "cache", mirror=mirror)
    assert caught.value.code is Code.DOWNLOAD
    assert list(tmp_path.glob("*.deb")) == []


def build_image(directory: Path) -> None:
    entry = IMAGES.lookup(IMAGES.embedded().entries, "debian-trixie-minimal", "amd64")
    image.pull_debian(directory, entry, Job(), mirror=debian.find_mirror())


def download_kernel(directory: Path) -> None:
    mirror = debian.find_mirror()
    debian.download([CLOUD], "trixie", "amd64", Job(), into=directory, cache=directory, mirror=mirror, keyring=OLD_KEYS)


@pytest.mark.parametrize("get", [download_kernel, build_image])
def test_keys_that_are_older_than_a_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, get: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(image, "KEYRING", OLD_KEYS)
    with pytest.raises(BangerError, match="do not have those that sign Debian's trixie") as caught:
        get(tmp_path)
    assert caught.value.hint == "upgrade the package debian-archive-keyring"


def test_unreachable_archive_and_unknown_package_are_explained(pulled: Path, tmp_path: Path) -> None:
    absent = debian.Mirror(f"file:{tmp_path / 'absent'}")
    with pytest.raises(BangerError) as caught:
        debian.download([CLOUD], "bookworm", "amd64", Job(), into=tmp_path, cache=tmp_path / "cache", mirror=absent)
    assert caught.value.code is Code.DOWNLOAD
    assert "debian_mirror" in caught.value.hint
    with pytest.raises(BangerError, match="linux-image-absent") as caught:
        debian.download(
            ["linux-image-absent"],
            "bookworm",
            "amd64",
            Job(),
            into=tmp_path,
            cache=pulled.parent / "cache",
            mirror=debian.find_mirror(),
        )
    assert caught.value.code is Code.NOT_FOUND


@pytest.mark.parametrize("name", ["-o=Dir::Etc=x", "Linux", "a b", "../x", ""])
def test_names_cannot_become_options(tmp_path: Path, name: str) -> None:
    mirror = debian.Mirror("file:/absent")
    for packages, suite in (([name], "bookworm"), ([CLOUD], name)):
        with pytest.raises(BangerError, match="not a name"):
            debian.download(packages, suite, "amd64", Job(), into=tmp_path, cache=tmp_path, mirror=mirror)
