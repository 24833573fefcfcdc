"""Images in layouts and archives: what skopeo and podman write, and what nobody should."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import zstandard

from banger.api.errors import BangerError, Code
from banger.disk import space
from banger.job import Job, Progress
from banger.oci import files as archive_files
from banger.oci.manifest import Descriptor, Image
from banger.oci.platform import Platform
from banger.oci.source import Environment, open_source
from tests.registry import MANIFEST, Layer, digest_of, image, layer, oci_layout
from tests.registry import Image as Built

AMD64 = Platform.parse("linux/amd64")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return oci_layout(tmp_path / "layout", [small()])


@functools.cache
def small(architecture: str = "amd64") -> Built:
    return image([layer({"a": architecture.encode()}), layer({"b": b"second"}, "zstd"), layer({}, "")], architecture)


@functools.cache
def old() -> Built:
    """An image that docker's own format can hold."""
    return image([layer({"a": b"first"}), layer({"b": b"second"}), layer({}, "")])


def pull(text: str, tmp_path: Path, platform: Platform = AMD64) -> tuple[Image, bytes, list[bytes]]:
    """An image, its config and its layers."""
    with open_source(text, Job(), Environment(tmp_path / "cache")) as source:
        found = source.resolve(platform)
        config = b"".join(source.blob(found.config, "config"))
        return found, config, [b"".join(source.blob(each, "layer")) for each in found.layers]


def failure(text: str, tmp_path: Path, platform: Platform = AMD64) -> BangerError:
    with pytest.raises(BangerError) as caught:
        pull(text, tmp_path, platform)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    return caught.value


def require(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"there is no {tool} (Debian: apt-get install {tool})")


def skopeo(*argv: str | Path) -> None:
    require("skopeo")
    subprocess.run(["skopeo", "copy", "--quiet", "--insecure-policy", *argv], check=True)


def unpacked(each: Layer) -> bytes:
    if each.media_type.endswith("gzip"):
        return gzip.decompress(each.data)
    return zstandard.ZstdDecompressor().decompress(each.data) if each.media_type.endswith("zstd") else each.data


def write_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """A tar of files (bytes) and symbolic links (their targets)."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def rewrite(layout: Path, **changes: object) -> None:
    """Change fields of the only entry of a layout's index."""
    index = json.loads((layout / "index.json").read_text())
    index["manifests"][0] |= changes
    (layout / "index.json").write_text(json.dumps(index))


def blob_path(layout: Path, data: bytes) -> Path:
    return layout / "blobs/sha256" / hashlib.sha256(data).hexdigest()


# what skopeo and podman write


def test_layout_of_skopeo(layout: Path, tmp_path: Path) -> None:
    skopeo("--preserve-digests", f"oci:{layout}", f"oci:{tmp_path}/copy:one")
    skopeo(f"oci:{oci_layout(tmp_path / 'other', [image([layer({'c': b'other'})])])}", f"oci:{tmp_path}/copy:two")
    built = small()
    for text in (f"oci:{layout}", f"oci:{tmp_path}/copy:one", f"oci:{tmp_path}/copy:@0"):
        found, config, layers = pull(text, tmp_path)
        assert (found.digest, found.manifest, config) == (built.digest, built.digest, built.config)
        assert layers == [each.data for each in built.layers]
    assert len(pull(f"oci:{tmp_path}/copy:two", tmp_path)[2]) == 1
    several = failure(f"oci:{tmp_path}/copy", tmp_path)
    assert (several.code, several.message) == (Code.INVALID, f"'{tmp_path}/copy' has several images: 'one', 'two'")
    missing = failure(f"oci:{tmp_path}/copy:three", tmp_path)
    assert missing.code is Code.NOT_FOUND
    assert "has no image 'three', but 'one', 'two'" in missing.message


