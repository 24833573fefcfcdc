"""The programs that the tests of Firecracker run."""

import shutil
import subprocess
from pathlib import Path

from tests.firecracker import VERSION, FirecrackerBinaries, fetch_binaries


def test_both_programs_are_the_version_they_should_be(firecracker_binaries: FirecrackerBinaries) -> None:
    for program, name in ((firecracker_binaries.firecracker, "Firecracker"), (firecracker_binaries.jailer, "Jailer")):
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"{name} v{firecracker_binaries.version}")
        assert program.stat().st_mode & 0o005 == 0o005


def test_a_damaged_program_is_fetched_again(firecracker_binaries: FirecrackerBinaries, tmp_path: Path) -> None:
    damaged = tmp_path / VERSION / "jailer"
    damaged.parent.mkdir()
    damaged.write_bytes(b"half of it")
    shutil.copy(firecracker_binaries.firecracker, damaged.parent)
    fetched = fetch_binaries(tmp_path)
    assert fetched.jailer == damaged or fetched == firecracker_binaries  # those of the host on other architectures
    assert fetched.jailer.read_bytes() == firecracker_binaries.jailer.read_bytes()
