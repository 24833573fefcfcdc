"""scripts/publish-kernel: entry, order, signature and locking, and what it publishes can be pulled."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.catalogs.local import Catalogs
from banger.job import Job
from banger.kernelcat.catalog import KERNELS
from tests.daemons import DaemonProcess, running_daemon
from tests.process.bundle_server import BundleServer, bundle, bundle_server

SCRIPT = Path(__file__).parents[2] / "scripts/publish-kernel"

# what `banger kernel export NAME -o FILE --json` does, as far as the script can see; $CONTENT is the bundle
FAKE_BANGER = """\
#!/bin/sh
set -e
[ "$1 $2 $4 $6" = "kernel export -o --json" ]
[ -n "$CONTENT" ] || { echo "error: there is no kernel '$3'" >&2; exit 1; }
printf %s "$CONTENT" > "$5"
cat <<END
{"name": "$3", "kind": "bundle", "distro": "void", "arch": "amd64", "kernel_version": "6.12", "tarball_url": "x",
 "tarball_sha256": "$(printf %s "$CONTENT" | sha256sum | cut -c-64)", "size_bytes": ${SIZE:-${#CONTENT}},
 "description": ""}
END
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH with a banger that exports whatever CONTENT says."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "banger").write_text(FAKE_BANGER)
    (programs / "banger").chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CONTENT": "one"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "www"
    directory.mkdir()
    return directory


@pytest.fixture
def secret_key(tmp_path: Path) -> Path:
    if shutil.which("minisign") is None:
        pytest.skip("minisign is not installed")
    key = tmp_path / "key.sec"
    subprocess.run(["minisign", "-G", "-W", "-p", tmp_path / "key.pub", "-s", key], check=True, capture_output=True)
    return key


def publish(environment: Mapping[str, str], *arguments: str | Path, status: int = 0) -> str:
    """Run the script, which must end with `status`; returns what it says, of a failure on standard error."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    ended = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout if status == 0 else ended.stderr


def bundle_name(content: str, kernel: str = "edge") -> str:
    return f"{kernel}-amd64-{hashlib.sha256(content.encode()).hexdigest()[:16]}.tar.zst"


def read(file: Path) -> dict[str, object]:
    document: dict[str, object] = json.loads(file.read_bytes())
    return document


def entries(file: Path) -> list[dict[str, object]]:
    listed: list[dict[str, object]] = json.loads(file.read_bytes())["entries"]
    return listed


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_first_kernel_makes_the_catalog(environment: dict[str, str], target: Path) -> None:
    said = publish(environment, "edge", "--to", target, "--description", "on the edge")
    assert said == f"published edge: 6.12 amd64 as {bundle_name('one')}\n"
    assert names(target) == ["catalog.json", bundle_name("one")]
    assert (target / bundle_name("one")).read_text() == "one"
    assert entries(target / "catalog.json") == [
        {
            "name": "edge",
            "kind": "bundle",
            "distro": "void",
            "arch": "amd64",
            "kernel_version": "6.12",
            "tarball_url": bundle_name("one"),
            "tarball_sha256": hashlib.sha256(b"one").hexdigest(),
            "size_bytes": 3,
            "description": "on the edge",
        }
    ]
    assert {oct(path.stat().st_mode)[-3:] for path in target.iterdir()} == {"644"}


def test_an_entry_is_replaced_and_all_else_stays(environment: dict[str, str], target: Path) -> None:
    file = target / "catalog.json"
    publish(environment, "edge", "--to", target, "--description", "on the edge")
    publish({**environment, "CONTENT": "other"}, "alpha", "--to", target)
    document = json.loads(file.read_bytes())
    document["note"] = "mine"
    document["entries"] += [{**document["entries"][1], "arch": "aarch64", "hint": 7}]
    document["updated"] = "2199-01-01T00:00:00Z"  # by another host, whose clock is ahead
    file.write_text(json.dumps(document))
    publish({**environment, "CONTENT": "two"}, "edge", "--to", target, "--url", "https://example.org/k/")
    changed = json.loads(file.read_bytes())
    assert (changed["note"], changed["updated"]) == ("mine", "2199-01-01T00:00:01Z")
    assert [(entry["name"], entry["arch"]) for entry in changed["entries"]] == [
        ("alpha", "amd64"),
        ("edge", "aarch64"),
        ("edge", "amd64"),
    ]
    assert changed["entries"][1] == document["entries"][2]
    assert changed["entries"][2]["tarball_url"] == f"https://example.org/k/{bundle_name('two')}"
    assert changed["entries"][2]["description"] == "on the edge"
    # who still has the old catalog finds the old bundle
    assert {bundle_name("one"), bundle_name("two")} <= set(names(target))


def test_the_same_kernel_once_more_changes_the_time_alone(environment: dict[str, str], target: Path) -> None:
    publish(environment, "edge", "--to", target)
    before = read(target / "catalog.json")
    publish(environment, "edge", "--to", target)
    after = read(target / "catalog.json")
    assert str(after.pop("updated")) > str(before.pop("updated"))
    assert after == before


def test_an_entry_by_another_name_of_its_architecture_is_the_same(environment: dict[str, str], target: Path) -> None:
    publish(environment, "edge", "--to", target)
    file = target / "catalog.json"
    file.write_text(file.read_text().replace('"amd64"', '"x86_64"'))
    publish({**environment, "CONTENT": "two"}, "edge", "--to", target)
    assert [entry["arch"] for entry in entries(file)] == ["amd64"]


def test_a_command_puts_files_in_the_order_that_readers_need(
    environment: dict[str, str], tmp_path: Path, secret_key: Path
) -> None:
    """Nothing that a reader can see names a file that is not there yet; this host's catalog changes last."""
    store, file, log = tmp_path / "my store", tmp_path / "kernels.json", tmp_path / "log"
    store.mkdir()
    script = f'test ! -e {file} || echo early >> {log}; echo "$2" >> {log}; cp "$1" "$3/$2"'
    command = f"sh -c '{script}' - {{file}} {{name}} '{store}'"
    publish(environment, "edge", "--command", command, "--catalog", file, "--sign", secret_key)
    assert log.read_text().splitlines() == [bundle_name("one"), "kernels.json", "kernels.json.minisig"]
    assert names(store) == [bundle_name("one"), "kernels.json", "kernels.json.minisig"]
    for name in ("kernels.json", "kernels.json.minisig"):
        assert (store / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("failing", ["edge-*", "kernels.json", "*.minisig"])
def test_when_the_command_fails_the_catalog_stays_and_a_retry_works(
    environment: dict[str, str], tmp_path: Path, target: Path, secret_key: Path, failing: str
) -> None:
    file = target / "kernels.json"
    copy = f"sh -c 'case $2 in $FAILING) exit 3;; esac; cp \"$1\" {target}/copy-$2' - {{file}} {{name}}"
    arguments = ("edge", "--command", copy, "--catalog", file, "--sign", secret_key)
    publish({**environment, "FAILING": "none"}, *arguments)
    before = file.read_bytes(), Path(f"{file}.minisig").read_bytes()
    said = publish({**environment, "FAILING": failing, "CONTENT": "two"}, *arguments, status=1)
    assert "failed with status 3" in said
    assert (file.read_bytes(), Path(f"{file}.minisig").read_bytes()) == before
    publish({**environment, "FAILING": "none", "CONTENT": "two"}, *arguments)
    assert (target / "copy-kernels.json").read_bytes() == file.read_bytes() != before[0]


def test_readers_with_the_key_accept_every_release(
    environment: dict[str, str], tmp_path: Path, target: Path, secret_key: Path
) -> None:
    """Also two within a second."""
    directory = tmp_path / "kernel-catalogs"
    key = (tmp_path / "key.pub").read_text()
    publish(environment, "edge", "--to", target, "--sign", secret_key)
    Catalogs(KERNELS, directory).add(str(target / "catalog.json"), "corp", key, Job())
    for content in ("two", "three"):
        publish({**environment, "CONTENT": content}, "edge", "--to", target, "--sign", secret_key)
        Catalogs(KERNELS, directory).refresh([], Job())
    (entry,) = [entry for entry in Catalogs(KERNELS, directory).merged()[0] if entry.origin == "corp"]
    assert Path(entry.tarball_url).read_text() == "three"


def test_a_signed_catalog_is_not_changed_without_the_key(
    environment: dict[str, str], target: Path, secret_key: Path
) -> None:
    publish(environment, "edge", "--to", target, "--sign", secret_key)
    before = names(target)
    assert "--sign" in publish({**environment, "CONTENT": "two"}, "edge", "--to", target, status=1)
    assert names(target) == before


def test_publishers_at_the_same_time_lose_nothing(environment: dict[str, str], target: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, SCRIPT, f"kernel{number}", "--to", target], env=environment)
        for number in range(4)
    ]
    assert [process.wait() for process in running] == [0] * 4
    parsed = KERNELS.parse((target / "catalog.json").read_bytes(), "test", location=str(target / "catalog.json"))
    assert [entry.name for entry in parsed.entries] == [f"kernel{number}" for number in range(4)]


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"CONTENT": ""}, "there is no kernel 'edge'"),
        ({"SIZE": "7"}, "its entry says 7"),
        ({"SIZE": "0"}, "size_bytes"),
    ],
)
def test_what_cannot_be_exported_is_not_published(
    environment: dict[str, str], target: Path, variables: dict[str, str], complaint: str
) -> None:
    assert complaint in publish({**environment, **variables}, "edge", "--to", target, status=1)
    assert names(target) == []


