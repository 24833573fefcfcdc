"""scripts/make-*-kernel: what they stage can be imported, and nothing that is not verified is ever staged."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import lzma
import os
import plistlib
import re
import runpy
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger import debian
from banger.api.errors import BangerError
from banger.job import Job
from banger.kernelcat.importer import import_kernel
from banger.kernelcat.modules import DRIVERS
from tests.process.bundle_server import bundle_server
from tests.process.repositories import (
    ALPINE_VERSION,
    VERSION,
    AlpineRepository,
    Key,
    VoidRepository,
    cut_tar,
    served,
)
from tests.unit.kernelcat import builders

SCRIPTS = Path(__file__).parents[2] / "scripts"
X86 = os.uname().machine == "x86_64"


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Key, Key]:
    """The key of a distribution, and that of somebody else."""
    directory = tmp_path_factory.mktemp("keys")
    return Key.make(directory, "distribution"), Key.make(directory, "stranger")


@pytest.fixture
def trusted(tmp_path: Path, keys: tuple[Key, Key]) -> Path:
    directory = tmp_path / "trusted"
    directory.mkdir()
    (directory / keys[0].public.name).write_bytes(keys[0].public.read_bytes())
    return directory


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "staged" / "kernel"


def make(script: str, output: Path, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script; whatever happens, nothing but the kernel may be left beside the output."""
    command = [sys.executable, SCRIPTS / f"make-{script}-kernel", "--output", output, *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(output.parents[1] / "cache"), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    left = [path.name for path in output.parent.iterdir()] if output.parent.is_dir() else []
    assert left in ([], [output.name]), done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str], pattern: str, output: Path) -> None:
    """One clear line, status 1 and nothing staged."""
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert re.search(pattern, errors[0]), errors[0]
    assert "Traceback" not in done.stderr
    assert not output.exists()


def check_import(output: Path, tmp_path: Path, distro: str, version: str) -> None:
    """The importer takes what a script staged, and agrees with what that says."""
    metadata = json.loads((output / "metadata.json").read_text())
    assert (metadata["distro"], metadata["kernel_version"]) == (distro, version)
    assert metadata["kernel"] in (f"boot/vmlinuz-{version}", f"boot/vmlinux-{version}")
    assert (output / "boot" / f"config-{version}").is_file()
    assert all((output / metadata[part]).exists() for part in ("kernel", "modules"))
    kernel = import_kernel(tmp_path / "kernels", "mine", [output], Job())
    assert (kernel.distro, kernel.kernel_version) == (distro, version)


# Debian


def test_debian_kernel_is_staged_from_the_archive_and_imports(output: Path, tmp_path: Path) -> None:
    done = make("debian", output)
    assert done.returncode == 0, done.stderr
    version = json.loads((output / "metadata.json").read_text())["kernel_version"]
    assert re.fullmatch(r"6\.1\.0-\d+-cloud-(amd64|arm64)", version)
    check_import(output, tmp_path, "debian", version)
    assert str(output) in done.stdout


def test_debian_refuses_an_unknown_package(output: Path) -> None:
    refused(make("debian", output, "--package", "linux-image-absent"), "no package 'linux-image-absent'", output)


# Void


@pytest.fixture
def void(tmp_path: Path, keys: tuple[Key, Key]) -> VoidRepository:
    (tmp_path / "void").mkdir()
    return VoidRepository(tmp_path / "void", keys[0])