@pytest.mark.parametrize("pack", [None, gzip.compress, lzma.compress, zstandard.ZstdCompressor().compress])
def test_archive_of_a_layout(layout: Path, tmp_path: Path, pack: Callable[[bytes], bytes] | None) -> None:
    file = tmp_path / "image.tar"
    skopeo("--preserve-digests", f"oci:{layout}", f"oci-archive:{file}:name:1")
    if pack:
        file.write_bytes(pack(file.read_bytes()))
    built = small()
    for text in (f"oci-archive:{file}", f"oci-archive:{file}:name:1"):
        found, config, layers = pull(text, tmp_path)
        assert (found.digest, config) == (built.digest, built.config)
        assert layers == [each.data for each in built.layers]
    assert list((tmp_path / "cache").glob("*")) == []


@pytest.mark.parametrize("packed", [False, True])
def test_archive_of_docker_save(tmp_path: Path, packed: bool) -> None:
    file = tmp_path / "image.tar"
    skopeo(f"oci:{oci_layout(tmp_path / 'old', [old()])}", f"docker-archive:{file}:example.org/name:1")
    if packed:
        file.write_bytes(gzip.compress(file.read_bytes()))
    built = old()
    for name in ("", ":example.org/name:1", ":@0"):
        found, config, layers = pull(f"docker-archive:{file}{name}", tmp_path)
        assert found.digest == found.manifest == digest_of(config)
        assert layers == [unpacked(each) for each in built.layers]
        assert [each.digest for each in found.layers] == [each.diff_id for each in built.layers]
        assert json.loads(config)["architecture"] == "amd64"
    error = failure(f"docker-archive:{file}:name:1", tmp_path)
    assert error.code is Code.NOT_FOUND
    assert "has no image 'name:1', but 'example.org/name:1'" in error.message
    error = failure(f"docker-archive:{file}", tmp_path, Platform.parse("arm64"))
    assert (error.code, "is for 'linux/amd64', not for linux/arm64" in error.message) == (Code.NOT_FOUND, True)


def test_several_images_of_podman(tmp_path: Path) -> None:
    require("podman")
    first = oci_layout(tmp_path / "first", [old()])
    other = oci_layout(tmp_path / "other", [image([old().layers[0], layer({"c": b"other"})])])
    file = tmp_path / "both.tar"
    names = ["localhost/first:1", "docker.io/library/second:2"]
    with tempfile.TemporaryDirectory(prefix="podman-") as state:  # podman refuses longer paths than 50 characters
        storage = ["--root", f"{state}/root", "--runroot", f"{state}/run", "--storage-driver", "vfs"]
        podman = ["podman", *storage, "--events-backend", "none"]
        for directory, name in zip((first, other), names, strict=True):
            pulled = subprocess.run([*podman, "pull", "--quiet", f"oci:{directory}"], check=True, stdout=-1)
            subprocess.run([*podman, "tag", pulled.stdout.decode().strip(), name], check=True)
        save = [*podman, "save", "--quiet", "--multi-image-archive", "--format", "docker-archive"]
        subprocess.run([*save, "--output", str(file), *names], check=True)
        subprocess.run(["chmod", "-R", "u+rwx", state], check=True)
    assert pull(f"docker-archive:{file}:localhost/first:1", tmp_path)[2] == [unpacked(each) for each in old().layers]
    assert len(pull(f"docker-archive:{file}:second:2", tmp_path)[2]) == 2
    error = failure(f"docker-archive:{file}", tmp_path)
    assert error.code is Code.INVALID
    assert all(name in error.message for name in names)


def test_current_docker_save_is_a_layout_as_well(layout: Path, tmp_path: Path) -> None:
    """Its layers may be compressed, and manifest.json names them by the layout's blobs."""
    built = small()
    names = [f"blobs/sha256/{digest_of(each.data)[7:]}" for each in built.layers]
    config = f"blobs/sha256/{digest_of(built.config)[7:]}"
    entry = {"Config": config, "RepoTags": ["name:1"], "Layers": names}
    (layout / "manifest.json").write_text(json.dumps([entry]))
    annotations = {"io.containerd.image.name": "docker.io/library/name:1", "org.opencontainers.image.ref.name": "1"}
    rewrite(layout, annotations=annotations)
    file = tmp_path / "image.tar"
    subprocess.run(["tar", "-C", layout, "-cf", file, "."], check=True)
    assert pull(f"docker-archive:{file}:name:1", tmp_path)[2] == [each.data for each in built.layers]
    for name in ("name:1", "docker.io/library/name:1", "1"):
        found, _, layers = pull(f"oci-archive:{file}:{name}", tmp_path)
        assert (found.digest, layers) == (built.digest, [each.data for each in built.layers])


