"""Kernels out of images in a registry: the layouts in use, damage, hostile images, and the way through a daemon."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.kernelcat import manifest as kernels
from banger.kernelcat.archive import ARCHIVE_LIMIT
from banger.kernelcat.catalog import CatalogEntry
from banger.kernelcat.fetch import Environment, fetch
from banger.kernelcat.manifest import KernelManifest
from tests.daemons import TIMEOUT, DaemonProcess, running_daemon
from tests.http_server import Reply, Server, serving
from tests.registry import (
    LAYER,
    PASSWORD,
    USER,
    Image,
    Layer,
    RunningRegistry,
    cutting_proxy,
    digest_of,
    file_layer,
    image,
    layer,
    oci_layout,
    running_registry,
)
from tests.unit.kernelcat import builders

VERSION = builders.VERSION
KERNEL = builders.elf()
LINK = "boot/vmlinux"

Files = Mapping[str, bytes | str | None]


pytestmark = pytest.mark.usefixtures("no_logins")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path_factory.mktemp("registry") / "registry") as registry:
        yield registry


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """lib/modules/<version> of the test kernel."""
    tree = builders.module_tree(tmp_path_factory.mktemp("modules"), builders.VIRTIO, builders.BUILTIN)
    return {f"lib/modules/{VERSION}/{name}": data for name, data in files_of(tree).items()}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state")
    yield state
    state.check_clean()


class State:
    """A kernels directory and a cache, without a daemon."""

    def __init__(self, directory: Path) -> None:
        self.kernels, self._cache = directory / "kernels", directory / "cache"

    def pull(self, reference: str, arch: str = "amd64", force: bool = False, job: Job | None = None) -> KernelManifest:
        entry = CatalogEntry("kernel", "", arch, "", "oci", image=reference, origin="")
        environment = Environment(self._cache)
        return fetch(self.kernels, "kernel", entry, job or Job(), environment=environment, replace=force)

    def refused(self, reference: str, arch: str = "amd64", force: bool = False) -> BangerError:
        with pytest.raises(BangerError) as caught:
            self.pull(reference, arch, force)
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 1000
        return caught.value

    def vmlinux(self) -> bytes:
        return (self.kernels / "kernel/vmlinux").read_bytes()

    def packed(self) -> set[str]:
        """The files of the kernel's modules."""
        argv: list[str | Path] = ["rdsquashfs", "--describe", self.kernels / "kernel/modules.squashfs"]
        lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
        return {line.split()[1].removeprefix("/") for line in lines if line.startswith("file ")}

    def check_clean(self) -> None:
        assert not list(self._cache.glob("*"))
        assert {path.name for path in self.kernels.glob("*")} <= {"kernel"}