@pytest.mark.parametrize("text", ["", "{", '{"version": 2, "entries": []}', '{"version": 1, "entries": [7]}'])
def test_a_catalog_that_is_none_is_left_alone(environment: dict[str, str], target: Path, text: str) -> None:
    (target / "catalog.json").write_text(text)
    assert str(target / "catalog.json") in publish(environment, "edge", "--to", target, status=1)
    assert names(target) == ["catalog.json"]
    assert (target / "catalog.json").read_text() == text


def test_a_key_that_cannot_sign_publishes_nothing(environment: dict[str, str], target: Path) -> None:
    publish(environment, "edge", "--to", target, "--sign", target / "absent.key", status=1)
    assert names(target) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["edge"], "required"),
        (["edge", "--to", "/absent"], "there is no directory"),
        (["edge", "--command", "true"], "needs --catalog"),
        (["edge", "--command", "true", "--catalog", "x"], "needs {file}"),
        (["edge", "--to", "/tmp", "--command", "cp {file} x"], "not allowed"),
    ],
)
def test_wrong_usage(environment: dict[str, str], arguments: list[str], complaint: str) -> None:
    assert complaint in publish(environment, *arguments, status=2)


# With a real banger --------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path / "daemon") as daemon:
        yield daemon


@pytest.fixture
def server() -> Iterator[BundleServer]:
    with bundle_server() as server:
        yield server


