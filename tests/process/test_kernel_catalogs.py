"""Catalogs over HTTP, signed with the real minisign, through a real daemon, and killed while they are replaced."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger import system
from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.catalogs.local import Catalogs
from banger.job import Job
from banger.kernelcat.catalog import KERNELS
from tests.daemons import DaemonProcess, running_daemon
from tests.process.bundle_server import BundleServer, bundle_server
from tests.unit.kernelcat.test_catalog import BUNDLE

NOON, LATER, LATEST = (f"2026-01-31T12:00:0{second}Z" for second in range(3))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kernel-catalogs"


@pytest.fixture
def server() -> Iterator[BundleServer]:
    with bundle_server() as server:
        yield server


class Publisher:
    """Puts catalogs and their signatures on a server."""

    def __init__(self, server: BundleServer, keys: Path) -> None:
        self.server = server
        self.keys = keys
        self.location = f"{server.address}/catalog.json"
        for name in ("key", "other"):
            subprocess.run(
                ["minisign", "-G", "-W", "-p", keys / f"{name}.pub", "-s", keys / f"{name}.sec"],
                check=True,
                capture_output=True,
            )
        self.public_key = (keys / "key.pub").read_text()

    def publish(self, *names: str, updated: str = NOON, key: str = "key") -> None:
        content = catalog(*names, updated=updated)
        file = self.keys / "catalog.json"
        file.write_bytes(content)
        subprocess.run(
            ["minisign", "-S", "-s", self.keys / f"{key}.sec", "-m", file], check=True, stdin=subprocess.DEVNULL
        )
        self.server.content["catalog.json"] = content
        self.server.content["catalog.json.minisig"] = Path(f"{file}.minisig").read_bytes()


@pytest.fixture
def publisher(server: BundleServer, tmp_path: Path) -> Publisher:
    if shutil.which("minisign") is None:
        pytest.skip("minisign is not installed")
    keys = tmp_path / "keys"
    keys.mkdir()
    return Publisher(server, keys)


def catalog(*names: str, updated: str = "") -> bytes:
    entries = [{**BUNDLE, "name": name, "tarball_url": f"bundles/{name}.tar.zst"} for name in names]
    return json.dumps({"version": 1, "entries": entries, **({"updated": updated} if updated else {})}).encode()


def pulled_names(directory: Path) -> set[str]:
    """The names that further catalogs offer."""
    return {entry.name for entry in Catalogs(KERNELS, directory).merged()[0] if entry.origin != "banger"}


def refused(code: Code, action: Callable[[], object]) -> BangerError:
    with pytest.raises(BangerError) as caught:
        action()
    assert caught.value.code is code
    return caught.value


def test_a_catalog_from_a_url(server: BundleServer, directory: Path) -> None:
    server.content["kernels/catalog.json?token=secret"] = catalog("mine")
    location = f"{server.address}/kernels/catalog.json".replace("http://", "http://user:word@") + "?token=secret"
    origin = Catalogs(KERNELS, directory).add(location, "", "", Job())
    assert (origin.name, origin.entries, origin.problem) == ("127.0.0.1", 1, "")
    assert origin.location == f"{server.address}/kernels/catalog.json"
    entry = KERNELS.lookup(Catalogs(KERNELS, directory).merged()[0], "127.0.0.1/mine", "amd64")
    # the same server, so the same password
    assert entry.tarball_url == origin.location.replace("http://", "http://user:word@").replace(
        "catalog.json", "bundles/mine.tar.zst"
    )
    server.content["kernels/catalog.json?token=secret"] = catalog("mine", "more")
    Catalogs(KERNELS, directory).refresh([], Job())
    assert pulled_names(directory) == {"mine", "more"}


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, Code.DOWNLOAD, "404"),
        (b"<html>", Code.CORRUPT, "valid JSON"),
        (catalog("mine").replace(b"bundles/mine.tar.zst", b"file:///etc/shadow"), Code.CORRUPT, "http or https"),
        (b" " * ((16 << 20) + 1), Code.CORRUPT, ""),
    ],
)
def test_what_servers_must_not_send(
    server: BundleServer, directory: Path, content: bytes | None, code: Code, message: str
) -> None:
    server.content["catalog.json"] = catalog("mine")
    location = f"{server.address}/catalog.json"
    Catalogs(KERNELS, directory).add(location, "corp", "", Job())
    if content is None:
        del server.content["catalog.json"]
    else:
        server.content["catalog.json"] = content
    for action in (
        lambda: Catalogs(KERNELS, directory).refresh([], Job()),
        lambda: Catalogs(KERNELS, directory).add(location, "other", "", Job()),
    ):
        error = refused(code, action)
        assert message in error.message
        assert location in error.message or code is Code.CORRUPT
    assert pulled_names(directory) == {"mine"}


def test_a_signed_catalog_is_added_and_refreshed(publisher: Publisher, directory: Path) -> None:
    publisher.publish("mine")
    origin = Catalogs(KERNELS, directory).add(publisher.location, "corp", publisher.public_key, Job())
    assert origin.public_key == publisher.public_key.splitlines()[1]
    publisher.publish("mine", "more", updated=LATER)
    Catalogs(KERNELS, directory).refresh(["corp"], Job())
    assert pulled_names(directory) == {"mine", "more"}
    Catalogs(KERNELS, directory).refresh(["corp"], Job())  # the same once more
    assert Catalogs(KERNELS, directory).list_all()[1].updated == LATER


def test_the_signature_stands_beside_the_path(publisher: Publisher, directory: Path) -> None:
    publisher.publish("mine")
    content = publisher.server.content
    for name in ("catalog.json", "catalog.json.minisig"):
        content[f"{name}?token=secret"] = content.pop(name)
    Catalogs(KERNELS, directory).add(f"{publisher.location}?token=secret", "corp", publisher.public_key, Job())
    assert pulled_names(directory) == {"mine"}


def without_signature(publisher: Publisher) -> str:
    publisher.publish("evil", updated=LATEST)
    del publisher.server.content["catalog.json.minisig"]
    return "its signature cannot be had"


def by_another_key(publisher: Publisher) -> str:
    publisher.publish("evil", updated=LATEST, key="other")
    return "by the key"


def with_other_content(publisher: Publisher) -> str:
    publisher.publish("good", updated=LATEST)
    publisher.server.content["catalog.json"] = catalog("evil", updated=LATEST)
    return "is not what the key"


def with_another_comment(publisher: Publisher) -> str:
    publisher.publish("evil", updated=LATEST)
    signature = publisher.server.content["catalog.json.minisig"]
    publisher.server.content["catalog.json.minisig"] = signature.replace(b"timestamp:", b"timestamp:9")
    return "comment has been changed"


def without_a_time(publisher: Publisher) -> str:
    publisher.publish("evil", updated="")
    return "does not say when it was updated"


def of_an_earlier_time(publisher: Publisher) -> str:
    publisher.publish("evil", updated=NOON)
    return f"is of {NOON}, older than the copy at hand of {LATER}"


def of_the_same_time(publisher: Publisher) -> str:
    publisher.publish("evil", updated=LATER)
    return "differs from the copy at hand"


@pytest.mark.parametrize(
    "attack",
    [
        without_signature,
        by_another_key,
        with_other_content,
        with_another_comment,
        without_a_time,
        of_an_earlier_time,
        of_the_same_time,
    ],
)
def test_what_a_pinned_key_refuses(publisher: Publisher, directory: Path, attack: Callable[[Publisher], str]) -> None:
    """The copy at hand stays in use; what the key alone refuses cannot be added either."""
    publisher.publish("mine", updated=LATER)
    before = Catalogs(KERNELS, directory).add(publisher.location, "corp", publisher.public_key, Job())
    complaint = attack(publisher)
    with pytest.raises(BangerError) as caught:
        Catalogs(KERNELS, directory).refresh([], Job())
    assert complaint in caught.value.message
    assert "'corp'" in caught.value.message or publisher.location in caught.value.message
    assert Catalogs(KERNELS, directory).list_all()[1] == before
    assert pulled_names(directory) == {"mine"}
    if attack not in (of_an_earlier_time, of_the_same_time):
        with pytest.raises(BangerError):
            Catalogs(KERNELS, directory).add(publisher.location, "again", publisher.public_key, Job())
        assert Catalogs(KERNELS, directory).names() == ["corp"]


def test_a_signed_catalog_that_is_a_file(publisher: Publisher, directory: Path) -> None:
    publisher.publish("mine")
    file = publisher.keys / "catalog.json"
    Catalogs(KERNELS, directory).add(str(file), "corp", publisher.public_key, Job())
    Path(f"{file}.minisig").unlink()
    refused(Code.NOT_FOUND, lambda: Catalogs(KERNELS, directory).refresh([], Job()))
    assert pulled_names(directory) == {"mine"}


def test_a_wrong_key_is_told_before_anything_is_fetched(server: BundleServer, directory: Path) -> None:
    refused(
        Code.INVALID, lambda: Catalogs(KERNELS, directory).add(f"{server.address}/catalog.json", "corp", "RWxx", Job())
    )
    assert server.requests == []


_REPLACE_FOR_EVER = """
import sys
from pathlib import Path
from banger.catalogs.local import Catalogs
from banger.job import Job
from banger.kernelcat.catalog import KERNELS
directory, file = Path(sys.argv[1]), sys.argv[2]
while True:
    Catalogs(KERNELS, directory).add(file, "corp", "", Job())
    print("added", flush=True)
    Catalogs(KERNELS, directory).refresh([], Job())
    print("refreshed", flush=True)
    Catalogs(KERNELS, directory).remove("corp")
    print("removed", flush=True)
