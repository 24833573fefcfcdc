"""The local catalog: valid entries, broken ones with their reason, removal."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger import entries, system
from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.kernelcat import manifest
from banger.kernelcat.manifest import KernelManifest

GOOD = KernelManifest(
    name="mine",
    distro="debian",
    arch="amd64",
    kernel_version="6.1.0-49-cloud-amd64",
    sha256="0" * 64,
    source="import:/somewhere",
    imported_at="2026-01-31T12:00:00Z",
)


def install(kernels: Path, good: KernelManifest) -> Path:
    entry = kernels / good.name
    entry.mkdir(parents=True)
    (entry / "vmlinux").write_bytes(b"kernel")
    manifest.write_local(entry, good)
    return entry


def test_written_manifests_are_read_back(tmp_path: Path) -> None:
    good = replace(GOOD, pvh=True, boot_modules=("kernel/a.ko",), missing=("virtio_pci (CONFIG_VIRTIO_PCI)",))
    (install(tmp_path, good) / "boot-modules.cpio").touch()
    assert manifest.read_local(tmp_path, "mine") == good
    assert manifest.list_local(tmp_path) == ([good], [])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"arch": "riscv64"}, "arch"),
        ({"arch": 7}, "arch"),
        ({"name": None}, "name"),
        ({"name": "other"}, "'other'"),
        ({"sha256": "0" * 63}, "sha256"),
        ({"imported_at": "2026-01-31 12:00"}, "imported_at"),
        ({"modules": "yes"}, "modules"),
        ({"modules": True}, "modules.squashfs is missing"),
        ({"boot_modules": ["../../etc/passwd"]}, "boot_modules"),
        ({"boot_modules": ["/etc/passwd"]}, "boot_modules"),
        ({"boot_modules": "a"}, "boot_modules"),
        ({"kernel_version": "../6.1"}, "kernel_version"),
        ({"kernel_version": ""}, "kernel_version"),
        ({"files": {"../x": "0" * 64}}, "files"),
        ({"files": {"config": "0" * 63}}, "config"),
        ({"files": {"config": "0" * 64}}, "config is missing"),
        ({"skipped": "1 device"}, "skipped"),
    ],
)
def test_wrong_manifests_break_the_entry(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    entry = install(tmp_path, GOOD)
    (entry / "manifest.json").write_text(json.dumps({**json.loads(GOOD.to_json()), **change}))
    with pytest.raises(BangerError, match="broken") as caught:
        manifest.read_local(tmp_path, "mine")
    assert caught.value.code is Code.CORRUPT
    assert "banger kernel rm mine" in caught.value.hint
    good, broken = manifest.list_local(tmp_path)
    assert good == []
    assert complaint in broken[0].reason


def test_entry_without_manifest_or_kernel_is_broken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (install(tmp_path, GOOD) / "vmlinux").unlink()
    (tmp_path / ".staging-left").mkdir()
    good, broken = manifest.list_local(tmp_path)
    assert good == []
    assert [(entry.name, entry.reason) for entry in broken] == [
        ("empty", "manifest.json cannot be read: No such file or directory"),
        ("mine", "vmlinux is missing"),
    ]


def test_entries_filled_by_hand_are_told_how_to_finish(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/vmlinux").touch()
    (install(tmp_path, GOOD) / "modules").mkdir()
    _, broken = manifest.list_local(tmp_path)
    reasons = {entry.name: entry.reason for entry in broken}
    assert reasons["bare"].startswith("it has no manifest.json; finish it with")
    assert f"'banger kernel import mine --from {tmp_path / 'mine'} --force'" in reasons["mine"]


def test_verify_reads_every_file(tmp_path: Path) -> None:
    content = {"vmlinux": b"kernel", "config": b"CONFIG_X=y"}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    good = replace(GOOD, sha256=sums["vmlinux"], files={"config": sums["config"]})
    entry = install(tmp_path, good)
    for name, data in content.items():
        (entry / name).write_bytes(data)
    assert manifest.verify_local(tmp_path, "mine", Job()) == ""
    for name, data in content.items():
        (entry / name).write_bytes(data + b"!")
        assert manifest.verify_local(tmp_path, "mine", Job()).startswith(f"{name} has changed")
        (entry / name).write_bytes(data)
    (entry / "manifest.json").write_text("{}")
    assert "manifest.json" in manifest.verify_local(tmp_path, "mine", Job())
    with pytest.raises(BangerError) as caught:
        manifest.verify_local(tmp_path, "other", Job())
    assert caught.value.code is Code.NOT_FOUND


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    install(tmp_path, GOOD)
    for operation in (manifest.read_local, manifest.delete_local):
        with pytest.raises(BangerError, match="'mini'") as caught:
            operation(tmp_path, "mini")
        assert caught.value.code is Code.NOT_FOUND
        assert "'mine'" in caught.value.hint


@pytest.mark.parametrize("name", ["../mine", "", ".staging-x", "a/b"])
def test_names_never_become_other_paths(tmp_path: Path, name: str) -> None:
    install(tmp_path, GOOD)
    with pytest.raises(BangerError, match="valid kernel name"):
        manifest.delete_local(tmp_path / "mine", name)
    assert manifest.read_local(tmp_path, "mine") == GOOD


def test_delete_removes_broken_entries_too(tmp_path: Path) -> None:
    install(tmp_path, GOOD)
    (tmp_path / "empty").mkdir()
    manifest.delete_local(tmp_path, "mine")
    manifest.delete_local(tmp_path, "empty")
    assert list(tmp_path.iterdir()) == []


def test_qemu_gets_the_bzimage_where_there_is_one(tmp_path: Path) -> None:
    entry = install(tmp_path, GOOD)
    assert manifest.kernel_paths(entry) == (entry / "vmlinux", entry / "vmlinux")
    (entry / "vmlinuz").touch()
    assert manifest.kernel_paths(entry) == (entry / "vmlinux", entry / "vmlinuz")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(json.loads(GOOD.to_json()))), json_values))
def test_any_json_is_read_or_refused(changes: dict[str, object]) -> None:
    try:
        parsed = manifest.parse_manifest(json.dumps({**json.loads(GOOD.to_json()), **changes}))
    except BangerError:
        return
    assert manifest.parse_manifest(parsed.to_json()) == parsed


def test_what_is_no_entry_hides_no_other(tmp_path: Path) -> None:
    """Pipes, devices, links to nowhere and to themselves."""
    install(tmp_path, GOOD)
    for name in ("pipe", "zero", "loop", "directory", "huge"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe/manifest.json")
    (tmp_path / "zero/manifest.json").symlink_to("/dev/zero")
    (tmp_path / "loop/manifest.json").symlink_to("manifest.json")
    (tmp_path / "directory/manifest.json").mkdir()
    (tmp_path / "huge/manifest.json").write_text(f'{{"name": "{"x" * (1 << 21)}"}}')
    (tmp_path / "me").symlink_to("me")
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "etc").symlink_to("/etc")
    (tmp_path / "file").touch()
    good, broken = manifest.list_local(tmp_path)
    assert good == [GOOD]
    assert [entry.name for entry in broken] == ["directory", "etc", "huge", "loop", "pipe", "zero"]
    assert "not a regular file" in broken[-1].reason
    with pytest.raises(BangerError, match="there is no kernel 'me'"):
        manifest.read_local(tmp_path, "me")


def test_replaced_while_it_is_read(tmp_path: Path) -> None:
    """What is read is that of one entry, and what is gone is absent, not broken."""
    old = install(tmp_path, GOOD)
    new = install(tmp_path / "other", replace(GOOD, distro="new"))
    seen: list[bytes] = []

    def read(entry: Path) -> bytes:
        first = (entry / "manifest.json").read_bytes()
        seen.append(first)
        if len(seen) == 1:
            system.publish(new, old)
            system.remove_tree(new)
            raise OSError("some file of the old one is gone")
        return first

    result = entries.steadily(old, read)
    assert (result, len(seen)) == ((old / "manifest.json").read_bytes(), 2)
    assert b"new" in seen[1]
    assert entries.steadily(old, system.remove_tree) is None
    assert entries.steadily(old, read) is None
    assert len(seen) == 2
