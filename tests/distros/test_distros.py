"""From a fresh installation of a distribution to a guest, as new users go; `make test` does the shortest of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.vmm.detect import host_arch
from tests.distros.distro import SOURCE, Root, fresh_root, host_release

pytestmark = [
    pytest.mark.timeout(2400),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can enter the root directory of another distribution"),
]

# the stable release that this host does not run
OTHER = "bookworm" if host_release() == "trixie" else "trixie"
REST = [release for release in ("bookworm", "trixie", "testing") if release != OTHER]

_IN_CLONE = 'cd banger; PATH="$PWD/.venv/bin:$PATH"\n'
_USE = """
banger doctor
serve='echo it works > index.html; exec python3 -m http.server 80'
banger run -d --name web -p 80 --wait-for 80 debian-trixie -- sh -c "$serve"
banger vm show web --json | python3 -c '
import json, sys, urllib.request
port = json.load(sys.stdin)["ports"][0]["host_port"]
print(urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60).read().decode())'
banger exec web -- apt-get -qq update
banger stop web
banger start web
banger exec web -- uname -s
banger rm --force web
banger daemon stop
"""


def _first_steps(root: Root, user: str) -> None:
    """What the README tells a newcomer to do first, in a clone."""
    said = root.run("cd banger && make run", user=user)
    assert "\nLinux " in said
    assert "Debian GNU/Linux" in said
    said = root.run(_IN_CLONE + _USE, user=user)
    assert "it works" in said


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Root]:
    """A fresh root of the release that the test names."""
    with fresh_root(request.param, tmp_path / "root") as made:
        yield made


@pytest.mark.parametrize(
    "root", [OTHER, *(pytest.param(release, marks=pytest.mark.distros) for release in REST)], indirect=True
)
def test_a_clone_on_a_fresh_distribution(root: Root) -> None:
    root.clone("root")
    _first_steps(root, "root")


@pytest.mark.distros
@pytest.mark.parametrize("root", [OTHER, *REST], indirect=True)
def test_a_clone_of_an_ordinary_user(root: Root) -> None:
    root.add_user("ada")
    root.clone("home/ada", "ada")
    refused = root.attempt("cd banger && make run", user="ada")
    assert refused.returncode != 0
    told = re.search(r"sudo (apt-get install .*)", refused.stdout)
    assert told is not None
    root.run(f"apt-get -qq update; DEBIAN_FRONTEND=noninteractive {told[1]} --yes")
    _first_steps(root, "ada")


def _readme() -> str:
    """The commands that README.md tells a newcomer to type, but for those that need a registry or a terminal."""
    text = (SOURCE / "README.md").read_text()
    part = text[text.index("## The first ten minutes") : text.index("### Options you will want")]
    lines = "".join(re.findall(r"```sh\n(.*?)```", part, re.DOTALL)).splitlines()
    return "\n".join(line for line in lines if not re.search(r"alpine|vm console", line))


@pytest.mark.distros
@pytest.mark.parametrize("root", [OTHER, *REST], indirect=True)
def test_the_lines_of_the_readme(root: Root) -> None:
    root.run("apt-get -qq update && apt-get -qq install -y --no-install-recommends curl")
    root.clone("root")
    root.run("cd banger && make run && make install")
    said = root.run(f"export PATH=$HOME/.local/bin:$PATH\ncd banger\nset -x\n{_readme()}")
    assert "Linux " in said
    assert "Directory listing" in said  # what python3 -m http.server serves


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package for this host's architecture."""
    output = tmp_path_factory.mktemp("package")
    command = [sys.executable, str(SOURCE / "scripts/make-deb"), "--output", str(output), host_arch()]
    subprocess.run(command, check=True)
    (made,) = output.glob("*.deb")
    return made


@pytest.mark.distros
@pytest.mark.parametrize("root", [OTHER, *REST], indirect=True)
def test_the_debian_package(root: Root, package: Path) -> None:
    shutil.copy(package, root.directory / "root/banger-vm.deb")
    root.run("apt-get -qq update")
    root.run("DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ./banger-vm.deb")
    assert "Linux " in root.run("banger vm run --rm -- uname -a")
    assert "it works" in root.run(_USE)
    root.run("apt-get install -y --no-install-recommends uidmap")
    root.add_user("ada")
    assert "Linux " in root.run("banger vm run --rm -- uname -a", user="ada")
    root.run("apt-get purge -y banger-vm")
    assert not (root.directory / "usr/lib/banger-vm").exists()