"""


def test_killed_at_any_moment_a_catalog_is_whole_or_absent(tmp_path: Path, directory: Path) -> None:
    file = tmp_path / "corp.json"
    file.write_bytes(catalog("mine"))
    generator = random.Random(7)
    command = [sys.executable, "-c", _REPLACE_FOR_EVER, str(directory), str(file)]
    for _ in range(10):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(generator.randint(1, 12)):
                process.stdout.readline()
            process.kill()
        system.sweep_staging(directory)
        entries, broken = Catalogs(KERNELS, directory).merged()
        assert broken == []
        assert {entry.name for entry in entries if entry.origin == "corp"} in (set(), {"mine"})
        if Catalogs(KERNELS, directory).names():
            Catalogs(KERNELS, directory).remove("corp")
        assert list(directory.iterdir()) == []


# Through the daemon --------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path / "daemon") as daemon:
        yield daemon


def banger(daemon: DaemonProcess, *argv: str | Path, status: int = 0) -> str:
    """The output of `banger kernel ARGV`, which must end with `status`; of one that fails, what it says of it."""
    command = [sys.executable, "-m", "banger.cli", "kernel", *argv]
    ended = subprocess.run(command, env=daemon.environment, capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    return ended.stdout if status == 0 else ended.stderr


def test_catalogs_on_the_command_line(publisher: Publisher, daemon: DaemonProcess) -> None:
    publisher.publish("mine", "debian")
    key = publisher.keys / "key.pub"
    added = banger(daemon, "catalog", "add", publisher.location, "--name", "corp", "--public-key", key)
    assert added == "added corp: 2 kernels, signed\n"
    lines = [line.split() for line in banger(daemon, "catalog", "ls").splitlines()]
    assert lines[0] == ["NAME", "KERNELS", "SIGNED", "UPDATED", "FETCHED", "LOCATION"]
    assert [line[:3] for line in lines[1:]] == [["banger", "12", "-"], ["corp", "2", "yes"]]
    listed = json.loads(banger(daemon, "catalog", "list", "--json"))["catalogs"]
    assert listed[1]["location"] == publisher.location
    assert listed[1]["public_key"] == key.read_text().splitlines()[1]

    available = daemon.client.call(op.KERNEL_CATALOG, m.Empty()).entries
    assert [(entry.origin, entry.state) for entry in available if entry.name == "mine"] == [("corp", "available")]
    error = banger(daemon, "pull", "debian", "--arch", "amd64", status=1)
    assert "'debian' is in several catalogs" in error
    assert "hint: say banger/debian or corp/debian" in error

    publisher.publish("evil", updated=NOON)
    assert "differs from the copy at hand" in banger(daemon, "catalog", "refresh", status=1)
    publisher.publish("mine", updated=LATER)
    assert json.loads(banger(daemon, "catalog", "refresh", "corp", "--json"))["catalogs"][0]["entries"] == 1

    assert "there is a catalog 'corp' already" in banger(
        daemon, "catalog", "add", publisher.location, "--name", "corp", status=1
    )
    assert banger(daemon, "catalog", "rm", "corp") == "removed corp\n"
    assert "there is no catalog 'corp'" in banger(daemon, "catalog", "rm", "corp", status=1)
    assert "comes with banger" in banger(daemon, "catalog", "rm", "banger", status=1)


def test_a_broken_catalog_is_listed(daemon: DaemonProcess, tmp_path: Path) -> None:
    file = tmp_path / "corp.json"
    file.write_bytes(catalog("mine"))
    assert "not signed" in banger(daemon, "catalog", "add", file)
    (daemon.layout.kernel_catalogs / "corp/catalog.json").write_text("{")
    assert "valid JSON" in banger(daemon, "catalog", "list")
    assert "debian-cloud" in banger(daemon, "list", "--available")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["add", "absent.json"], "there is no file"),
        (["add", "http://127.0.0.1/", "--name", "a/b"], "not a valid catalog name"),
        (["add"], "missing argument"),
        (["add", "http://127.0.0.1/", "--public-key", "absent.pub"], "'absent.pub' is neither a file nor a minisign"),
        (["rm"], "missing argument"),
        (["refersh"], "did you mean 'banger kernel catalog refresh'"),
    ],
)
def test_wrong_usage(arguments: list[str], complaint: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "banger.cli", "kernel", "catalog", *arguments], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert complaint in ended.stderr


def test_a_file_that_is_no_public_key_is_named_and_not_shown(tmp_path: Path) -> None:
    secret = tmp_path / "minisign.key"
    secret.write_text("untrusted comment: minisign encrypted secret key\nRWQAAEIyAAAA\n")
    arguments = ["kernel", "catalog", "add", "http://127.0.0.1/", "--public-key", str(secret)]
    ended = subprocess.run([sys.executable, "-m", "banger.cli", *arguments], capture_output=True, text=True)
    assert ended.returncode == 2
    assert f"{secret} is not a minisign public key" in ended.stderr
    assert "RWQAAE" not in ended.stderr