@pytest.mark.parametrize("by", ["file", "url"])
def test_what_is_published_can_be_pulled(
    daemon: DaemonProcess, server: BundleServer, tmp_path: Path, target: Path, secret_key: Path, by: str
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "banger").write_text(f'#!/bin/sh\nexec {sys.executable} -m banger.cli "$@"\n')
    (programs / "banger").chmod(0o755)
    environment = {**daemon.environment, "PATH": f"{programs}:{os.environ['PATH']}"}
    server.content["edge.tar.zst"] = content = bundle()
    digest = hashlib.sha256(content).hexdigest()
    original = daemon.client.call(op.KERNEL_PULL, m.KernelPull(f"{server.address}/edge.tar.zst", sha256=digest))

    publish(environment, "edge", "--to", target, "--sign", secret_key)
    for path in target.iterdir():
        server.content[path.name] = path.read_bytes()
    location = f"{server.address}/catalog.json" if by == "url" else str(target / "catalog.json")
    daemon.client.call(op.KERNEL_CATALOG_ADD, m.CatalogAdd(location, "corp", (tmp_path / "key.pub").read_text()))
    pulled = daemon.client.call(op.KERNEL_PULL, m.KernelPull("corp/edge", save_as="again", arch=original.arch))
    assert (pulled.sha256, pulled.origin) == (original.sha256, "corp/edge")
    assert states(daemon) == {"corp/edge": "pulled"}

    server.content["edge.tar.zst"] = content = bundle(marker=b"new")
    request = m.KernelPull(f"{server.address}/edge.tar.zst", sha256=hashlib.sha256(content).hexdigest(), force=True)
    daemon.client.call(op.KERNEL_PULL, request)
    publish(environment, "edge", "--to", target, "--sign", secret_key)
    for path in target.iterdir():
        server.content[path.name] = path.read_bytes()
    daemon.client.call(op.KERNEL_CATALOG_REFRESH, m.CatalogRefresh())
    assert states(daemon) == {"corp/edge": "outdated"}


def states(daemon: DaemonProcess) -> dict[str, str]:
    """The states of what the further catalogs offer."""
    listed = daemon.client.call(op.KERNEL_CATALOG, m.Empty()).entries
    return {f"{entry.origin}/{entry.name}": entry.state for entry in listed if entry.origin != "banger"}