def docker_members(built: Built, **changes: object) -> dict[str, bytes | str]:
    """What an old `docker save` writes: a directory per layer."""
    names = [f"{number}/layer.tar" for number, _ in enumerate(built.layers)]
    entry: dict[str, object] = {"Config": "config.json", "RepoTags": None, "Layers": names} | changes
    members: dict[str, bytes | str] = {name: unpacked(each) for name, each in zip(names, built.layers, strict=True)}
    return {**members, "config.json": built.config, "manifest.json": json.dumps([entry]).encode()}


def test_layers_that_are_links(tmp_path: Path) -> None:
    """Old `docker save` writes a layer that was there before as a link to it."""
    first = layer({"a": b"once"})
    members = docker_members(image([first, first]))
    members["1/layer.tar"] = "../0/layer.tar"
    file = write_tar(tmp_path / "image.tar", members)
    assert pull(f"docker-archive:{file}", tmp_path)[2] == [unpacked(first)] * 2
    for target in ("../1/layer.tar", "../../../../etc/passwd", "/etc/passwd", "gone"):
        members["1/layer.tar"] = target
        assert failure(f"docker-archive:{write_tar(file, members)}", tmp_path).code is Code.CORRUPT


def test_compressed_layers_of_others(tmp_path: Path) -> None:
    """Docker loads them, and so some tools write them."""
    built = small()
    members = docker_members(built) | {f"{number}/layer.tar": each.data for number, each in enumerate(built.layers)}
    found, _, layers = pull(f"docker-archive:{write_tar(tmp_path / 'image.tar', members)}", tmp_path)
    assert layers == [each.data for each in built.layers]
    assert [each.media_type for each in found.layers] == [each.media_type for each in built.layers]


# platforms


def test_layout_for_several_platforms(tmp_path: Path) -> None:
    built = [small("amd64"), small("arm64")]
    directory = oci_layout(tmp_path / "many", built)
    index = json.loads((directory / "index.json").read_text())
    for each in built:
        found, _, layers = pull(f"oci:{directory}", tmp_path, Platform.parse(each.architecture))
        assert (found.digest, found.manifest) == (index["manifests"][0]["digest"], each.digest)
        assert layers == [part.data for part in each.layers]
    error = failure(f"oci:{directory}", tmp_path, Platform.parse("riscv64"))
    assert error.code is Code.NOT_FOUND
    assert "is for 'linux/amd64, linux/arm64', not for linux/riscv64" in error.message
    assert "--platform" in error.hint


def test_platforms_in_the_index_of_the_layout(tmp_path: Path) -> None:
    """As buildah and ko write it: no index in between, and attestations beside the images."""
    built = [small("amd64"), small("arm64")]
    directory = oci_layout(tmp_path / "many", built)
    inner = json.loads(blob_path(directory, b"").with_name(top_digest(directory)[7:]).read_bytes())
    unknown = {**inner["manifests"][0], "platform": {"os": "unknown", "architecture": "unknown"}}
    inner["manifests"].insert(0, unknown)
    (directory / "index.json").write_text(json.dumps(inner))
    for each in built:
        found, _, _ = pull(f"oci:{directory}", tmp_path, Platform.parse(each.architecture))
        assert (found.digest, found.manifest) == (digest_of((directory / "index.json").read_bytes()), each.digest)


def index_entry(directory: Path, data: bytes, **more: object) -> dict[str, object]:
    blob_path(directory, data).write_bytes(data)
    return {"mediaType": MANIFEST, "digest": digest_of(data), "size": len(data), **more}


