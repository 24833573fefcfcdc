"""scripts/publish-image and scripts/build-golden-image: what they publish can be pulled, the same bytes every time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from banger.imagecat.manifest import read_local
from tests.daemons import running_daemon
from tests.images import MINIMAL
from tests.process.bundle_server import bundle_server
from tests.process.test_image_register import banger, root_directory

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script: str, *arguments: str | Path, status: int = 0, environment: dict[str, str] | None = None) -> str:
    """What a script prints, of a failure on standard error."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    ended = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr if status else ended.stdout


@pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")
def test_a_signed_catalog_from_publishing_to_an_image(tmp_path: Path) -> None:
    www, programs = tmp_path / "www", tmp_path / "bin"
    www.mkdir()
    programs.mkdir()
    (programs / "banger").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m banger.cli "$@"\n')
    (programs / "banger").chmod(0o755)
    root_directory(tmp_path / "root")
    secret, public = tmp_path / "key.sec", tmp_path / "key.pub"
    subprocess.run(["minisign", "-G", "-W", "-p", public, "-s", secret], check=True, capture_output=True)
    with running_daemon(tmp_path / "home") as daemon, bundle_server() as server:
        environment = {**daemon.environment, "PATH": f"{programs}:{os.environ['PATH']}"}

        def publish() -> None:
            said = run("publish-image", "tiny", "--to", www, "--sign", secret, environment=environment)
            assert said.startswith("published tiny:")
            server.content.update({file.name: file.read_bytes() for file in www.iterdir()})

        banger(daemon, "image", "import", "tiny", "--from", str(tmp_path / "root"))
        publish()
        location = f"{server.address}/catalog.json"
        added = banger(daemon, "image", "catalog", "add", location, "--name", "corp", "--public-key", str(public))
        assert "1 image, signed" in added
        banger(daemon, "image", "rm", "tiny")
        banger(daemon, "image", "pull", "corp/tiny")
        assert read_local(daemon.layout.images, "tiny").origin == "corp/tiny"

        old = dict(server.content)
        publish()
        banger(daemon, "image", "catalog", "refresh")
        server.content.update(old)
        assert "older than the copy at hand" in banger(daemon, "image", "catalog", "refresh", status=1)
        server.content["catalog.json"] = server.content["catalog.json"].replace(b'"tiny"', b'"evil"')
        assert "is refused" in banger(daemon, "image", "catalog", "refresh", status=1)


def test_what_cannot_be_built_is_told(tmp_path: Path) -> None:
    output = tmp_path / "x.tar.zst"
    assert "usage:" in run("build-golden-image", "--help")
    assert "no image 'debain'" in run("build-golden-image", "debain", "-o", output, status=1)
    assert "no directory" in run("build-golden-image", "-o", tmp_path / "none/x", status=2)
    output.touch()
    assert "exists already" in run("build-golden-image", "-o", output, status=1)
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar.zst"]


@pytest.mark.timeout(600)  # builds two
def test_a_golden_image_is_the_same_every_time(tmp_path: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    entries = []
    for name in ("first", "second"):
        output = tmp_path / f"{name}.tar.zst"
        epoch = {"SOURCE_DATE_EPOCH": "1767225600"}
        printed = run("build-golden-image", MINIMAL, "-o", output, "--url", "x", environment=epoch)
        entries.append(json.loads(printed))
    assert entries[0] == entries[1]
    assert (entries[0]["name"], entries[0]["kind"], entries[0]["distro"]) == (MINIMAL, "bundle", "debian")
