"""`banger update` with the real uv and pipx: to a signed release and back, and not while the daemon is busy."""

import contextlib
import functools
import http.server
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.errors import BangerError
from banger.minisign import PublicKey
from banger.releases import fetch, find
from tests.process.packages import User, build, sources

INSTALL = {"uv": ("uv", "tool", "install", "--quiet"), "pipx": ("pipx", "install", "--quiet")}


class Releases:
    """A directory with the wheels 1.0, 2.0 and 3.0, of which the last two are signed by `key`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "releases"
        self.directory.mkdir()
        public, self._secret = directory / "key.pub", directory / "key.sec"
        subprocess.run(["minisign", "-G", "-W", "-p", public, "-s", self._secret], check=True, capture_output=True)
        self.key = public.read_text().splitlines()[1]
        self.wheels = {}
        for version in ("1.0", "2.0", "3.0"):
            self.wheels[version] = build(sources(directory / version, version), self.directory)
        self.sign(self.wheels["2.0"])
        self.sign(self.wheels["3.0"])

    def sign(self, wheel: Path) -> None:
        subprocess.run(["minisign", "-S", "-s", self._secret, "-m", wheel], check=True, capture_output=True)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    return Releases(tmp_path_factory.mktemp("update"))


@pytest.fixture(scope="module", params=INSTALL)
def user(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, releases: Releases
) -> Iterator[User]:
    """Somebody who has installed 1.0; the tests go on from one to the next."""
    user = User(tmp_path_factory.mktemp(request.param) / "home")
    wheel = releases.directory.parent / "mine" / releases.wheels["1.0"].name
    wheel.parent.mkdir(exist_ok=True)
    wheel.write_bytes(releases.wheels["1.0"].read_bytes())
    done = user.run(*INSTALL[request.param], str(wheel))
    assert done.returncode == 0, done.stderr
    yield user
    user.banger("daemon", "stop")


@pytest.fixture
def trusting(user: User, releases: Releases) -> User:
    user.config.write_text(f'release_key = "{releases.key}"\nreleases = "{releases.directory}"\n')
    return user


def test_releases_at_a_url(releases: Releases) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=releases.directory)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            place = f"http://127.0.0.1:{server.server_port}"
            found = find(place)
            assert {version: url.rpartition("/")[2] for version, url in found.items()} == {
                version: wheel.name for version, wheel in releases.wheels.items()
            }
            assert find(found["2.0"]) == {"2.0": found["2.0"]}
            content = fetch(found["2.0"], "2.0", PublicKey.parse(releases.key))
            assert content == releases.wheels["2.0"].read_bytes()
            with pytest.raises(BangerError, match="minisig"):
                fetch(found["1.0"], "1.0", PublicKey.parse(releases.key))
        finally:
            server.shutdown()


def version(user: User) -> str:
    return user.banger("version")[1].removeprefix("banger ").strip()


def test_a_newer_release_is_told(user: User, releases: Releases) -> None:
    user.config.write_text("")
    place = str(releases.directory)
    assert user.banger("update", "--check", "--from", place) == (
        0,
        f"banger is 1.0, and 3.0 is available: run 'banger update --from {place}'\n",
        "",
    )


def test_nothing_is_installed_that_nobody_vouches_for(user: User, releases: Releases) -> None:
    user.config.write_text("")
    status, _, err = user.banger("update", "--from", str(releases.directory))
    assert (status, "config.toml has no release_key" in err, "there is no official key" in err) == (1, True, True)
    assert version(user) == "1.0"


def test_an_unsigned_release_is_refused(trusting: User, releases: Releases, tmp_path: Path) -> None:
    other = tmp_path / releases.wheels["2.0"].name
    other.write_bytes(releases.wheels["2.0"].read_bytes())
    status, _, err = trusting.banger("update", "--from", str(other))
    assert (status, f"{other}.minisig cannot be read" in err) == (1, True)
    # the signature of another file, and a release that is given out for another one
    signature = Path(f"{releases.wheels['3.0']}.minisig")
    Path(f"{other}.minisig").write_bytes(signature.read_bytes())
    assert "is not what the key" in trusting.banger("update", "--from", str(other))[2]
    other.write_bytes(releases.wheels["3.0"].read_bytes())
    assert "is of version 3.0, not 2.0" in trusting.banger("update", "--from", str(other))[2]
    assert version(trusting) == "1.0"


def test_nothing_happens_while_the_daemon_is_busy(trusting: User) -> None:
    assert trusting.banger("daemon", "start")[0] == 0
    client = Client(trusting.home / "run/banger/bangerd.sock")
    with contextlib.closing(client.open(op.VM_EVENTS, m.VmEvents(follow=True))) as stream:
        next(stream.messages())
        status, _, err = trusting.banger("update")
        assert (status, "the daemon is busy: commands are attached to machines" in err) == (1, True)
        assert client.identity().version == "1.0"
    assert version(trusting) == "1.0"


def test_older_releases_are_no_update(trusting: User, releases: Releases, tmp_path: Path) -> None:
    older = tmp_path / releases.wheels["1.0"].name.replace("1.0", "0.5")
    older.write_bytes(b"")
    assert trusting.banger("update", "--from", str(tmp_path)) == (0, "banger is 1.0 already\n", "")


def test_to_a_release_and_back(trusting: User) -> None:
    """Back even where the old one is available nowhere else: its wheel was kept."""
    status, out, err = trusting.banger("update", "--to", "2.0")
    assert (status, out.splitlines()[-1]) == (0, "banger 2.0"), err
    assert trusting.banger("daemon", "start")[0] == 0
    assert Client(trusting.home / "run/banger/bangerd.sock").identity().version == "2.0"
    trusting.config.write_text("")
    assert trusting.banger("update", "--to", "1.0")[0] == 0
    assert version(trusting) == "1.0"
    assert trusting.banger("update", "--to", "1.0") == (0, "banger is 1.0 already\n", "")