def artifact(directory: Path) -> bytes:
    """A manifest of something that is no image, as ORAS, cosign and Helm write it."""
    config = b"{}"
    blob_path(directory, config).write_bytes(config)
    descriptor = {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": digest_of(config), "size": 2}
    return json.dumps(
        {"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor, "layers": [descriptor]}
    ).encode()


@pytest.mark.parametrize("platform", [None, {}, {"os": "", "architecture": ""}])
def test_entries_without_a_platform_are_for_what_their_images_say(tmp_path: Path, platform: object) -> None:
    built = [small("amd64"), small("arm64")]
    directory = oci_layout(tmp_path / "many", built)
    beside = [index_entry(directory, artifact(directory))]
    entries = [index_entry(directory, each.manifest, platform=platform) for each in built]
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": beside + entries}))
    for each in built:
        found, _, _ = pull(f"oci:{directory}", tmp_path, Platform.parse(each.architecture))
        assert found.manifest == each.digest
    error = failure(f"oci:{directory}", tmp_path, Platform.parse("riscv64"))
    assert error.code is Code.NOT_FOUND
    assert "is for 'linux/amd64, linux/arm64', not for linux/riscv64" in error.message


def test_an_image_that_says_what_it_is_for_comes_before_one_that_does_not(tmp_path: Path) -> None:
    first, second = small("amd64"), image([layer({"other": b"1"})])
    directory = oci_layout(tmp_path / "many", [first, second])
    entries = [index_entry(directory, first.manifest)]
    # no operating system means the usual one
    entries.append(index_entry(directory, second.manifest, platform={"architecture": "amd64"}))
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    found, _, _ = pull(f"oci:{directory}", tmp_path, Platform.parse("amd64"))
    assert found.manifest == second.digest


@pytest.mark.parametrize("named", [False, True])
def test_artifacts_beside_an_image(tmp_path: Path, named: bool) -> None:
    built = small("amd64")
    directory = oci_layout(tmp_path / "many", [built])
    platform = {"os": "linux", "architecture": "amd64"}
    names = {"annotations": {"org.opencontainers.image.ref.name": "1.2"}} if named else {}
    entries = [
        index_entry(directory, artifact(directory), **({} if named else {"platform": platform})),
        index_entry(directory, built.manifest, **names, platform=platform),
    ]
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    found, _, _ = pull(f"oci:{directory}", tmp_path, Platform.parse("amd64"))
    assert found.manifest == built.digest
    # alone it is what there is: kernels come so, too
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries[:1]}))
    found, _, _ = pull(f"oci:{directory}", tmp_path, Platform.parse("amd64"))
    assert found.manifest == entries[0]["digest"]


def top_digest(directory: Path) -> str:
    index = json.loads((directory / "index.json").read_text())
    assert isinstance(index["manifests"][0]["digest"], str)
    return index["manifests"][0]["digest"]


# what nobody should write


def test_paths_that_are_something_else(layout: Path, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "file.tar", {"etc/passwd": b""})
    os.mkfifo(tmp_path / "fifo")
    for text, code, said in (
        (f"oci:{tmp_path}/gone", Code.NOT_FOUND, "there is no directory"),
        (f"oci:{file}", Code.INVALID, "is not a directory"),
        (f"oci:{tmp_path}", Code.CORRUPT, "is no OCI layout"),
        ("oci:relative", Code.INVALID, "is not an absolute path"),
        (f"oci-archive:{tmp_path}/gone", Code.NOT_FOUND, "there is no file"),
        (f"oci-archive:{layout}", Code.INVALID, "cannot be read"),
        (f"oci-archive:{file}", Code.CORRUPT, "is no OCI layout: it has no 'oci-layout'"),
        (f"docker-archive:{file}", Code.CORRUPT, "is no archive of `docker save`"),
        (f"docker-archive:{tmp_path}/fifo", Code.INVALID, "not a regular file"),
        ("docker-archive:/dev/zero", Code.INVALID, "not a regular file"),
        (f"docker-archive:{__file__}", Code.CORRUPT, "is a text file, not an archive of images"),
    ):
        error = failure(text, tmp_path)
        assert (error.code, said in error.message) == (code, True), error.message
    write_tar(file, {"repositories": b"{}"})
    assert "Docker before 1.10" in failure(f"docker-archive:{file}", tmp_path).hint
    write_tar(file, {"index.json": b"{}"})
    assert "oci-archive:" in failure(f"docker-archive:{file}", tmp_path).hint
    write_tar(file, {"manifest.json": b"[]"})
    assert "docker-archive:" in failure(f"oci-archive:{file}", tmp_path).hint