def make_void(void: VoidRepository, output: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    void.write()
    with served(void.directory) as url:
        return make("void", output, "--mirror", url, "--arch", "amd64", *words)


def test_void_kernel_that_the_metapackage_names_is_staged_and_imports(
    void: VoidRepository, output: Path, trusted: Path, tmp_path: Path
) -> None:
    done = make_void(void, output, "--keys", trusted)
    assert done.returncode == 0, done.stderr
    check_import(output, tmp_path, "void", VERSION)
    assert sorted(path.name for path in output.iterdir()) == ["boot", "lib", "metadata.json"]


def test_void_mirror_comes_from_the_environment_and_keys_as_xbps_keeps_them(
    void: VoidRepository, output: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").mkdir()
    public = {"public-key": void.key.public.read_bytes(), "public-key-size": 2048}
    (tmp_path / "keys/60:ae.plist").write_bytes(plistlib.dumps(public))
    void.depends = []  # and without a kernel that `linux` names, that package itself is asked for
    void.write()
    with served(void.directory) as url:
        done = make(
            "void", output, "--package", "linux6.12", "--keys", tmp_path / "keys", "--arch=amd64", VOID_MIRROR=url
        )
    assert done.returncode == 0, done.stderr
    assert (output / f"boot/vmlinuz-{VERSION}").is_file()


def test_void_without_a_mirror_says_how_to_give_one(output: Path, trusted: Path) -> None:
    done = make("void", output, "--keys", trusted, VOID_MIRROR="")
    refused(done, "no repository of Void Linux is given", output)
    assert "VOID_MIRROR" in done.stderr


def test_void_host_names_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    host_repository = runpy.run_path(str(SCRIPTS / "make-void-kernel"))["host_repository"]
    own, shipped = tmp_path / "etc", tmp_path / "share"
    for directory in (own, shipped):
        directory.mkdir()
    (shipped / "00-repository-main.conf").write_text("repository=https://example.org/shipped\n")
    (shipped / "10-repository-nonfree.conf").write_text("repository=https://example.org/nonfree\n")
    assert host_repository([own, shipped]) == "https://example.org/shipped"
    (own / "00-repository-main.conf").write_text("# mine\nrepository = https://example.org/own\n")
    assert host_repository([own, shipped]) == "https://example.org/own"
    (own / "00-repository-main.conf").write_text("")
    assert host_repository([own, shipped]) == "https://example.org/nonfree"


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"filename-sha256": "0" * 64}, "SHA-256"),
        ({"filename-sha256": "../../etc/passwd"}, "no SHA-256"),
        ({"filename-size": 7}, "bytes"),
        ({"filename-size": -1}, "wrong size"),
        ({"filename-size": 1 << 40}, "wrong size"),
        ({"pkgver": f"linux6.12-../../{VERSION}"}, r"names the file 'linux6.12-\.\./"),
        ({"pkgver": "other-1_1"}, "'other-1_1.x86_64.xbps' for 'linux6.12'"),
        ({"architecture": "../x86_64"}, "names the file"),
        ({"architecture": "aarch64"}, "'linux6.12' and x86_64"),
        ({"pkgver": ["linux6.12"]}, "names the file"),
    ],
)
def test_void_index_that_lies_is_refused(
    void: VoidRepository, output: Path, trusted: Path, change: dict[str, object], pattern: str
) -> None:
    void.change = change
    refused(make_void(void, output, "--keys", trusted), pattern, output)


def test_void_package_of_a_stranger_is_refused_unless_asked_for(
    void: VoidRepository, keys: tuple[Key, Key], output: Path, trusted: Path
) -> None:
    void.key = keys[1]
    refused(make_void(void, output, "--keys", trusted), "not signed by a key in", output)
    assert make_void(void, output, "--allow-untrusted").returncode == 0


def test_void_without_keys_is_refused(void: VoidRepository, output: Path, tmp_path: Path) -> None:
    refused(make_void(void, output, "--keys", tmp_path / "absent"), "no keys of Void Linux", output)


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"nonsense", "cut off"),
        (builders.tar([builders.tar_member("index.plist", b"<plist><dict><key>linux</plist>")]), "property list"),
        (
            builders.tar([builders.tar_member("index.plist", b'<!DOCTYPE p [<!ENTITY a "b">]><plist><dict/></plist>')]),
            "property list",
        ),
        (builders.tar([builders.tar_member("index.plist", plistlib.dumps([]))]), "not a dictionary"),
        (
            builders.tar([builders.tar_member("index.plist", plistlib.dumps({"linux": "6.12"}))]),
            "no fields for 'linux'",
        ),
        (builders.tar([builders.tar_member("index.plist", plistlib.dumps({}))]), "no package 'linux'"),
        (builders.tar([builders.tar_member("other", b"")]), "no index.plist"),
    ],
)
def test_void_damaged_index_is_refused(
    void: VoidRepository, output: Path, trusted: Path, data: bytes, pattern: str
) -> None:
    (void.directory / "x86_64-repodata").write_bytes(data)
    with served(void.directory) as url:
        refused(make("void", output, "--mirror", url, "--arch=amd64", "--keys", trusted), pattern, output)


# Alpine


@pytest.fixture
def alpine(tmp_path: Path, keys: tuple[Key, Key]) -> AlpineRepository:
    return AlpineRepository(tmp_path / "alpine/v3.22/main/x86_64", keys[0])


