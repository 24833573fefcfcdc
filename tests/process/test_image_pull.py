"""Images out of registries and archives through a daemon: what arrives, what is shared, what is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.imagecat import manifest as images
from tests.daemons import DaemonProcess, running_daemon
from tests.process.test_image_register import install_kernel
from tests.registry import (
    Image,
    Layer,
    RunningRegistry,
    cutting_proxy,
    digest_of,
    image,
    layer,
    oci_layout,
    running_registry,
)

# a program for x86-64 that nobody runs: e_ident and e_machine, System V ABI, "ELF Header"
ELF = b"\x7fELF\x02\x01".ljust(18, b"\0") + (62).to_bytes(2, "little") + bytes(44)
BASE = layer({"bin/": None, "bin/sh": ELF, "etc/": None, "etc/os-release": b'ID=tiny\nPRETTY_NAME="Tiny 1"\n'})
TOP = layer({"etc/": None, "etc/motd": b"hello"})
PADDING = random.Random(1).randbytes(3 << 20)


pytestmark = pytest.mark.usefixtures("no_logins")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path_factory.mktemp("registry") / "registry") as registry:
        yield registry


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path / "daemon") as daemon:
        yield daemon
        staged = [*daemon.layout.images.glob(".staging-*"), *daemon.layout.cache.rglob(".staging-*")]
        assert staged == []


class Pusher:
    """Pushes images made of layers into a registry."""

    def __init__(self, registry: RunningRegistry, directory: Path) -> None:
        self.registry = registry
        self._directory = directory
        self._count = 0

    def __call__(self, name: str, pushed: Image | Sequence[Layer], *options: str) -> str:
        self._count += 1
        made = pushed if isinstance(pushed, Image) else image(pushed)
        self.registry.push(oci_layout(self._directory / str(self._count), [made]), name, *options)
        return f"{self.registry.address}/{name}"


@pytest.fixture
def push(registry: RunningRegistry, tmp_path: Path) -> Pusher:
    return Pusher(registry, tmp_path / "layouts")


def pull(
    daemon: DaemonProcess, name: str, save_as: str = "", *, platform: str = "", kernel: str = "", force: bool = False
) -> m.ImageInfo:
    return daemon.client.call(op.IMAGE_PULL, m.ImagePull(name, save_as, platform, kernel, force))


def refused(daemon: DaemonProcess, name: str, *, platform: str = "", kernel: str = "") -> BangerError:
    with pytest.raises(BangerError) as caught:
        pull(daemon, name, platform=platform, kernel=kernel)
    assert caught.value.hint or caught.value.code is Code.CORRUPT
    return caught.value


def listing(daemon: DaemonProcess, name: str) -> dict[str, bytes]:
    """The files of an image by path."""
    manifest = images.read_local(daemon.layout.images, name)
    rootfs = images.image_paths(daemon.layout.images, manifest).rootfs
    target = daemon.layout.state / f"unpacked-{manifest.rootfs_sha256[:8]}"
    if not target.exists():
        subprocess.run(
            ["unsquashfs", "-quiet", "-no-progress", "-dest", target, rootfs], check=True, capture_output=True
        )
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def cached(daemon: DaemonProcess) -> list[str]:
    return [blob.digest for blob in daemon.client.call(op.IMAGE_CACHE_LIST, m.Empty()).blobs]


def configured(layers: Sequence[Layer], **config: object) -> Image:
    """An image whose configuration says more."""
    made = image(layers)
    fields = json.loads(made.config)
    fields.update(config)
    return with_config(made, json.dumps(fields).encode())


def with_config(made: Image, config: bytes) -> Image:
    manifest = json.loads(made.manifest)
    manifest["config"].update(digest=digest_of(config), size=len(config))
    return dataclasses.replace(made, config=config, manifest=json.dumps(manifest).encode())


def test_an_image_of_a_registry(daemon: DaemonProcess, push: Pusher) -> None:
    config = {
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ["id"],
        "Env": ["PATH=/bin", "A=b=c", "none"],
        "User": "nobody",
        "WorkingDir": "/etc",
        "ExposedPorts": {"80/tcp": {}},
        "Volumes": {"/data": {}},
        "StopSignal": "SIGQUIT",
        "Labels": {"who": "me"},
    }
    name = push("team/tiny:1.0", configured([BASE, TOP], config=config, created="2026-01-02T03:04:05Z"))
    info = pull(daemon, name)
    assert (info.name, info.arch, info.distro, info.source) == ("tiny-1.0", "amd64", "Tiny 1", f"oci:{name}")
    assert (info.entrypoint, info.command, info.env) == (["/bin/sh", "-c"], ["id"], ["PATH=/bin", "A=b=c", "none"])
    assert (info.user, info.workdir, info.stop_signal) == ("nobody", "/etc", "SIGQUIT")
    assert (info.exposed_ports, info.volumes, info.labels) == (["80/tcp"], ["/data"], {"who": "me"})
    assert info.created == "2026-01-02T03:04:05Z"
    assert info.digest.startswith("sha256:")
    files = listing(daemon, "tiny-1.0")
    assert files["etc/motd"] == b"hello"
    assert files["bin/sh"] == ELF
    assert set(cached(daemon)) == {digest_of(BASE.data), digest_of(TOP.data)}
    assert [manifest.name for manifest in images.list_local(daemon.layout.images)[0]] == ["tiny-1.0"]


def test_the_same_digest_is_not_pulled_again(daemon: DaemonProcess, push: Pusher) -> None:
    name = push("same", [BASE])
    first = pull(daemon, name)
    daemon.client.call(op.IMAGE_CACHE_PRUNE, m.CachePrune())
    assert pull(daemon, name) == first
    assert cached(daemon) == []
    assert pull(daemon, name, force=True).sha256 == first.sha256  # same digest, same bytes
    assert cached(daemon) == [digest_of(BASE.data)]


def test_a_tag_that_has_moved(daemon: DaemonProcess, push: Pusher) -> None:
    name = push("moving", [BASE])
    pull(daemon, name)
    push("moving", [BASE, TOP])
    error = refused(daemon, name)
    assert error.code is Code.EXISTS
    assert (
        error.hint == "'banger image pull' gives the new one another name with --as, or replaces that one with --force"
    )
    assert "has changed since" in error.message
    assert pull(daemon, name, force=True).layers == 2


def test_one_index_for_two_platforms(daemon: DaemonProcess, registry: RunningRegistry, tmp_path: Path) -> None:
    arm = image([layer({"bin/": None, "bin/sh": ELF[:18] + (183).to_bytes(2, "little") + ELF[20:]})], "arm64")
    registry.push(oci_layout(tmp_path / "both", [image([BASE]), arm]), "both")
    name = f"{registry.address}/both"
    first = pull(daemon, name)
    assert pull(daemon, name, platform="linux/amd64") == first
    error = refused(daemon, name, platform="linux/arm64")
    assert (error.code, error.message.rpartition(", ")[2]) == (Code.EXISTS, "and it is not the one for linux/arm64")
    assert pull(daemon, name, "arm", platform="linux/arm64").arch == "arm64"
    assert pull(daemon, name, "arm", platform="arm64").digest == first.digest
    assert pull(daemon, name, platform="linux/arm64", force=True).arch == "arm64"
    error = refused(daemon, name, platform="linux/s390x")  # before anything is asked for
    assert (error.code, error.message) == (Code.UNSUPPORTED, "no VM can run an image for linux/s390x")


def test_kernels_are_those_of_the_platform(tmp_path: Path, push: Pusher) -> None:
    with running_daemon(tmp_path / "daemon") as daemon:
        error = refused(daemon, f"{push('kernel/app', [BASE])}-gone", kernel="debian-cloud")
        assert (error.code, "has no image" in error.message) == (Code.NOT_FOUND, True)
        arm = image([BASE], "arm64")
        missing = {"name": "arm-only", "distro": "x", "arch": "arm64", "kernel_version": "1", "kind": "future"}
        (tmp_path / "catalog.json").write_text(json.dumps({"version": 1, "entries": [missing]}))
        daemon.client.call(op.KERNEL_CATALOG_ADD, m.CatalogAdd(str(tmp_path / "catalog.json"), "corp"))
        error = refused(daemon, push("kernel/arm", arm), platform="arm64", kernel="arm-only")
        assert "'arm-only' is of the kind 'future'" in error.message  # found for arm64, and of use to nobody
        install_kernel(daemon.layout.kernels)
        error = refused(daemon, push("kernel/arm", arm), platform="arm64", kernel="mine")
        assert (error.code, error.message) == (
            Code.INVALID, "the image 'arm' is for arm64, the kernel 'mine' for amd64"
        )  # fmt: skip
        assert cached(daemon) == []


def test_two_references_for_one_name(daemon: DaemonProcess, push: Pusher) -> None:
    pull(daemon, push("one/app:2", [BASE]))
    other = push("two/app:2", [BASE])
    error = refused(daemon, other)
    assert error.code is Code.EXISTS
    assert "belongs to an image from oci:" in error.message
    assert "--as" in error.hint
    assert pull(daemon, other, save_as="second").name == "second"


def test_layers_are_downloaded_once(daemon: DaemonProcess, push: Pusher, registry: RunningRegistry) -> None:
    pull(daemon, push("shared/one", [BASE, TOP]))
    two = push("shared/two", [BASE, layer({"two": b"2"})])
    stored = registry.blob(digest_of(BASE.data))
    away = stored.with_name("away")
    stored.rename(away)
    try:
        assert listing(daemon, pull(daemon, two).name)["two"] == b"2"
    finally:
        away.rename(stored)


def test_a_blob_that_was_damaged_in_the_cache_is_fetched_again(daemon: DaemonProcess, push: Pusher) -> None:
    name = push("damaged", [BASE, layer({"padding": PADDING})])
    first = pull(daemon, name)
    for blob in daemon.layout.blobs.iterdir():
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)
    assert pull(daemon, name, force=True).sha256 == first.sha256
    assert daemon.client.call(op.IMAGE_CACHE_VERIFY, m.Empty()) == m.CacheVerified(2, [])


def test_damage_in_the_cache_that_looks_like_something_else(daemon: DaemonProcess, push: Pusher) -> None:
    name = push("disguised", [BASE])
    first = pull(daemon, name)
    (blob,) = daemon.layout.blobs.iterdir()
    blob.write_bytes(b"\x89LZO\x00\r\n\x1a\n".ljust(blob.stat().st_size, b"\0"))  # which is not supported
    assert pull(daemon, name, force=True).sha256 == first.sha256


def test_what_strays_into_the_cache(tmp_path: Path, push: Pusher) -> None:
    with running_daemon(tmp_path / "daemon", config="cache_size = 0\n") as daemon:
        in_the_way = daemon.layout.blobs / digest_of(BASE.data).removeprefix("sha256:")
        for stray in (in_the_way, daemon.layout.blobs / "mine", daemon.layout.blobs / ("0" * 64)):
            (stray / "directory").mkdir(parents=True)
        pull(daemon, push("stray", [BASE]))
        assert cached(daemon) == []
        assert sorted(path.name for path in daemon.layout.blobs.iterdir()) == ["0" * 64, "mine"]


def test_a_cache_that_is_no_directory(daemon: DaemonProcess, push: Pusher) -> None:
    daemon.layout.blobs.parent.mkdir(parents=True)
    daemon.layout.blobs.write_bytes(b"mine")
    with pytest.raises(BangerError, match="cannot be written: File exists"):
        pull(daemon, push("nowhere", [BASE]))
    calls: list[Callable[[], object]] = [
        lambda: daemon.client.call(op.IMAGE_CACHE_LIST, m.Empty()),
        lambda: daemon.client.call(op.IMAGE_CACHE_VERIFY, m.Empty()),
        lambda: daemon.client.call(op.IMAGE_CACHE_PRUNE, m.CachePrune()),
    ]
    for call in calls:
        with pytest.raises(BangerError, match="cannot be read: Not a directory") as caught:
            call()
        assert "remove it" in caught.value.hint
    assert daemon.layout.blobs.read_bytes() == b"mine"


def test_the_cache_is_listed_verified_pruned_and_held_to_its_limit(tmp_path: Path, push: Pusher) -> None:
    large = layer({"padding": PADDING})
    with running_daemon(tmp_path / "daemon", config=f"cache_size = {4 << 20}\n") as daemon:
        pull(daemon, push("cache/one", [BASE, large]))
        listed = daemon.client.call(op.IMAGE_CACHE_LIST, m.Empty()).blobs
        assert {blob.digest: blob.images for blob in listed} == {
            digest_of(BASE.data): ["one"],
            digest_of(large.data): ["one"],
        }
        assert not any(blob.in_use for blob in listed)
        pull(daemon, push("cache/two", [BASE, layer({"other": PADDING[::-1]})]))
        assert digest_of(large.data) not in cached(daemon)
        assert digest_of(BASE.data) in cached(daemon)
        damaged = daemon.layout.blobs / digest_of(BASE.data).removeprefix("sha256:")
        damaged.write_bytes(b"x")
        verified = daemon.client.call(op.IMAGE_CACHE_VERIFY, m.Empty())
        assert verified == m.CacheVerified(2, [digest_of(BASE.data)])
        pruned = daemon.client.call(op.IMAGE_CACHE_PRUNE, m.CachePrune())
        assert pruned.blobs == 1
        assert pruned.freed_bytes > 3 << 20
        assert cached(daemon) == []


@pytest.mark.parametrize(("packed", "form"), [("gzip", "v2s2"), ("gzip", "oci"), ("zstd", "oci")])
def test_formats(daemon: DaemonProcess, push: Pusher, packed: str, form: str) -> None:
    layers = [layer({"bin/": None, "bin/sh": ELF}, packed), layer({"a": b"a"}, packed)]
    name = push(f"formats/{packed}-{form}", layers, "--format", form)
    assert listing(daemon, pull(daemon, name).name) == {"bin/sh": ELF, "a": b"a"}


@pytest.mark.parametrize("transport", ["oci", "oci-archive", "docker-archive"])
def test_images_in_files(daemon: DaemonProcess, tmp_path: Path, transport: str) -> None:
    layout = oci_layout(tmp_path / "layout", [image([BASE, TOP])])
    target = tmp_path / "saved"
    tag = "team/app:3" if transport == "docker-archive" else "v3"
    copy = ["skopeo", "copy", "--quiet", "--insecure-policy", f"oci:{layout}", f"{transport}:{target}:{tag}"]
    subprocess.run(copy, check=True, capture_output=True)
    info = pull(daemon, f"{transport}:{target}:{tag}")
    assert info.name == ("app-3" if transport == "docker-archive" else "saved-v3")
    assert listing(daemon, info.name)["etc/motd"] == b"hello"
    assert cached(daemon) == []  # they lie on this host already
    assert pull(daemon, f"{transport}:{target}:{tag}") == info


def test_files_beside_the_layers(daemon: DaemonProcess, push: Pusher) -> None:
    # titles as of a ModelCar, on what is an archive all the same
    titled = dataclasses.replace(TOP, annotations={"org.opencontainers.image.title": "weights"})
    assert listing(daemon, pull(daemon, push("titled", image([BASE, titled]))).name)["etc/motd"] == b"hello"
    # a layer of another kind, of which the configuration says nothing
    note = Layer(b"{}", digest_of(b"{}"), "application/vnd.in-toto+json")
    with_note = with_config(image([BASE, note, TOP]), image([BASE, TOP]).config)
    info = pull(daemon, push("beside", with_note))
    assert listing(daemon, info.name)["etc/motd"] == b"hello"
    assert [layer.digest for layer in images.read_local(daemon.layout.images, "beside").layers] == [
        digest_of(BASE.data),
        digest_of(TOP.data),
    ]


def test_null_is_as_absent(daemon: DaemonProcess, push: Pusher) -> None:
    keys = ("Entrypoint", "Cmd", "Env", "User", "WorkingDir", "Volumes", "ExposedPorts", "StopSignal", "Labels")
    nothing = {**dict.fromkeys((*keys, "Healthcheck", "Shell", "OnBuild")), "Cmd": ["id"]}
    made = configured([BASE], config=nothing, variant=None, created=None, author=None, history=None)
    manifest = json.loads(made.manifest)
    manifest |= dict.fromkeys(("annotations", "subject", "artifactType"))
    for descriptor in (manifest["config"], *manifest["layers"]):
        descriptor |= dict.fromkeys(("annotations", "urls", "data", "platform", "artifactType"))
    name = push("null", dataclasses.replace(made, manifest=json.dumps(manifest).encode()))
    assert pull(daemon, name).command == ["id"]


REFUSED: dict[str, tuple[Callable[[], Image], Code, str]] = {
    "layers that unpack to something else": (
        lambda: with_config(image([BASE, TOP]), image([TOP, BASE]).config),
        Code.CORRUPT,
        "is not what its image was made of",
    ),
    "a configuration of fewer layers": (
        lambda: with_config(image([BASE, TOP]), image([BASE]).config),
        Code.CORRUPT,
        "has 2 layers, its configuration speaks of 1",
    ),
    "no configuration": (lambda: with_config(image([BASE]), b"[]"), Code.CORRUPT, "is not a JSON object"),
    "digests of another kind": (
        lambda: configured([BASE], rootfs={"diff_ids": ["md5:1"]}),
        Code.CORRUPT,
        "'diff_ids' in",
    ),
    "no layers": (lambda: image([]), Code.CORRUPT, "has no layers"),
    "an artifact": (
        lambda: image([Layer(b"{}", digest_of(b"{}"), "application/vnd.in-toto+json")]),
        Code.UNSUPPORTED,
        "is not the image of a root filesystem",
    ),
    "another platform": (
        lambda: image([BASE], architecture="s390x"),
        Code.NOT_FOUND,
        "is for 'linux/s390x', not for linux/amd64",
    ),
    "no program": (lambda: image([TOP]), Code.CORRUPT, "there is no program in it"),
    "no tar": (
        lambda: image([Layer(b"hello", digest_of(b"hello"), BASE.media_type)]),
        Code.CORRUPT,
        "layer 1 of",
    ),
    "gzip that is cut off": (
        lambda: image([dataclasses.replace(BASE, data=BASE.data[:-20])]),
        Code.CORRUPT,
        "is damaged",
    ),
    "a name that leads out": (
        lambda: image([BASE, layer({"../../etc/passwd": b""})]),
        Code.CORRUPT,
        "points out of the archive",
    ),
    "a configuration of wrong types": (
        lambda: configured([BASE], config={"Env": "PATH=/bin"}),
        Code.CORRUPT,
        "'Env' in",
    ),
    "NUL characters": (lambda: configured([BASE], config={"User": "a\0b"}), Code.CORRUPT, "NUL"),
    "NUL characters in a list": (lambda: configured([BASE], config={"Env": ["A=\0"]}), Code.CORRUPT, "NUL"),
    "an environment beyond what is read again": (
        lambda: configured([BASE], config={"Env": ["A=" + "x" * (3 << 20), *["B="] * 50_000]}),
        Code.CORRUPT,
        "3,145,728 are possible",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(daemon: DaemonProcess, push: Pusher, case: str) -> None:
    make, code, message = REFUSED[case]
    name = push(f"refused/{list(REFUSED).index(case)}", make())
    error = refused(daemon, name)
    assert error.code is code
    assert message in error.message
    assert "\n" not in error.message
    assert list(daemon.layout.images.iterdir()) == []


def test_an_escaped_backslash_is_no_nul(daemon: DaemonProcess, push: Pusher) -> None:
    command = r"printf '\u0000' > /dev/null"
    name = push("escaped", configured([BASE], config={"Cmd": [command]}, history=[{"created_by": command}]))
    assert pull(daemon, name).command == [command]


def test_much_that_an_image_says_can_be_read_again(daemon: DaemonProcess, push: Pusher) -> None:
    config = {"Env": [f"A{number}=\N{SNOWMAN}" for number in range(10_000)], "Labels": {"long": "x" * (3 << 20)}}
    pull(daemon, push("much", configured([BASE], config=config)))
    assert len(images.read_local(daemon.layout.images, "much").config.env) == 10_000


def test_unknown_images(tmp_path: Path, registry: RunningRegistry) -> None:
    config = f'default_registry = "{registry.address}"\n'
    with running_daemon(tmp_path / "daemon", config=config) as daemon:
        error = refused(daemon, "debian-bookwurm")
        assert error.code is Code.NOT_FOUND
        assert "no image 'debian-bookwurm' in the catalogs, and the registry has no image" in error.message
        assert error.hint == "did you mean 'debian-bookworm'?"
        error = refused(daemon, "corp/edge")
        assert error.message == "there is no catalog 'corp'"
        error = refused(daemon, "Not A Reference")
        assert error.code is Code.INVALID


def test_a_connection_that_breaks_is_resumed(daemon: DaemonProcess, push: Pusher, registry: RunningRegistry) -> None:
    push("broken", [BASE, layer({"padding": PADDING})])
    with cutting_proxy(registry.address, after=1 << 20, times=2) as proxy:
        info = pull(daemon, f"{proxy.address}/broken")
        assert proxy.broken
    assert listing(daemon, info.name)["padding"] == PADDING


def test_a_registry_that_goes_away(daemon: DaemonProcess, push: Pusher, registry: RunningRegistry) -> None:
    push("lost", [BASE, layer({"padding": PADDING})])
    with cutting_proxy(registry.address, after=1 << 16, times=1000) as proxy:
        error = refused(daemon, f"{proxy.address}/lost")
    assert error.code is Code.DOWNLOAD
    assert list(daemon.layout.images.iterdir()) == []


def together(*work: Callable[[], object]) -> list[object]:
    """The results or errors of calls that begin at once."""
    results: list[object] = [None] * len(work)
    barrier = threading.Barrier(len(work))

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = work[index]()
        except BangerError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_parallel_pulls_of_one_reference_are_one_download(
    daemon: DaemonProcess, push: Pusher, registry: RunningRegistry
) -> None:
    push("once", [BASE, layer({"padding": PADDING})])
    with cutting_proxy(registry.address, after=1 << 40) as proxy:
        name = f"{proxy.address}/once"
        infos = together(*[lambda: pull(daemon, name)] * 6)
        blobs = [head for head in proxy.heads if f"/blobs/{digest_of(BASE.data)}" in head]
    assert len({repr(info) for info in infos}) == 1
    assert isinstance(infos[0], m.ImageInfo)
    assert len(blobs) == 1


def test_parallel_pulls_to_one_name_have_one_winner(daemon: DaemonProcess, push: Pusher) -> None:
    names = [push(f"race/{number}", [BASE, layer({"who": b"%d" % number})]) for number in range(4)]
    results = together(*[lambda name=name: pull(daemon, name, save_as="winner") for name in names])
    won = [result for result in results if isinstance(result, m.ImageInfo)]
    lost = [result for result in results if isinstance(result, BangerError)]
    assert (len(won), {error.code for error in lost}) == (1, {Code.EXISTS})
    assert listing(daemon, "winner")["who"] == won[0].source.rpartition("/")[2].partition(":")[0].encode()


def test_pulls_against_removals_and_replacements(daemon: DaemonProcess, push: Pusher) -> None:
    name = push("against", [BASE])
    for _ in range(10):
        results = together(
            lambda: pull(daemon, name, save_as="it"),
            lambda: pull(daemon, name, save_as="it", force=True),
            lambda: daemon.client.call(op.IMAGE_DELETE, m.ImageDelete("it")),
            lambda: daemon.client.call(op.IMAGE_TAG, m.ImageTag("it", "copy", True)),
        )
        assert [result for result in results[:2] if isinstance(result, BangerError)] == []
        assert {result.code for result in results if isinstance(result, BangerError)} <= {Code.NOT_FOUND}
        checks = daemon.client.call(op.IMAGE_VERIFY, m.ImageVerify()).images
        assert [check for check in checks if check.problem] == []