def files_of(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def tar(files: Mapping[str, bytes]) -> bytes:
    return builders.tar(builders.tar_member(name, data) for name, data in files.items())


def push(registry: RunningRegistry, directory: Path, name: str, *images: Image) -> str:
    """Push an image, or an index of several, byte for byte: skopeo would compress layers that are not."""
    layout = oci_layout(Path(tempfile.mkdtemp(dir=directory)) / "layout", images)
    return registry.push(layout, name, "--preserve-digests")


def plain(modules: Files) -> list[Layer]:
    """How a Dockerfile leaves what Debian's package installs."""
    return [layer({"boot": None, f"boot/vmlinux-{VERSION}": KERNEL, "etc/passwd": b"root", **modules})]


def split(modules: Files) -> list[Layer]:
    """Layers in each compression; the first kernel, which is newer, and its modules are removed by the others."""
    old = {"boot/vmlinux-99.1.0": builders.elf("99.1.0"), "lib/modules/99.1.0/modules.dep": b"", "vmlinux": b"old"}
    wiped = {"boot/.wh.vmlinux-99.1.0": b"", "lib/modules/.wh..wh..opq": b"", ".wh.vmlinux": b""}
    return [
        layer(old),
        layer({**wiped, f"boot/vmlinux-{VERSION}": b"older"}, "zstd"),
        layer({f"boot/vmlinux-{VERSION}": KERNEL, **modules}, ""),
    ]


def linuxkit(modules: Files) -> list[Layer]:
    """Two archives in the image: of the modules, and of the headers."""
    data = {name: data for name, data in modules.items() if isinstance(data, bytes)}
    return [layer({"kernel": KERNEL, "kernel.tar": tar(data), "kernel-dev.tar": tar({"usr/src/x.h": b"x"})})]


def ignite(modules: Files) -> list[Layer]:
    """boot/vmlinux is a link to the one with a version."""
    return [layer({LINK: f"vmlinux-{VERSION}", f"{LINK}-{VERSION}": KERNEL, "boot/config-x": b"", **modules})]


def merged(modules: Files) -> list[Layer]:
    """A merged /usr, and a link that starts at the root and leads to a later layer."""
    version = f"usr/lib/modules/{VERSION}"
    below = {f"usr/{name}": data for name, data in modules.items()}
    return [
        layer({"lib": "usr/lib", LINK: f"/lib/modules/{VERSION}/vmlinuz", **below}),
        layer({f"{version}/vmlinuz": KERNEL}),
    ]


def oras(modules: Files) -> list[Layer]:
    """Files pushed one by one, and a directory, which ORAS packs and marks."""
    directory = layer(modules)
    marks = {"org.opencontainers.image.title": "lib", "io.deis.oras.content.unpack": "true"}
    return [
        file_layer("vmlinux", KERNEL),
        file_layer("README.md", b"# A kernel", "text/markdown"),
        dataclasses.replace(directory, annotations=marks),
    ]


def oras_archive(modules: Files) -> list[Layer]:
    data = {name: data for name, data in modules.items() if isinstance(data, bytes)}
    archive = file_layer("kernel.tar", tar(data), "application/x-tar")
    return [file_layer("kernel", KERNEL, "application/octet-stream"), archive]


@pytest.mark.parametrize("made", [plain, split, linuxkit, ignite, merged, oras, oras_archive])
def test_layouts_in_use(
    registry: RunningRegistry,
    state: State,
    modules: Files,
    tmp_path: Path,
    made: Callable[[Files], list[Layer]],
) -> None:
    name = f"layouts/{made.__name__}"
    digest = push(registry, tmp_path, f"{name}:6.1", image(made(modules)))
    for reference in (f"{registry.address}/{name}:6.1", f"{registry.address}/{name}@{digest}"):
        kernel = state.pull(reference, force=True)
        assert (kernel.kernel_version, kernel.arch, kernel.modules, kernel.missing) == (VERSION, "amd64", True, ())
        assert (kernel.source, kernel.revision, kernel.origin) == (f"oci:{reference}", digest, "")
        assert kernel.sha256 == hashlib.sha256(KERNEL).hexdigest()
        assert state.vmlinux() == KERNEL
        assert set(builders.VIRTIO) <= state.packed()
        assert kernels.verify_local(state.kernels, "kernel", Job()) == ""


@pytest.mark.parametrize("options", [(), ("--format", "v2s2")])
def test_what_skopeo_makes_of_it(
    registry: RunningRegistry, state: State, modules: Files, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """It compresses layers that are not, and converts to the manifests of docker."""
    made = image([*plain(modules), layer({"config": b"x"}, "")])
    digest = registry.push(oci_layout(tmp_path / "image", [made]), f"made/by{len(options)}:1", *options)
    assert digest != made.digest
    assert state.pull(f"{registry.address}/made/by{len(options)}:1").revision == digest
    assert state.vmlinux() == KERNEL


def test_index_of_two_architectures(registry: RunningRegistry, state: State, modules: Files, tmp_path: Path) -> None:
    arm64 = image([layer({"boot/Image": builders.arm64_image()})], "arm64")
    digest = push(registry, tmp_path, "multi/kernel:1", image(plain(modules)), arm64)
    for reference in (f"{registry.address}/multi/kernel:1", f"{registry.address}/multi/kernel:1@{digest}"):
        for arch, content in (("amd64", KERNEL), ("arm64", builders.arm64_image())):
            kernel = state.pull(reference, arch, force=True)
            assert (kernel.arch, kernel.revision) == (arch, digest)
            assert state.vmlinux() == content
    # what the index leads to can be named too
    kernel = state.pull(f"{registry.address}/multi/kernel@{arm64.digest}", "arm64", force=True)
    assert kernel.revision == arm64.digest


def test_other_architecture_than_asked_for(registry: RunningRegistry, state: State, tmp_path: Path) -> None:
    arm64 = image([layer({"boot/Image": builders.arm64_image()})], "arm64")
    push(registry, tmp_path, "one/arm64:1", arm64)
    error = state.refused(f"{registry.address}/one/arm64:1")
    assert (error.code, "'arm64', not 'amd64'" in error.message) == (Code.INVALID, True)


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [layer({"etc/os-release": b"ID=alpine", "bin/sh": "/bin/busybox", "boot": None})],
        [layer({"boot/config-6.1": b"CONFIG_EXT4_FS=y", "lib/modules/6.1/modules.dep": b""})],
        [layer({"kernel.tar": builders.tar([])})],
        [layer({LINK: "vmlinux-6.1"})],
        [layer({"vmlinux": b"x"}), layer({".wh.vmlinux": b""})],
        [file_layer("README.md", b"# No kernel", "text/markdown")],
    ],
)
def test_image_without_a_kernel(
    registry: RunningRegistry, state: State, tmp_path: Path, layers: list[Layer], request: pytest.FixtureRequest
) -> None:
    reference = f"without/{digest_of(request.node.name.encode())[7:17]}:1"
    push(registry, tmp_path, reference, image(layers))
    error = state.refused(f"{registry.address}/{reference}")
    assert error.code is Code.NOT_FOUND
    assert error.message == f"there is no kernel in {registry.address}/{reference}"
    assert "/boot/vmlinu*" in error.hint


