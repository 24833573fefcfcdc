"""What `make run` does before banger is installed: stages that are quiet unless they fail, and a first image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def quietly(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/quietly.py as one of the tree `root`."""
    (root / "scripts").mkdir()
    shutil.copy(SCRIPTS / "quietly.py", root / "scripts")
    argv = [sys.executable, str(root / "scripts/quietly.py"), *words]
    return subprocess.run(argv, capture_output=True, text=True)


def test_a_stage_that_succeeds_prints_one_line(tmp_path: Path) -> None:
    done = quietly(tmp_path, "host packages", "sh", "-c", "echo out; echo err >&2; cat")
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r"  host packages +\d+\.\d s\n", done.stderr)
    assert (tmp_path / "build/log/host-packages.log").read_text() == "out\nerr\n"


def test_a_stage_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    done = quietly(tmp_path, "packages", "sh", "-c", "seq 1000; echo no room >&2; exit 5")
    assert (done.returncode, done.stdout) == (5, "")
    first, *lines = done.stderr.splitlines()
    assert first == f"  packages failed with status 5; the end of {tmp_path / 'build/log/packages.log'}:"
    assert lines[-2:] == ["    1000", "    no room"]
    assert len(lines) == 20


def first(what: str, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/first.py on a state of its own."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    argv = [sys.executable, *options, str(SCRIPTS / "first.py"), what]
    return subprocess.run(argv, env=environment, capture_output=True, text=True)


def test_the_first_image_needs_no_installed_packages(tmp_path: Path) -> None:
    images = tmp_path / ".local/state/banger/images"
    (images / "debian-trixie").mkdir(parents=True)
    done = first("image", tmp_path, "-I", "-S")
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in images.iterdir()] == ["debian-trixie"]


def test_an_image_of_no_catalog_is_left_to_the_daemon(tmp_path: Path) -> None:
    config = tmp_path / ".config/banger/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('default_image = "mine"\ndefault_kernel = "mine"\n')
    for what in ("image", "kernel"):
        done = first(what, tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("what", ["image", "kernel"])
def test_what_cannot_be_had_is_explained(tmp_path: Path, what: str) -> None:
    config = tmp_path / ".config/banger/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'debian_mirror = "file:{tmp_path / "absent"}"\n')
    done = first(what, tmp_path)
    assert done.returncode == 1
    assert re.match(r"error: .*\nhint: .*debian_mirror", done.stderr)
    assert "Traceback" not in done.stderr
