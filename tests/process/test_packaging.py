"""What `make wheels` and `make deb` make: the same bytes each time, complete, and working where it is installed."""

import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from banger import __version__
from banger.hostpackages import Purpose, package_names, tools
from banger.vmm.detect import host_arch
from tests.process.packages import ROOT, TIMEOUT, User, build

pytestmark = pytest.mark.timeout(400)  # seconds: compilers and lintian have much to do
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}[host_arch()]


def make(script: str, target: Path, *arguments: str) -> list[Path]:
    """What a script of ours makes for this machine, and says that it has made."""
    command = [sys.executable, str(ROOT / "scripts" / script), "--output", str(target), *arguments, host_arch()]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT).stdout
    made = [Path(line) for line in said.splitlines()]
    assert sorted(made) == sorted(target.iterdir())
    return made


def digests(files: list[Path]) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    wheel, sdist = make("make-wheels", tmp_path_factory.mktemp("dist"))
    return wheel, sdist


def test_wheels_are_reproducible(made: tuple[Path, Path], tmp_path: Path) -> None:
    assert digests(make("make-wheels", tmp_path)) == digests([*made])


def test_the_wheel_is_complete(made: tuple[Path, Path]) -> None:
    """All that is in the package and is not compiled from it; tags that every pip for this machine takes."""
    wheel, _ = made
    tags = [f"{platform}_{MACHINE}" for platform in ("manylinux2014", "manylinux_2_17", "musllinux_1_1")]
    assert wheel.name == f"banger_vm-{__version__}-py3-none-{'.'.join(tags)}.whl"
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "src/banger"], check=True, capture_output=True, text=True)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {name.removeprefix("src/") for name in listed.stdout.split()} <= names
        assert f"banger/_agent/banger-agent-{host_arch()}" in names
        said = archive.read(f"banger_vm-{__version__}.dist-info/WHEEL").decode()
    assert [line for line in said.splitlines() if line.startswith("Tag:")] == [f"Tag: py3-none-{tag}" for tag in tags]


def test_the_source_distribution_builds(made: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = made
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    again = build(tree, tmp_path)
    assert again.name == wheel.name
    with zipfile.ZipFile(again) as built, zipfile.ZipFile(wheel) as first:
        assert set(built.namelist()) == set(first.namelist())


def test_installed_into_a_fresh_environment(made: tuple[Path, Path], tmp_path: Path) -> None:
    user = User(tmp_path / "home")
    environment = user.home / "venv"
    for command in (("venv", str(environment)), ("pip", "install", "--python", str(environment), str(made[0]))):
        done = user.run("uv", *command)
        assert done.returncode == 0, done.stderr
    assert user.run(f"{environment}/bin/banger", "version").stdout == f"banger {__version__}\n"
    checks = json.loads(user.run(f"{environment}/bin/banger", "doctor", "--json").stdout)
    (agent,) = [check for check in checks["checks"] if check["name"] == "guest agent"]
    assert (agent["status"], agent["message"].startswith(str(environment))) == ("ok", True)
    said = user.run(f"{environment}/bin/banger", "update", "--to", "9.0")
    assert f"hint: run: {environment}/bin/python" in said.stderr
    assert "-m pip install --upgrade banger-vm==9.0" in said.stderr


@pytest.fixture(scope="module")
def deb(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deb(made[0], tmp_path_factory.mktemp("deb"))


def make_deb(wheel: Path, target: Path) -> Path:
    """The Debian package, for one Python and not compressed."""
    (package,) = make("make-deb", target, "--wheel", str(wheel), "--python", "3.13", "--level", "0")
    return package


def field(package: Path, name: str) -> str:
    command = ["dpkg-deb", "--field", str(package), name]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def test_debian_packages_are_reproducible(made: tuple[Path, Path], deb: Path, tmp_path: Path) -> None:
    assert digests([make_deb(made[0], tmp_path)]) == digests([deb])


def test_the_debian_package_needs_what_banger_needs(deb: Path) -> None:
    assert field(deb, "Architecture") == host_arch()
    depends = {word.split()[0] for word in field(deb, "Depends").split(",")}
    assert depends == {"libc6", "python3", *package_names(tools(Purpose.RUN), "apt")}


def test_the_debian_package_is_complete(deb: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "--extract", deb, tmp_path], check=True)
    for path in (
        "usr/share/bash-completion/completions/banger",
        "usr/share/zsh/vendor-completions/_banger",
        "usr/share/fish/vendor_completions.d/banger.fish",
        "usr/lib/systemd/user/banger.socket",
        "usr/lib/systemd/user/banger.service",
        "usr/share/doc/banger-vm/changelog.gz",
    ):
        assert (tmp_path / path).stat().st_size > 0
    licences = (tmp_path / "usr/share/doc/banger-vm/copyright").read_text().lower().replace("-", "_")
    packages = tmp_path / "usr/lib/banger-vm/lib/python3.13/site-packages"
    for information in packages.glob("*.dist-info"):
        assert "\n" + information.name.removesuffix(".dist-info").replace("-", " ").lower() in licences
    page = tmp_path / "usr/share/man/man1/banger.1.gz"
    shown = subprocess.run(
        ["man", "--local-file", "--warnings", page],
        capture_output=True,
        text=True,
        env={"MANWIDTH": "80", "PATH": "/usr/bin:/bin"},
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "banger vm run [OPTIONS] [-- CMD...]" in shown.stdout
    assert "--memory SIZE" in shown.stdout


def test_lintian_finds_no_error(deb: Path) -> None:
    done = subprocess.run(["lintian", "--fail-on", "error", deb], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
