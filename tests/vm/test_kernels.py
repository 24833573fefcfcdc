"""Kernels from every source boot to a command: Debian's packages, an image of a registry, a signed bundle."""

import json
import subprocess
from pathlib import Path

import pytest

from banger import debian
from banger.job import Job
from tests.process.repositories import served
from tests.registry import image, oci_layout, packed_layer, running_registry
from tests.vm.host import KERNEL, Host


def boots(host: Host, kernel: str) -> None:
    """A guest runs this kernel, with its modules."""
    version = json.loads(host.ok("kernel", "show", kernel, "--json"))["kernel_version"]
    script = "uname -r; test -s /lib/modules/$(uname -r)/modules.dep && echo modules"
    said = host.ok("vm", "run", "--rm", "--kernel", kernel, "--", "sh", "-c", script)
    assert said.splitlines() == [version, "modules"]


@pytest.mark.parametrize("name", ["debian", "debian-rt", "debian-trixie", "debian-trixie-cloud"])
def test_debian_kernels_of_the_catalog(host: Host, name: str) -> None:
    host.ok("kernel", "pull", name)
    boots(host, name)
    host.ok("kernel", "rm", name)


def test_a_package_of_debian(host: Host, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (package,) = debian.download(
        ["linux-image-cloud-amd64"], "bookworm", "amd64", Job(), into=tmp_path, cache=cache, mirror=debian.find_mirror()
    )
    host.ok("kernel", "import", "packaged", "--from", str(package))
    assert json.loads(host.ok("kernel", "show", "packaged", "--json"))["distro"] == "debian"
    boots(host, "packaged")
    host.ok("kernel", "rm", "packaged")


@pytest.fixture(scope="module")
def staged(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of Debian's kernel as distributions and images lay them out."""
    root = tmp_path_factory.mktemp("staged")
    version = json.loads((kernel / "manifest.json").read_bytes())["kernel_version"]
    (root / "boot").mkdir()
    (root / f"boot/vmlinux-{version}").write_bytes((kernel / "vmlinux").read_bytes())
    modules = root / "lib/modules" / version
    modules.mkdir(parents=True)
    unpack = ["rdsquashfs", "-q", "-u", "/", "-p", modules, kernel / "modules.squashfs"]
    subprocess.run(unpack, check=True, capture_output=True)
    return root


def test_an_image_of_a_registry(host: Host, staged: Path, tmp_path: Path) -> None:
    archive = subprocess.run(["tar", "-C", staged, "-c", "."], check=True, stdout=subprocess.PIPE).stdout
    layout = oci_layout(tmp_path / "image", [image([packed_layer(archive, "zstd")])])
    with running_registry(tmp_path / "registry") as registry:
        digest = registry.push(layout, "org/kernel:6.1")
        reference = f"{registry.address}/org/kernel:6.1"
        host.ok("kernel", "pull", reference, "--as", "from-registry")
        shown = json.loads(host.ok("kernel", "show", "from-registry", "--json"))
        assert shown["source"] == f"oci:{reference}"
        host.ok("kernel", "pull", f"{registry.address}/org/kernel@{digest}", "--as", "by-digest")
    boots(host, "from-registry")
    host.ok("kernel", "rm", "from-registry", "by-digest")


def test_a_signed_bundle(host: Host, tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.mkdir()
    public, secret = tmp_path / "key.pub", tmp_path / "key.sec"
    subprocess.run(["minisign", "-G", "-W", "-p", public, "-s", secret], check=True, capture_output=True)
    entry = json.loads(host.ok("kernel", "export", KERNEL, "-o", str(published / "edge.tar.zst")))
    catalog = published / "catalog.json"
    document = {"version": 1, "updated": "2026-01-31T12:00:00Z", "entries": [{**entry, "name": "edge"}]}
    catalog.write_text(json.dumps(document))
    subprocess.run(["minisign", "-S", "-s", secret, "-m", catalog], check=True, capture_output=True)
    with served(published) as address:
        location = f"{address}/catalog.json"
        host.ok("kernel", "catalog", "add", location, "--name", "corp", "--public-key", str(public))
        catalog.write_text(json.dumps({**document, "updated": "2026-02-01T12:00:00Z"}))
        assert "signature" in host.fails(1, "kernel", "catalog", "refresh", "corp")
        host.ok("kernel", "pull", "corp/edge")
        boots(host, "edge")
        # what was created keeps its own copy
        host.ok("vm", "create", "--name", "keeper", "--kernel", "edge", "--", "sleep", "infinity")
        assert "keeper" in host.fails(1, "kernel", "rm", "edge")
        host.ok("kernel", "rm", "edge", "--force")
        host.ok("vm", "start", "keeper")
        version = host.ok("vm", "exec", "keeper", "--", "uname", "-r").strip()
        assert version == entry["kernel_version"]
        host.ok("vm", "rm", "--force", "keeper")
    host.ok("kernel", "catalog", "rm", "corp")