def make_alpine(alpine: AlpineRepository, output: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    with served(alpine.directory.parents[2]) as url:
        return make("alpine", output, "--mirror", url, "--branch", "v3.22", "--arch", "amd64", *words)


@pytest.mark.parametrize("digest", ["sha1", "sha256", "sha512"])
def test_alpine_kernel_is_staged_and_imports(
    alpine: AlpineRepository, output: Path, trusted: Path, tmp_path: Path, digest: str
) -> None:
    alpine.digest = digest
    alpine.write()
    done = make_alpine(alpine, output, "--keys", trusted)
    assert done.returncode == 0, done.stderr
    check_import(output, tmp_path, "alpine", ALPINE_VERSION)


def test_alpine_mirror_comes_from_the_environment(alpine: AlpineRepository, output: Path, trusted: Path) -> None:
    alpine.directory = alpine.directory.parents[3] / "alpine/latest-stable/main/x86_64"
    alpine.write()
    with served(alpine.directory.parents[2]) as url:
        done = make("alpine", output, "--keys", trusted, "--arch", "amd64", ALPINE_MIRROR=url)
    assert done.returncode == 0, done.stderr


def test_alpine_index_of_a_stranger_is_refused_unless_asked_for(
    alpine: AlpineRepository, keys: tuple[Key, Key], output: Path, trusted: Path
) -> None:
    alpine.key = keys[1]
    alpine.write()
    refused(make_alpine(alpine, output, "--keys", trusted), "APKINDEX.tar.gz is not signed by a key in", output)
    done = make_alpine(alpine, output, "--allow-untrusted")
    assert done.returncode == 0, done.stderr


def test_alpine_signature_of_another_index_is_refused(alpine: AlpineRepository, output: Path, trusted: Path) -> None:
    alpine.write()
    index = (alpine.directory / "APKINDEX.tar.gz").read_bytes()
    other = gzip.compress(builders.tar([builders.tar_member("APKINDEX", b"P:linux-virt\n")]))
    (alpine.directory / "APKINDEX.tar.gz").write_bytes(index[: index.index(b"\x1f\x8b\x08", 4)] + other)
    refused(make_alpine(alpine, output, "--keys", trusted), "not signed by a key in", output)


def test_alpine_unsigned_index_is_refused(alpine: AlpineRepository, output: Path, trusted: Path) -> None:
    alpine.write()
    index = (alpine.directory / "APKINDEX.tar.gz").read_bytes()
    (alpine.directory / "APKINDEX.tar.gz").write_bytes(index[index.index(b"\x1f\x8b\x08", 4) :])
    refused(make_alpine(alpine, output, "--keys", trusted), "not signed by a key in", output)
    assert make_alpine(alpine, output, "--allow-untrusted").returncode == 0


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"C": "Q1AAAAAAAAAAAAAAAAAAAAAAAAAAA="}, "its checksum differs"),
        ({"C": "Q1../../x"}, "no checksum for"),
        ({"C": "Q2AAAA"}, "no checksum for"),
        ({"S": "7"}, "bytes"),
        ({"S": "-7"}, "wrong size"),
        ({"V": "9/../../../6.12.9-r0"}, r"names the file 'linux-virt-9/\.\./"),
        ({"P": "linux-lts"}, "wrong size|no checksum"),
    ],
)
def test_alpine_index_that_lies_is_refused(
    alpine: AlpineRepository, output: Path, trusted: Path, change: dict[str, str], pattern: str
) -> None:
    alpine.change = change
    alpine.write()
    refused(make_alpine(alpine, output, "--keys", trusted), pattern, output)


@pytest.mark.parametrize("digest", ["0" * 64, ""])
def test_alpine_package_whose_files_differ_is_refused(
    alpine: AlpineRepository, output: Path, trusted: Path, digest: str
) -> None:
    alpine.control = {"datahash": digest}
    alpine.write()
    pattern = "SHA-256 of its files is wrong" if digest else "does not tell the digest"
    refused(make_alpine(alpine, output, "--keys", trusted), pattern, output)


def test_alpine_control_planted_before_the_signed_one_is_not_used(
    alpine: AlpineRepository, output: Path, trusted: Path
) -> None:
    """Two readers may not disagree on which member is the control archive."""
    alpine.prefix = gzip.compress(cut_tar([builders.tar_member(".PKGINFO", b"arch = x86_64\n")]))
    alpine.write()
    refused(make_alpine(alpine, output, "--keys", trusted), "its checksum differs", output)


def test_alpine_host_names_its_mirror_and_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    repository = runpy.run_path(str(SCRIPTS / "make-alpine-kernel"))["repository"]
    file = tmp_path / "repositories"
    file.write_text("/media/cdrom/apks\n#https://example.org/old/v3.1/main\nhttps://example.org/alpine/v3.22/main\n")
    assert repository("", "", file) == ("https://example.org/alpine", "v3.22")
    assert repository("", "edge", file) == ("https://example.org/alpine", "edge")
    assert repository("https://example.org/other/", "", file) == ("https://example.org/other", "latest-stable")
    with pytest.raises(BangerError, match="no mirror of Alpine Linux is given"):
        repository("", "", tmp_path / "absent")