# damage


@pytest.mark.parametrize("titled", [False, True])
@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "gone"])
def test_damaged_layer_leaves_the_old_kernel(
    registry: RunningRegistry, state: State, modules: Files, tmp_path: Path, damage: str, titled: bool
) -> None:
    name = f"damaged/{damage}-{titled}:1".lower()
    reference = f"{registry.address}/{name}"
    push(registry, tmp_path, name, image(plain(modules)))
    old = state.pull(reference)
    vmlinux = builders.elf(extra=b"new" + name.encode())
    # damaged after all that is wanted, or in a file that is one layer
    tailed = layer({"boot/vmlinux": vmlinux, **modules, "tail": name.encode()}, "")
    new = file_layer("vmlinux", vmlinux) if titled else tailed
    push(registry, tmp_path, name, image([new]))
    blob = registry.blob(digest_of(new.data))
    good = blob.read_bytes()
    at = good.rindex(name.encode())
    match damage:
        case "changed":
            blob.write_bytes(good[:at] + b"x" + good[at + 1 :])
        case "shorter":
            blob.write_bytes(good[:-512])
        case "longer":
            blob.write_bytes(good + bytes(512))
        case "gone":
            blob.unlink()
    error = state.refused(reference, force=True)
    assert error.code is (Code.DOWNLOAD if damage == "gone" else Code.CORRUPT)
    assert kernels.read_local(state.kernels, "kernel") == old
    assert kernels.verify_local(state.kernels, "kernel", Job()) == ""
    blob.write_bytes(good)
    assert state.pull(reference, force=True).sha256 == hashlib.sha256(vmlinux).hexdigest()