@pytest.mark.parametrize(
    "how", ["link", "link to a directory", "fifo", "directory", "gone", "shorter", "longer", "changed"]
)
@pytest.mark.parametrize("which", ["layer", "config", "manifest"])
def test_damaged_blob(layout: Path, tmp_path: Path, how: str, which: str) -> None:
    built = small()
    data = {"layer": built.layers[1].data, "config": built.config, "manifest": built.manifest}[which]
    blob = blob_path(layout, data)
    blob.unlink()
    if how == "link":
        blob.symlink_to("/etc/passwd")
    elif how == "link to a directory":
        blob.write_bytes(data)
        (layout / "blobs").rename(tmp_path / "elsewhere")
        (layout / "blobs").symlink_to(tmp_path / "elsewhere")
    elif how == "fifo":
        os.mkfifo(blob)
    elif how == "directory":
        blob.mkdir()
    elif how != "gone":
        blob.write_bytes({"shorter": data[:-1], "longer": data + b"x", "changed": b"x" + data[1:]}[how])
    error = failure(f"oci:{layout}", tmp_path)
    assert error.code is Code.CORRUPT
    assert (blob.name if how != "link to a directory" else "blobs/sha256/") in error.message


def test_link_with_the_right_content_is_refused_too(layout: Path, tmp_path: Path) -> None:
    blob = blob_path(layout, small().config)
    blob.rename(tmp_path / "config")
    blob.symlink_to(tmp_path / "config")
    assert failure(f"oci:{layout}", tmp_path).code is Code.CORRUPT


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"digest": "sha256:../../../../../../etc/passwd"}, Code.CORRUPT),
        ({"digest": "sha512:" + "0" * 128}, Code.CORRUPT),
        ({"digest": "sha256:" + "0" * 64}, Code.CORRUPT),
        ({"size": 1 << 40}, Code.CORRUPT),
        ({"size": 0}, Code.CORRUPT),
        ({"platform": {"os": "windows", "architecture": "amd64"}}, Code.NOT_FOUND),
        ({"platform": 1}, Code.CORRUPT),
        ({"annotations": {"org.opencontainers.image.ref.name": 1}}, Code.CORRUPT),
    ],
)
def test_wrong_entries(layout: Path, tmp_path: Path, changes: dict[str, object], code: Code) -> None:
    rewrite(layout, **changes)
    assert failure(f"oci:{layout}", tmp_path).code is code


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        ("index.json", b"", Code.CORRUPT),
        ("index.json", b"[]", Code.CORRUPT),
        ("index.json", b"{}", Code.CORRUPT),
        ("index.json", b'{"schemaVersion": 2, "layers": []}', Code.CORRUPT),
        ("index.json", b'{"schemaVersion": 2, "manifests": []}', Code.NOT_FOUND),
        ("index.json", bytes((4 << 20) + 1), Code.CORRUPT),
        ("index.json", b"[" * 100_000, Code.CORRUPT),
        ("oci-layout", b"{}", Code.CORRUPT),
        ("oci-layout", b'{"imageLayoutVersion": "2.0.0"}', Code.UNSUPPORTED),
    ],
)
def test_wrong_files(layout: Path, tmp_path: Path, file: str, content: bytes, code: Code) -> None:
    (layout / file).write_bytes(content)
    assert failure(f"oci:{layout}", tmp_path).code is code