def test_alpine_unknown_branch_is_refused(output: Path, tmp_path: Path) -> None:
    done = make("alpine", output, "--mirror", "http://127.0.0.1:9/", "--branch", "../v3", "--keys", tmp_path)
    refused(done, r"'\.\./v3' is not a branch", output)


# what all of them share


def test_a_directory_that_is_no_staged_kernel_is_not_replaced(
    alpine: AlpineRepository, trusted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "precious/kernel"
    output.mkdir(parents=True)
    (output / "letter").write_text("dear")
    alpine.write()
    done = make_alpine(alpine, output, "--keys", trusted)
    assert done.returncode == 1
    assert "is no staged kernel, so it is not replaced" in done.stderr
    assert (output / "letter").read_text() == "dear"


def test_the_old_kernel_stays_until_the_new_one_is_whole(alpine: AlpineRepository, output: Path, trusted: Path) -> None:
    alpine.write()
    assert make_alpine(alpine, output, "--keys", trusted).returncode == 0
    (output / "old").touch()
    package = alpine.package.read_bytes()
    alpine.package.write_bytes(package[:-8] + bytes(8))
    assert make_alpine(alpine, output, "--keys", trusted).returncode == 1
    assert (output / "old").exists()
    alpine.package.write_bytes(package)
    assert make_alpine(alpine, output, "--keys", trusted).returncode == 0
    assert not (output / "old").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_stopped_run_leaves_goes_with_the_next(
    alpine: AlpineRepository, output: Path, trusted: Path, number: signal.Signals
) -> None:
    alpine.write()
    with bundle_server() as server:
        branch = alpine.directory.parents[2]
        server.content = {path.relative_to(branch).as_posix(): path.read_bytes() for path in alpine.directory.iterdir()}
        server.hold = True
        words = ["--mirror", server.address, "--branch", "v3.22", "--arch", "amd64", "--keys", str(trusted)]
        script = [sys.executable, str(SCRIPTS / "make-alpine-kernel"), "--output", str(output), *words]
        process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert server.half_sent.wait(60)
            process.send_signal(number)
            assert process.wait(60) != 0
        finally:
            process.kill()
            process.wait()
    left = [path.name for path in output.parent.iterdir()]
    assert (len(left) == 1 and left[0].startswith(".staging-kernel-")) if number == signal.SIGKILL else not left
    assert make_alpine(alpine, output, "--keys", trusted).returncode == 0


# the generic kernel

# stands for the source of a kernel in all that the script sees of one: it obeys O= and KCONFIG_ALLCONFIG
MAKEFILE = """\
allnoconfig:
\tgrep -v ABSENT $(KCONFIG_ALLCONFIG) >$(O)/.config
vmlinux:
\tmkdir -p $(O)/include/config
\techo 6.1.0-toy >$(O)/include/config/kernel.release
\t$(CC) -static -nostdlib -Wl,-e,main -o $(O)/vmlinux kernel.c
"""
KERNEL = """\
const char banner[] = "Linux version 6.1.0-toy (builder@host) #1\\n";
__asm__(".pushsection .note.pvh,\\"a\\",@note\\n.long 4,8,18\\n.asciz \\"Xen\\"\\n.quad 0x1000000\\n.popsection");
int unneeded_symbol(void) { return banner[0]; }
int main(void) { return unneeded_symbol(); }
"""


def toy_source(kernel: str = KERNEL) -> dict[str, str]:
    return {"Makefile": MAKEFILE, "Kconfig": "", "kernel.c": kernel}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "toy").mkdir()
    for name, text in toy_source().items():
        (tmp_path / "toy" / name).write_text(text)
    return tmp_path / "toy"


def debian_package(path: Path) -> Path:
    archive = builders.tar(
        builders.tar_member(f"linux-source-6.1/{name}", text.encode()) for name, text in toy_source().items()
    )
    member = builders.tar_member("./usr/src/linux-source-6.1.tar.xz", lzma.compress(archive))
    path.write_bytes(builders.deb([member]))
    return path