def test_broken_connection_is_continued(
    registry: RunningRegistry, state: State, modules: Files, tmp_path: Path
) -> None:
    noise = hashlib.shake_256(b"noise").digest(1 << 20)
    push(registry, tmp_path, "broken/kernel:1", image([layer({"lib/modules/noise": noise, **modules, LINK: KERNEL})]))
    with cutting_proxy(registry.address, after=700_000) as proxy:
        kernel = state.pull(f"{proxy.address}/broken/kernel:1")
        assert proxy.broken
        assert any("Range: bytes=" in head for head in proxy.heads)
    assert (kernel.kernel_version, state.vmlinux()) == (VERSION, KERNEL)


# hostile images


def serve(server: Server, made: Image, name: str = "org/kernel") -> str:
    """Have a scripted server answer as a registry with this image; returns a reference to it."""
    host = server.url("").removeprefix("http://")
    server.serve(f"/v2/{name}/manifests/{made.digest}", Reply(made.manifest))
    for blob in made.blobs:
        server.serve(f"/v2/{name}/blobs/{digest_of(blob)}", Reply(blob))
    return f"{host}/{name}@{made.digest}"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def rewritten(made: Image, **changes: object) -> Image:
    """The same with other fields in its manifest."""
    return dataclasses.replace(made, manifest=json.dumps({**json.loads(made.manifest), **changes}).encode())


@pytest.mark.parametrize(
    ("hostile", "code"),
    [
        (file_layer("../../../etc/vmlinux", KERNEL), Code.CORRUPT),
        (file_layer("/vmlinux", KERNEL), Code.CORRUPT),
        (file_layer("boot/vm\x1b[31mlinux", KERNEL), Code.CORRUPT),
        (file_layer("boot/\ud800", KERNEL), Code.CORRUPT),
        (file_layer("boot/" + "x" * 5000, KERNEL), Code.CORRUPT),
        (file_layer("manifest.json", b"{}"), Code.NOT_FOUND),
        (file_layer(".files-x/1", KERNEL), Code.NOT_FOUND),
        (file_layer("boot/manifest.json", b"{}"), Code.NOT_FOUND),
        (file_layer("kernel.tar", b"no archive at all"), Code.CORRUPT),
        (layer({"../vmlinux": KERNEL}), Code.CORRUPT),
        (layer({"vmlinux": "../../../../etc/passwd"}), Code.CORRUPT),
        (layer({"kernel.tar": builders.tar([builders.tar_member("../vmlinux", KERNEL)])}), Code.CORRUPT),
        (layer({"lib": "/etc", "lib/modules/x": b""}), Code.CORRUPT),
        (layer({"noise": bytes(65 << 20), LINK: KERNEL}, "zstd"), Code.CORRUPT),
        (Layer(b"", "", LAYER), Code.CORRUPT),
        (Layer(b"\x1f\x8b no gzip", "", LAYER), Code.CORRUPT),
        (Layer(b"\x28\xb5\x2f\xfd no zstd", "", LAYER), Code.CORRUPT),
        (Layer(b'{"an": "object"}', "", "application/json"), Code.NOT_FOUND),
    ],
)
def test_hostile_layers(server: Server, state: State, hostile: Layer, code: Code) -> None:
    error = state.refused(serve(server, image([hostile])))
    assert error.code is code
    # a good kernel before or after it does not help
    if code is Code.CORRUPT:
        for layers in ([layer({LINK: KERNEL}), hostile], [hostile, layer({LINK: KERNEL})]):
            assert state.refused(serve(server, image(layers))).code is Code.CORRUPT
    assert not (state.kernels / "kernel").exists()