@pytest.mark.parametrize(
    "changes",
    [
        {"Config": "gone.json"},
        {"Config": "../../etc/passwd"},
        {"Config": "0/layer.tar"},
        {"Config": 1},
        {"Layers": None},
        {"Layers": ["0/layer.tar"]},
        {"Layers": ["0/layer.tar", "1/layer.tar", "/etc/passwd"]},
        {"Layers": ["0/layer.tar", "2/layer.tar", "1/layer.tar"]},
        {"Layers": ["0/layer.tar"] * 501},
        {"RepoTags": [1]},
    ],
    ids=str,
)
def test_wrong_docker_archives(tmp_path: Path, changes: dict[str, object]) -> None:
    file = write_tar(tmp_path / "image.tar", docker_members(small(), **changes))
    assert failure(f"docker-archive:{file}", tmp_path).code is Code.CORRUPT


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"[{}]", b"[" * 100_000])
def test_wrong_manifests_of_docker_archives(tmp_path: Path, content: bytes) -> None:
    file = write_tar(tmp_path / "image.tar", docker_members(small()) | {"manifest.json": content})
    assert failure(f"docker-archive:{file}", tmp_path).code is Code.CORRUPT
    empty = write_tar(tmp_path / "image.tar", docker_members(small()) | {"manifest.json": b"[]"})
    assert failure(f"docker-archive:{empty}", tmp_path).code is Code.NOT_FOUND


@pytest.mark.parametrize("transport", ["oci-archive", "docker-archive"])
def test_archive_cut_off_anywhere(tmp_path: Path, transport: str) -> None:
    file = tmp_path / "image.tar"
    layout = oci_layout(tmp_path / "layout", [old()])
    skopeo(f"oci:{layout}", f"{transport}:{file}:name:1")
    whole = file.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in range(0, end, 509):
        file.write_bytes(whole[:size])
        assert failure(f"{transport}:{file}", tmp_path).code is Code.CORRUPT
    packed = gzip.compress(whole)
    for size in range(20, len(packed), 211):
        file.write_bytes(packed[:size])
        assert failure(f"{transport}:{file}", tmp_path).code is Code.CORRUPT
    assert list((tmp_path / "cache").glob("*")) == []


def test_limits_of_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_files, "_MEMBERS_MAX", 10)
    file = write_tar(tmp_path / "image.tar", {f"etc/{number}": b"" for number in range(11)})
    assert "banger image import" in failure(f"docker-archive:{file}", tmp_path).hint
    monkeypatch.setattr(archive_files, "_ARCHIVE_LIMIT", 5_000)
    file.write_bytes(gzip.compress(file.read_bytes()))
    assert failure(f"docker-archive:{file}", tmp_path).code is Code.EXHAUSTED


def test_full_disk_is_not_filled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "RESERVE", 1 << 60)
    file = write_tar(tmp_path / "image.tar", docker_members(small()))
    assert pull(f"docker-archive:{file}", tmp_path)[2]
    file.write_bytes(gzip.compress(file.read_bytes()))
    error = failure(f"docker-archive:{file}", tmp_path)
    assert (error.code, "disk space" in error.message) == (Code.EXHAUSTED, True)


def test_cancelled(layout: Path, tmp_path: Path) -> None:
    job = Job()
    with open_source(f"oci:{layout}", job, Environment(tmp_path)) as source:
        found = source.resolve(AMD64)
        pieces = source.blob(found.layers[0], "layer")
        job.cancel()
        with pytest.raises(BangerError) as caught:
            next(pieces)
        assert caught.value.code is Code.CANCELLED


def test_progress(layout: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    with open_source(f"oci:{layout}", Job(seen.append), Environment(tmp_path)) as source:
        found = source.resolve(AMD64)
        seen.clear()
        assert b"".join(source.blob(Descriptor("", found.config.digest, found.config.size), "the config"))
    assert [(each.message, each.done, each.total) for each in seen][-1] == (
        "the config",
        found.config.size,
        found.config.size,
    )
