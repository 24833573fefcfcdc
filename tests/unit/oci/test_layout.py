"""OCI layouts are written in one pass, and recognised again."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from banger.oci import layout

CONFIG: dict[str, layout.Json] = {"architecture": "arm64", "os": "linux", "variant": "v8"}


def write(target: layout.Target, chunks: list[bytes]) -> tuple[str, str]:
    """Write an image of that layer; the digests of its tar and its manifest."""
    with target.blob() as blob:
        layer = layout.LayerWriter(blob)
        for chunk in chunks:
            layer.write(chunk)
        diff_id = layer.finish()
    return diff_id, layout.write_image(target, blob.blob, CONFIG, "test")


@given(st.lists(st.binary(max_size=2000), max_size=5))
def test_an_archive_holds_the_layer(chunks: list[bytes]) -> None:
    stream = io.BytesIO()
    archive = layout.Archive(stream)
    diff_id, digest = write(archive, chunks)
    archive.finish()
    stream.seek(0)
    with tarfile.open(fileobj=stream) as reader:
        found = {member.name: reader.extractfile(member) for member in reader}
        content = {name: file.read() for name, file in found.items() if file is not None}
    for name, data in content.items():
        if name.startswith(layout.BLOBS):
            assert hashlib.sha256(data).hexdigest() == name.removeprefix(f"{layout.BLOBS}/")

    def blob(name: str) -> bytes:
        return content[f"{layout.BLOBS}/{name.removeprefix('sha256:')}"]

    (described,) = json.loads(content[layout.INDEX])["manifests"]
    assert (described["digest"], described["platform"]) == (digest, CONFIG)
    (layer,) = json.loads(blob(digest))["layers"]
    assert layer["size"] == len(blob(layer["digest"]))
    assert gzip.decompress(blob(layer["digest"])) == b"".join(chunks)
    assert diff_id == f"sha256:{hashlib.sha256(b''.join(chunks)).hexdigest()}"
    assert json.loads(content[layout.MARKER]) == {"imageLayoutVersion": "1.0.0"}


def test_a_directory_is_recognised_as_it_was_left(tmp_path: Path) -> None:
    path = tmp_path / "layout"
    write(layout.Directory(path), [b"tar"])
    assert layout.is_made_by(path, "test")
    assert not layout.is_made_by(path, "other")
    for extra in ("notes", "blobs/notes", f"{layout.BLOBS}/{'0' * 64}"):
        (path / extra).write_text("mine")
        assert not layout.is_made_by(path, "test")
        (path / extra).unlink()
    index = path / layout.INDEX
    before = index.read_bytes()
    for hostile in (
        b"",
        b"[]",
        b"{}",
        b'{"manifests": [1]}',
        b'{"manifests": [{"digest": "../../x"}]}',
        b"[" * 100_000,
    ):
        index.write_bytes(hostile)
        assert not layout.is_made_by(path, "test")
    index.write_bytes(before)
    assert layout.is_made_by(path, "test")