def archive(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as output:
        for name, text in toy_source().items():
            member, data = builders.tar_member(f"linux-6.1/{name}", text.encode())
            output.addfile(member, io.BytesIO(data))
    return path


SOURCES: dict[str, Callable[[Path], Path]] = {
    "linux-source_6.1_all.deb": debian_package,
    "linux.tar.gz": archive,
    "toy": lambda path: path,
}


@pytest.mark.parametrize("source", SOURCES)
def test_generic_kernel_is_built_from_every_kind_of_source(
    toy: Path, output: Path, tmp_path: Path, source: str
) -> None:
    done = make("generic", output, "--source", SOURCES[source](tmp_path / source), "--arch", "amd64", CROSS_COMPILE="")
    assert done.returncode == 0, done.stderr
    metadata = json.loads((output / "metadata.json").read_text())
    assert metadata == {
        "distro": "generic",
        "arch": "amd64",
        "kernel_version": "6.1.0-toy",
        "kernel": "boot/vmlinux-6.1.0-toy",
        "initrd": "",
        "modules": "",
    }
    kernel = (output / metadata["kernel"]).read_bytes()
    assert b"Linux version 6.1.0-toy" in kernel
    assert b"unneeded_symbol" not in kernel
    assert "CONFIG_PVH=y\n" in (output / "boot/config-6.1.0-toy").read_text()
    assert sorted(path.name for path in toy.iterdir()) == ["Kconfig", "Makefile", "kernel.c"]


def test_generic_names_the_options_that_did_not_take_effect(toy: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "extra.config").write_text(
        "CONFIG_ABSENT_NET=y\nCONFIG_ABSENT_OLD=y # optional\n# CONFIG_ABSENT is not set\n"
    )
    done = make("generic", output, "--source", toy, "--config", tmp_path / "extra.config", "--arch", "amd64")
    refused(done, r"1 options did not take effect: CONFIG_ABSENT_NET=y \(is n\)$", output)


def test_generic_keeps_what_guests_need(toy: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "extra.config").write_text("CONFIG_OVERLAY_FS=n\n")
    done = make("generic", output, "--source", toy, "--config", tmp_path / "extra.config", "--arch", "amd64")
    refused(done, r"no guest of banger can do without overlay \(CONFIG_OVERLAY_FS\)", output)


def test_generic_reports_what_the_compiler_says(toy: Path, output: Path) -> None:
    (toy / "kernel.c").write_text("this is no C\n")
    done = make("generic", output, "--source", toy, "--arch", "amd64", CROSS_COMPILE="")
    refused(done, "kernel.c:1:1: error: ", output)


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--source", "/absent/linux.tar"], "no source tree or archive '/absent/linux.tar'"),
        (["--source", str(SCRIPTS)], "is not the source of a Linux kernel"),
        (["--source", "toy", "--config", "/absent.config"], "no configuration '/absent.config'"),
        (["--source", "toy", "--config", "toy/kernel.c"], "kernel.c:1: 'const char banner"),
    ],
)
def test_generic_refuses_what_it_cannot_build(
    toy: Path, output: Path, words: list[str], pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy.parent)
    refused(make("generic", output, *words, "--arch", "amd64"), pattern, output)


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_config_of_the_generic_kernel_builds_in_what_guests_use(arch: str) -> None:
    files = (SCRIPTS / "microvm.config", SCRIPTS / f"microvm-{arch}.config")
    lines = [line for file in files for line in file.read_text().splitlines()]
    options = [line.partition("=")[0] for line in lines if line.startswith("CONFIG_")]
    assert sorted(option for option in set(options) if options.count(option) > 1) == []
    built_in = {line.partition("=")[0] for line in lines if re.match(r"CONFIG_\w+=y", line)}
    assert {driver.option for driver in DRIVERS} <= built_in
    assert "CONFIG_MODULES=n" in lines


@pytest.fixture(scope="session")
def linux_source() -> Iterator[Path]:
    """Debian's package of the kernel's source, downloaded once and kept for all runs on this machine."""
    cache = Path(tempfile.gettempdir()) / f"banger-test-source-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    with open(cache / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = sorted(cache.glob("linux-source-*.deb"))
        if not found:
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                mirror = debian.find_mirror()
                into = Path(scratch)
                (package,) = debian.download(
                    ["linux-source"], "bookworm", "amd64", Job(), into=into, cache=into, mirror=mirror
                )
                found = [package.rename(cache / package.name)]
        yield found[0]


@pytest.mark.skipif(not X86, reason="needs an x86_64 compiler")
@pytest.mark.timeout(900)
def test_generic_kernel_is_configured_and_compiles_from_debians_source(linux_source: Path, output: Path) -> None:
    """Every option takes effect in a real kernel, whose first file needs the tools of a whole build."""
    done = make("generic", output, "--source", linux_source, "--arch", "amd64", "--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all that the kernel needs is there\n"
