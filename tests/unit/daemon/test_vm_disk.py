"""What VMs take on disk."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.daemon import vm_disk

SIZE = 1 << 16


def taken(path: Path) -> int:
    return path.lstat().st_blocks * 512


def test_what_a_vm_takes(tmp_path: Path) -> None:
    for name in ("overlay.ext4", "console.log", "shared"):
        (tmp_path / name).write_bytes(os.urandom(SIZE))
    vm = tmp_path / "vm"
    vm.mkdir()
    (tmp_path / "overlay.ext4").rename(vm / "overlay.ext4")
    (vm / "kernel").hardlink_to(tmp_path / "shared")
    (vm / "link").symlink_to(tmp_path / "console.log")
    total, sizes = vm_disk.look(vm)
    assert total == vm_disk.used_bytes(vm) == taken(vm / "overlay.ext4") + taken(vm / "link")
    assert {**sizes, "link": 0} == {"overlay.ext4": SIZE, "kernel": SIZE, "link": 0}
    assert vm_disk.look(tmp_path / "removed") == (0, {})


def test_a_file_that_vanishes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorders rotate logs at any time."""
    for number in range(5):
        (tmp_path / f"{number}.log").write_bytes(os.urandom(SIZE))
    scandir = os.scandir

    class Vanishing:
        def __init__(self, directory: Path) -> None:
            self._entries = list(scandir(directory))
            Path(self._entries[2].path).unlink()

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self._entries)

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Vanishing)
    total, sizes = vm_disk.look(tmp_path)
    assert len(sizes) == 4
    assert total == sum(taken(tmp_path / name) for name in sizes)


def test_the_end_of_a_console(tmp_path: Path) -> None:
    assert (vm_disk.console_tail(tmp_path), vm_disk.panic(tmp_path)) == ("", "")
    (tmp_path / "console.log").write_bytes(b"".join(b"line %d \x1b[2J\r\n\r\n" % number for number in range(1000)))
    assert vm_disk.console_tail(tmp_path, lines=2) == "line 998 \\x1b[2J\nline 999 \\x1b[2J"
    assert vm_disk.panic(tmp_path) == ""


def test_a_panic_is_found_before_all_that_the_kernel_says_of_it(tmp_path: Path) -> None:
    said = [
        "booting",
        "[  1.5] Kernel panic - not syncing: no \x1b[2Jinit",
        *(f"trace {n}" for n in range(40)),
        "---[ end",
    ]
    (tmp_path / "console.log").write_text("\r\n".join(said))
    first, *others = vm_disk.console_tail(tmp_path, lines=5).split("\n")
    assert first == "[  1.5] Kernel panic - not syncing: no \\x1b[2Jinit"
    assert others == [f"trace {n}" for n in range(4)]
    assert vm_disk.panic(tmp_path) == "no \\x1b[2Jinit"
