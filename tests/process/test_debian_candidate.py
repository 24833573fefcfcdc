"""The release that a suite has now, told from the package lists of the last download: a small signed archive."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from banger import debian
from banger.job import Job

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("apt-get", "apt-cache", "gpg", "dpkg-deb")),
    reason="apt, gpg or dpkg-deb is not installed",
)


class Archive:
    """A Debian archive in a directory, signed with a key of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / "gnupg"
        self.keyring = directory / "archive.gpg"
        self.home.mkdir(mode=0o700, parents=True)
        self.gpg("--quick-generate-key", "archive@example.org", "ed25519", "sign", "never")
        self.gpg("--output", str(self.keyring), "--export")

    def gpg(self, *arguments: str) -> None:
        command = ["gpg", "--batch", "--quiet", "--homedir", str(self.home), "--passphrase", "", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self.home), "--kill", "all"], check=True)

    def release(self, *versions: str) -> None:
        """Publish a metapackage `linux-image-test` that stands for linux-image-VERSION-test, in each version."""
        stanzas = []
        for version in versions:
            image = f"linux-image-{version}-test"
            conflict = f"Conflicts: {image}-unsigned\n"
            stanzas.append(self.package("linux-image-test", version, f"Depends: {image} (= {version}-1)\n"))
            stanzas.append(self.package(image, version, conflict))
        dists = self.directory / "dists/stable"
        (dists / "main/binary-amd64").mkdir(parents=True, exist_ok=True)
        packages = "\n".join(stanzas).encode()
        (dists / "main/binary-amd64/Packages").write_bytes(packages)
        digest = hashlib.sha256(packages).hexdigest()
        (dists / "Release").write_text(
            "Origin: Debian\nSuite: stable\nCodename: stable\nArchitectures: amd64\nComponents: main\n"
            f"Date: Sat, 31 Jan 2026 12:00:{len(versions):02} UTC\n"
            f"SHA256:\n {digest} {len(packages)} main/binary-amd64/Packages\n"
        )
        self.gpg("--yes", "--clearsign", "--output", str(dists / "InRelease"), str(dists / "Release"))

    def package(self, name: str, version: str, relations: str) -> str:
        """Build an empty package; returns its stanza in the index."""
        control = (
            f"Package: {name}\nVersion: {version}-1\nArchitecture: amd64\n{relations}"
            "Maintainer: A <a@example.org>\nDescription: test\n"
        )
        tree = self.directory / "tree"
        (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
        (tree / "DEBIAN/control").write_text(control)
        file = self.directory / f"{name}_{version}-1_amd64.deb"
        subprocess.run(["dpkg-deb", "--build", tree, file], check=True, capture_output=True)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return f"{control}Filename: {file.name}\nSize: {file.stat().st_size}\nSHA256: {digest}\n"


def test_the_release_is_that_of_the_last_lists(tmp_path: Path) -> None:
    cache, into = tmp_path / "cache", tmp_path / "into"
    archive = Archive(tmp_path / "archive")

    def candidate(package: str = "linux-image-test", suite: str = "stable", arch: str = "amd64") -> str:
        return debian.candidate(package, suite, arch, cache)

    def download() -> str:
        into.mkdir()
        (file,) = debian.download(
            ["linux-image-test"],
            "stable",
            "amd64",
            Job(),
            into=into,
            cache=cache,
            mirror=debian.Mirror(f"copy:{archive.directory}"),
            keyring=archive.keyring,
        )
        shutil.rmtree(into)
        return file.name

    try:
        assert candidate() == ""
        archive.release("6.1.9")
        assert download() == "linux-image-6.1.9-test_6.1.9-1_amd64.deb"
        assert candidate() == "linux-image-6.1.9-test=6.1.9-1"
        archive.release("6.1.9", "6.1.10")
        assert candidate() == "linux-image-6.1.9-test=6.1.9-1"  # nothing is fetched to tell
        assert download() == "linux-image-6.1.10-test_6.1.10-1_amd64.deb"
        assert candidate() == "linux-image-6.1.10-test=6.1.10-1"
        assert candidate("linux-image-6.1.9-test") == "linux-image-6.1.9-test=6.1.9-1"
        for package in ("linux-image-absent", "../linux", "-o=x"):
            assert candidate(package) == ""
        assert candidate(suite="../stable") == candidate(suite="sid") == candidate(arch="arm64") == ""
    finally:
        archive.close()