def test_images_that_are_too_large_are_not_begun(server: Server, state: State) -> None:
    small = image([layer({LINK: KERNEL})])
    half = {**small.layers[0].descriptor, "size": ARCHIVE_LIMIT // 2 + 1}
    error = state.refused(serve(server, rewritten(small, layers=[half, half])))
    assert error.code is Code.EXHAUSTED
    assert "the limit" in error.message
    assert [request.path.split("/")[4] for request in server.requests] == ["manifests"]


def test_hundreds_of_layers(server: Server, state: State) -> None:
    small = image([layer({LINK: KERNEL})])
    error = state.refused(serve(server, rewritten(small, layers=[small.layers[0].descriptor] * 501)))
    assert (error.code, "501" in error.message) == (Code.CORRUPT, True)
    many = image([layer({f"etc/{number}": b""}) for number in range(126)] + [layer({LINK: KERNEL})])
    state.pull(serve(server, many))
    assert state.vmlinux() == KERNEL


def test_layers_that_are_not_needed_are_not_downloaded(server: Server, state: State) -> None:
    signature = Layer(b'{"signed": "by somebody"}', "", "application/vnd.dev.cosign.simplesigning.v1+json")
    readme = file_layer("README.md", b"# A kernel")
    kernel = state.pull(serve(server, image([signature, readme, layer({LINK: KERNEL})])))
    assert (kernel.skipped, state.vmlinux()) == (("1 layer",), KERNEL)
    for unused in (signature, readme):
        assert not server.asked(f"/v2/org/kernel/blobs/{digest_of(unused.data)}")


def test_cancelled_pull_leaves_nothing(server: Server, state: State) -> None:
    made = image([layer({LINK: KERNEL + hashlib.shake_256(b"noise").digest(1 << 20)})])
    reference = serve(server, made)
    server.serve(f"/v2/org/kernel/blobs/{digest_of(made.layers[0].data)}", Reply(made.layers[0].data, stall=500_000))
    job = Job()
    caught: list[BangerError] = []

    def pull() -> None:
        try:
            state.pull(reference, job=job)
        except BangerError as error:
            caught.append(error)

    pulling = threading.Thread(target=pull)
    pulling.start()
    server.stalled.get(timeout=TIMEOUT)
    job.cancel()
    pulling.join(TIMEOUT)
    assert [error.code for error in caught] == [Code.CANCELLED]
    server.left.get(timeout=TIMEOUT)


# over a daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path / "daemon", variables={"REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}) as daemon:
        yield daemon
        assert not list(daemon.layout.cache.rglob(".staging-*"))


def banger(daemon: DaemonProcess, *argv: str, status: int = 0) -> str:
    """The output of a banger command that must end with `status`; of one that fails, what it says of it."""
    command = [sys.executable, "-m", "banger.cli", *argv]
    ended = subprocess.run(command, env=daemon.environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert ended.returncode == status, ended.stderr
    return ended.stdout if status == 0 else ended.stderr


def shown(daemon: DaemonProcess, name: str) -> m.KernelInfo:
    return daemon.client.call(op.KERNEL_SHOW, m.NameRequest(name))


def test_names_and_sources(registry: RunningRegistry, daemon: DaemonProcess, modules: Files, tmp_path: Path) -> None:
    made = image(plain(modules))
    for name in ("named/kernel:6.1", "named/kernel:latest", "named/of_it:6..1", "named/kernel:" + "x" * 100):
        push(registry, tmp_path, name, made)
    repository = f"{registry.address}/named/kernel"
    for reference, name in (
        (f"{repository}:6.1", "kernel-6.1"),
        (repository, "kernel"),
        (f"{repository}:6.1@{made.digest}", "kernel-6.1"),
        (f"{repository}@{made.digest}", f"kernel-{made.digest[7:19]}"),
    ):
        banger(daemon, "kernel", "pull", reference, "--force")
        kernel = shown(daemon, name)
        assert kernel.source == f"oci:{reference}" + ("" if reference != repository else ":latest")
        assert (kernel.kernel_version, kernel.sha256) == (VERSION, hashlib.sha256(KERNEL).hexdigest())
    taken = banger(daemon, "kernel", "pull", repository, status=1)
    assert "'kernel' exists already" in taken
    assert "--force" in taken
    # what cannot be a name becomes one
    banger(daemon, "kernel", "pull", f"{registry.address}/named/of_it:6..1")
    banger(daemon, "kernel", "pull", f"{repository}:{'x' * 100}")
    banger(daemon, "kernel", "pull", repository, "--as", "mine")
    assert "--as" not in banger(daemon, "kernel", "pull", repository, "--as", "no/name", status=2)
    digest = made.digest.removeprefix("sha256:")
    banger(daemon, "kernel", "pull", f"{repository}@{made.digest}", "--sha256", digest, "--as", "checked")
    assert "SHA-256" in banger(daemon, "kernel", "pull", f"{repository}:6.1", "--sha256", digest, status=1)
    listed = daemon.client.call(op.KERNEL_LIST, m.Empty()).kernels
    names = ["checked", "kernel", f"kernel-{digest[:12]}", "kernel-6.1", "mine", "of_it-6.1"]
    digits = hashlib.sha256(b"kernel-" + b"x" * 100).hexdigest()[:8]
    long = f"kernel-{'x' * 48}-{digits}"
    assert [kernel.name for kernel in listed] == sorted([*names, long])


def test_registries_of_the_configuration(registry: RunningRegistry, modules: Files, tmp_path: Path) -> None:
    made = image(plain(modules))
    for name in ("default/kernel:1", "copies/org/kernel:2"):
        push(registry, tmp_path, name, made)
    mirrors = f'[registry_mirrors]\n"registry.example.org" = ["{registry.address}/copies"]'
    config = f'default_registry = "{registry.address}"\n{mirrors}\n'
    with running_daemon(tmp_path / "daemon", config=config) as daemon:
        banger(daemon, "kernel", "pull", "default/kernel:1")
        assert shown(daemon, "kernel-1").source == f"oci:{registry.address}/default/kernel:1"
        banger(daemon, "kernel", "pull", "registry.example.org/org/kernel:2")
        assert shown(daemon, "kernel-2").source == "oci:registry.example.org/org/kernel:2"


def test_what_the_user_is_told(registry: RunningRegistry, daemon: DaemonProcess, tmp_path: Path) -> None:
    missing = banger(daemon, "kernel", "pull", f"{registry.address}/no/kernel:1", status=1)
    assert f"{registry.address}/no/kernel:1" in missing
    upper = banger(daemon, "kernel", "pull", f"{registry.address}/Org/Kernel:1", status=1)
    assert "'Org/Kernel' is not a repository" in upper
    assert "for example" in upper
    push(registry, tmp_path, "told/arm64:1", image([layer({"boot/Image": builders.arm64_image()})], "arm64"), image([]))
    other = banger(daemon, "kernel", "pull", f"{registry.address}/told/arm64:1", status=1)
    assert f"there is no kernel in {registry.address}/told/arm64:1" in other
    banger(daemon, "kernel", "pull", f"{registry.address}/told/arm64:1", "--arch", "arm64")
    assert shown(daemon, "arm64-1").arch == "arm64"


def test_killed_daemon_leaves_the_old_kernel(server: Server, daemon: DaemonProcess) -> None:
    """In the middle of the second layer of what was to replace it."""
    old = image([layer({LINK: KERNEL})])
    banger(daemon, "kernel", "pull", serve(server, old), "--as", "mine")
    noise = layer({"lib/modules/noise": hashlib.shake_256(b"noise").digest(1 << 20)})
    new = image([layer({LINK: builders.elf(extra=b"new")}), noise])
    reference = serve(server, new)
    server.serve(f"/v2/org/kernel/blobs/{digest_of(noise.data)}", Reply(noise.data, stall=500_000), Reply(noise.data))
    command = [sys.executable, "-m", "banger.cli", "kernel", "pull", reference, "--as", "mine", "--force"]
    with subprocess.Popen(command, env=daemon.environment, stderr=subprocess.DEVNULL) as pulling:
        server.stalled.get(timeout=TIMEOUT)
        daemon.kill()
        assert pulling.wait(TIMEOUT) != 0
    assert list(daemon.layout.cache.rglob(".staging-*"))
    daemon.start()
    assert not list(daemon.layout.state.rglob(".staging-*"))
    assert shown(daemon, "mine").sha256 == hashlib.sha256(KERNEL).hexdigest()
    assert daemon.client.call(op.KERNEL_VERIFY, m.KernelVerify()).kernels == [m.KernelCheck("mine")]
    banger(daemon, "kernel", "pull", reference, "--as", "mine", "--force")
    assert shown(daemon, "mine").sha256 == hashlib.sha256(builders.elf(extra=b"new")).hexdigest()


def test_login_is_asked_for_and_used(daemon: DaemonProcess, modules: Files, tmp_path: Path) -> None:
    with running_registry(tmp_path / "private", password=True) as private:
        push(private, tmp_path, "org/kernel:1", image(plain(modules)))
        reference = f"{private.address}/org/kernel:1"
        refused = banger(daemon, "kernel", "pull", reference, status=1)
        assert f"docker login {private.address}" in refused
        auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        # read for each pull: no restart after a login
        (tmp_path / "auth.json").write_text(json.dumps({"auths": {private.address: {"auth": auth}}}))
        banger(daemon, "kernel", "pull", reference)
    assert shown(daemon, "kernel-1").kernel_version == VERSION
    assert PASSWORD not in daemon.log
    assert auth not in daemon.log


def test_states_of_a_catalog_that_pins_images(
    registry: RunningRegistry, daemon: DaemonProcess, modules: Files, tmp_path: Path
) -> None:
    arm64 = image([layer({"boot/Image": builders.arm64_image()})], "arm64")
    first = push(registry, tmp_path, "pinned/kernel:1", image(plain(modules)), arm64)
    second = push(registry, tmp_path, "pinned/kernel:1", image(split(modules)), arm64)
    image_name = f"{registry.address}/pinned/kernel:1"
    file = tmp_path / "corp.json"

    def publish(day: int, digest: str) -> None:
        entry = {"name": "edge", "distro": "mine", "arch": "amd64", "kernel_version": VERSION, "kind": "oci"}
        images = {
            "edge": f"{registry.address}/pinned/kernel:1@{digest}",
            "moving": f"{registry.address}/pinned/kernel:1",
        }
        entries = [{**entry, "name": name, "image": of} for name, of in images.items()]
        document = {"version": 1, "updated": f"2026-01-0{day}T00:00:00Z", "entries": entries}
        file.write_text(json.dumps(document))

    def state(name: str) -> str:
        catalog = json.loads(banger(daemon, "kernel", "list", "--available", "--json"))["entries"]
        return next(str(found["state"]) for found in catalog if (found["origin"], found["name"]) == ("corp", name))

    publish(1, first)
    banger(daemon, "kernel", "catalog", "add", str(file))
    assert state("edge") == "available"
    banger(daemon, "kernel", "pull", "corp/edge")
    banger(daemon, "kernel", "pull", "moving")
    kernel = shown(daemon, "edge")
    assert (kernel.origin, kernel.distro, kernel.source) == (
        "corp/edge",
        "mine",
        f"oci:{image_name}@{first}",
    )
    # the digest of the index, which is what the catalog names
    assert json.loads((daemon.layout.kernels / "edge/manifest.json").read_bytes())["revision"] == first
    assert (state("edge"), state("moving")) == ("pulled", "pulled")
    publish(2, second)
    banger(daemon, "kernel", "catalog", "refresh")
    assert (state("edge"), state("moving")) == ("outdated", "pulled")
    banger(daemon, "kernel", "pull", "edge", "--force")
    assert state("edge") == "pulled"
