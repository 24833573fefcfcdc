"""Kernels over the API and the command line of a real daemon: pulled by URL, shared, refused, verified, exported."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.job import Progress
from tests.daemons import TIMEOUT, DaemonProcess, running_daemon
from tests.process.bundle_server import BundleServer, bundle, bundle_server
from tests.unit.kernelcat import builders


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path / "daemon") as daemon:
        yield daemon


@pytest.fixture
def server() -> Iterator[BundleServer]:
    with bundle_server() as server:
        yield server


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def banger(daemon: DaemonProcess, *argv: str, status: int = 0) -> str:
    """The output of a banger command that must end with `status`; of one that fails, what it says of it."""
    ended = subprocess.run(
        [sys.executable, "-m", "banger.cli", *argv], env=daemon.environment, capture_output=True, text=True
    )
    assert ended.returncode == status, ended.stderr
    return ended.stdout if status == 0 else ended.stderr


def serve(server: BundleServer, name: str, data: bytes) -> m.KernelPull:
    """The request that pulls a bundle from a server."""
    server.content[name] = data
    return m.KernelPull(f"{server.address}/{name}", sha256=sha256(data))


def pull(daemon: DaemonProcess, request: m.KernelPull) -> m.KernelInfo:
    return daemon.client.call(op.KERNEL_PULL, request)


def left_behind(daemon: DaemonProcess) -> list[str]:
    """Staging that nobody removed."""
    return [str(path) for path in daemon.layout.state.rglob(".staging-*")] + [
        str(path) for path in daemon.layout.cache.rglob(".staging-*")
    ]


def test_bundle_is_pulled_by_url(daemon: DaemonProcess, server: BundleServer) -> None:
    request = serve(server, "edge.tar.zst", bundle())
    kernel = pull(daemon, request)
    assert (kernel.name, kernel.kernel_version, kernel.arch) == ("edge", builders.VERSION, "amd64")
    assert kernel.source == f"pull:{server.address}/edge.tar.zst"
    assert (kernel.sha256, kernel.modules, kernel.origin) == (sha256(builders.elf()), True, "")
    manifest = json.loads((daemon.layout.kernels / "edge/manifest.json").read_bytes())
    assert manifest["sha256"] == sha256((daemon.layout.kernels / "edge/vmlinux").read_bytes())
    assert manifest["revision"] == request.sha256
    assert sorted(manifest["boot_modules"]) == sorted(builders.VIRTIO)
    with pytest.raises(BangerError) as caught:
        pull(daemon, request)
    assert (caught.value.code, caught.value.hint) == (Code.EXISTS, "replace it with --force")
    assert len(server.requests) == 1
    other = pull(daemon, m.KernelPull(request.name, save_as="other", sha256=request.sha256))
    assert other.name == "other"
    assert [kernel.name for kernel in daemon.client.call(op.KERNEL_LIST, m.Empty()).kernels] == ["edge", "other"]


@pytest.mark.parametrize("sha", ["", "abc", "0" * 63 + "g"])
def test_url_needs_a_digest(daemon: DaemonProcess, sha: str) -> None:
    with pytest.raises(BangerError) as caught:
        pull(daemon, m.KernelPull("http://127.0.0.1:1/x.tar.zst", sha256=sha))
    assert caught.value.code is Code.INVALID
    assert "--sha256" in caught.value.hint


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x.tar.zst", "file:///etc/passwd", "HTTP//x://"])
def test_other_schemes_are_refused(daemon: DaemonProcess, url: str) -> None:
    with pytest.raises(BangerError, match="http") as caught:
        pull(daemon, m.KernelPull(url, sha256="0" * 64))
    assert caught.value.code is Code.INVALID


def test_passwords_in_urls_are_not_shown(daemon: DaemonProcess, server: BundleServer) -> None:
    request = serve(server, "edge.tar.zst?token=secret", bundle())
    url = request.name.replace("http://", "http://user:secret@")
    argv = [sys.executable, "-m", "banger.cli", "kernel", "pull", url, "--sha256"]
    for digest in (request.sha256, "0" * 64):
        ended = subprocess.run([*argv, digest, "--force"], env=daemon.environment, capture_output=True, text=True)
        assert "edge" in ended.stderr
        assert "secret" not in ended.stdout + ended.stderr
    assert "secret" not in banger(daemon, "kernel", "show", "edge", "--json") + daemon.log


def test_urls_that_cannot_be_encoded(daemon: DaemonProcess) -> None:
    with pytest.raises(BangerError, match="not a valid URL") as caught:
        pull(daemon, m.KernelPull("http://127.0.0.1:1/\ud800", sha256="0" * 64, save_as="edge"))
    assert caught.value.code is Code.DOWNLOAD


def test_a_catalog_that_is_gone_is_not_looked_for_in_registries(daemon: DaemonProcess) -> None:
    with pytest.raises(BangerError, match="there is no catalog 'corp'") as caught:
        pull(daemon, m.KernelPull("corp/edge"))
    assert caught.value.code is Code.NOT_FOUND
    assert "docker.io/corp/edge" in caught.value.hint


def test_failed_replacement_leaves_the_old_kernel(daemon: DaemonProcess, server: BundleServer) -> None:
    old = pull(daemon, serve(server, "edge.tar.zst", bundle()))
    for damaged in (bundle(marker=b"new")[:-40], b"no archive", bundle(marker=b"new") + b"garbage"):
        request = serve(server, "edge.tar.zst", damaged)
        with pytest.raises(BangerError) as caught:
            pull(daemon, m.KernelPull(request.name, sha256=request.sha256, force=True))
        assert caught.value.code is Code.CORRUPT
    with pytest.raises(BangerError) as caught:
        pull(daemon, m.KernelPull(request.name, sha256=sha256(b"something else"), force=True))
    assert caught.value.code is Code.CORRUPT
    assert sha256(b"something else") in caught.value.message
    assert daemon.client.call(op.KERNEL_SHOW, m.NameRequest("edge")) == old
    assert daemon.client.call(op.KERNEL_VERIFY, m.KernelVerify()).kernels == [m.KernelCheck("edge")]
    assert left_behind(daemon) == []


def test_forced_pull_replaces_when_complete(daemon: DaemonProcess, server: BundleServer) -> None:
    old = pull(daemon, serve(server, "edge.tar.zst", bundle()))
    request = serve(server, "edge.tar.zst", bundle(marker=b"new"))
    server.hold = True
    seen: list[m.KernelInfo] = []
    pulling = threading.Thread(target=lambda: seen.append(pull(daemon, forced(request))))
    pulling.start()
    assert server.half_sent.wait(TIMEOUT)
    assert daemon.client.call(op.KERNEL_SHOW, m.NameRequest("edge")) == old
    server.gate.set()
    pulling.join(TIMEOUT)
    assert seen[0].sha256 == sha256(builders.elf(extra=b"new")) != old.sha256
    assert daemon.client.call(op.KERNEL_SHOW, m.NameRequest("edge")) == seen[0]


def forced(request: m.KernelPull) -> m.KernelPull:
    return m.KernelPull(request.name, sha256=request.sha256, force=True)


def test_concurrent_pulls_are_one_download(daemon: DaemonProcess, server: BundleServer) -> None:
    request = serve(server, "edge.tar.zst", bundle(padding=1 << 20))
    server.hold = True
    results: list[m.KernelInfo] = []
    progress: list[list[Progress]] = [[], [], []]

    def waiter(index: int) -> None:
        results.append(daemon.client.call(op.KERNEL_PULL, request, progress[index].append))

    threads = [threading.Thread(target=waiter, args=(index,)) for index in range(3)]
    threads[0].start()
    assert server.half_sent.wait(TIMEOUT)
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: all(any(step.stage == "download" for step in steps) for steps in progress))
    server.gate.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert [kernel.name for kernel in results] == ["edge"] * 3
    assert server.requests == ["/edge.tar.zst"]


def test_download_stops_when_the_last_waiter_leaves(daemon: DaemonProcess, server: BundleServer) -> None:
    request = serve(server, "edge.tar.zst", bundle(padding=1 << 20))
    server.hold = True
    command = [sys.executable, "-m", "banger.cli", "kernel", "pull", request.name, "--sha256", request.sha256]
    quiet = subprocess.DEVNULL
    with (
        subprocess.Popen(command, env=daemon.environment, stdout=quiet, stderr=quiet) as first,
        subprocess.Popen(command, env=daemon.environment, stdout=quiet, stderr=quiet) as second,
    ):
        assert server.half_sent.wait(TIMEOUT)
        wait_until(lambda: both_download(daemon))
        first.kill()
        first.wait(TIMEOUT)
        wait_until(lambda: daemon.client.call(op.DAEMON_STATUS, m.Empty()).busy == 1)
        assert not server.abandoned.is_set()
        second.kill()
        second.wait(TIMEOUT)
    assert server.abandoned.wait(TIMEOUT)
    wait_until(lambda: daemon.client.call(op.DAEMON_STATUS, m.Empty()).busy == 0)
    assert left_behind(daemon) == []
    assert not (daemon.layout.kernels / "edge").exists()


def both_download(daemon: DaemonProcess) -> bool:
    """Whether two pulls have come so far that the download, which is one, is theirs; before that they look it up."""
    operations = daemon.client.call(op.OPERATION_LIST, m.Empty()).operations
    return [operation.stage for operation in operations] == ["download"] * 2


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread or process will bring about."""
    waiting = threading.Event()
    for _ in range(int(TIMEOUT / 0.02)):
        if condition():
            return
        waiting.wait(0.02)
    pytest.fail("this did not come about in time")


def test_failure_is_shared(daemon: DaemonProcess, server: BundleServer) -> None:
    request = serve(server, "edge.tar.zst", bundle(padding=1 << 20)[:-100])
    server.hold = True
    errors: list[BangerError] = []

    def waiter() -> None:
        with pytest.raises(BangerError) as caught:
            pull(daemon, request)
        errors.append(caught.value)

    threads = [threading.Thread(target=waiter) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: both_download(daemon))
    server.gate.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert [error.code for error in errors] == [Code.CORRUPT] * 2
    assert server.requests == ["/edge.tar.zst"]


def test_forced_pull_does_not_fail_with_one_that_it_joined(daemon: DaemonProcess, server: BundleServer) -> None:
    request = serve(server, "edge.tar.zst", bundle(padding=1 << 20))
    other = serve(server, "other.tar.zst", bundle(marker=b"other"))
    server.hold = True
    results: dict[bool, m.KernelInfo | Code] = {}

    def waiter(force: bool) -> None:
        try:
            results[force] = pull(daemon, m.KernelPull(request.name, sha256=request.sha256, force=force))
        except BangerError as error:
            results[force] = error.code

    threads = [threading.Thread(target=waiter, args=(force,)) for force in (False, True)]
    threads[0].start()
    assert server.half_sent.wait(TIMEOUT)
    threads[1].start()
    wait_until(lambda: both_download(daemon))
    server.hold = False
    pull(daemon, m.KernelPull(other.name, save_as="edge", sha256=other.sha256))
    server.gate.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert results == {False: Code.EXISTS, True: daemon.client.call(op.KERNEL_SHOW, m.NameRequest("edge"))}
    assert daemon.client.call(op.KERNEL_SHOW, m.NameRequest("edge")).source == f"pull:{request.name}"


def test_http_errors_are_one_line(daemon: DaemonProcess, server: BundleServer) -> None:
    said = banger(daemon, "kernel", "pull", f"{server.address}/absent.tar.zst", "--sha256", "0" * 64, status=1)
    assert "404" in said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("error:")]) == 1
    assert left_behind(daemon) == []


def test_verify_names_what_changed(daemon: DaemonProcess, server: BundleServer) -> None:
    for name in ("first", "second", "third"):
        pull(daemon, serve(server, f"{name}.tar.zst", bundle()))
    assert banger(daemon, "kernel", "verify") == "first: ok\nsecond: ok\nthird: ok\n"
    modules = daemon.layout.kernels / "second/modules.squashfs"
    modules.write_bytes(modules.read_bytes()[:-1] + b"!")
    (daemon.layout.kernels / "third/vmlinux").unlink()
    checks = {check.name: check.problem for check in daemon.client.call(op.KERNEL_VERIFY, m.KernelVerify()).kernels}
    assert checks["first"] == ""
    assert "modules.squashfs has changed" in checks["second"]
    assert "vmlinux is missing" in checks["third"]
    banger(daemon, "kernel", "verify", "first")
    banger(daemon, "kernel", "verify", "second", status=1)
    (daemon.layout.kernels / "odd name").mkdir()
    assert "odd name: manifest.json cannot be read" in "".join(
        f"{check.name}: {check.problem}" for check in daemon.client.call(op.KERNEL_VERIFY, m.KernelVerify()).kernels
    )
    assert "there is no kernel 'fourth'" in banger(daemon, "kernel", "verify", "fourth", status=1)


def test_entries_filled_by_hand_are_listed(daemon: DaemonProcess, server: BundleServer) -> None:
    pull(daemon, serve(server, "good.tar.zst", bundle()))
    by_hand, unfinished, empty = (daemon.layout.kernels / name for name in ("by-hand", "unfinished", "empty"))
    for entry in (by_hand, unfinished, empty):
        entry.mkdir()
    image = builders.elf()
    (by_hand / "vmlinux").write_bytes(image)
    fields = {"name": "by-hand", "distro": "mine", "arch": "amd64", "kernel_version": builders.VERSION}
    fields |= {"sha256": sha256(image), "source": "my own", "imported_at": "2026-01-31T12:00:00Z"}
    (by_hand / "manifest.json").write_text(json.dumps(fields))
    (unfinished / "vmlinux").write_bytes(image)
    builders.module_tree(unfinished / "modules", builders.VIRTIO, builders.BUILTIN)
    listed = {kernel.name: kernel for kernel in daemon.client.call(op.KERNEL_LIST, m.Empty()).kernels}
    assert [*listed] == ["by-hand", "empty", "good", "unfinished"]
    assert (listed["by-hand"].problem, listed["by-hand"].distro, listed["good"].problem) == ("", "mine", "")
    assert "manifest.json" in listed["empty"].problem
    rows = {line.split()[0]: line for line in banger(daemon, "kernel", "list").splitlines()}
    assert "broken: manifest.json cannot be read" in rows["empty"]
    assert rows["good"].split()[1:4] == [builders.VERSION, "amd64", "unknown"]
    fix = f"banger kernel import unfinished --from {unfinished} --force"
    assert fix in listed["unfinished"].problem
    banger(daemon, *fix.split()[1:])
    finished = daemon.client.call(op.KERNEL_SHOW, m.NameRequest("unfinished"))
    assert (finished.problem, finished.modules) == ("", True)


def test_links_in_an_entry_filled_by_hand_are_exported(daemon: DaemonProcess, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(builders.elf())
    entry = daemon.layout.kernels / "linked"
    entry.mkdir()
    (entry / "vmlinux").symlink_to(image)
    fields = {"name": "linked", "distro": "mine", "arch": "amd64", "kernel_version": builders.VERSION}
    fields |= {"sha256": sha256(builders.elf()), "source": "my own", "imported_at": "2026-01-31T12:00:00Z"}
    (entry / "manifest.json").write_text(json.dumps(fields))
    banger(daemon, "kernel", "export", "linked", "-o", str(tmp_path / "bundle"))
    banger(daemon, "kernel", "import", "copy", "--from", str(tmp_path / "bundle"))
    assert (daemon.layout.kernels / "copy/vmlinux").read_bytes() == builders.elf()


def test_what_is_known_of_a_kernel_is_shown(daemon: DaemonProcess, tmp_path: Path) -> None:
    root = builders.kernel_directory(tmp_path / "root")
    (root / "boot/vmlinux-6.1.0-9-test").write_bytes(builders.elf(pvh=False))
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
    members = [builders.tar_member(f"./{name}", (root / name).read_bytes()) for name in names]
    members.append(builders.tar_member("./boot/console", kind=tarfile.CHRTYPE))
    archive = tmp_path / "kernel.tar"
    archive.write_bytes(builders.tar(members))
    imported = banger(daemon, "kernel", "import", "odd", "--from", str(archive))
    assert imported.startswith(f"imported odd: {builders.VERSION} amd64")
    shown = dict(line.split(": ", 1) for line in banger(daemon, "kernel", "show", "odd").splitlines())
    assert "CONFIG_PVH" in shown["missing"]
    assert "CONFIG_DEVTMPFS" in shown["unknown"]
    assert shown["skipped"].strip() == "1 device"
    assert shown["source"].strip() == f"import:{archive}"
    document = json.loads(banger(daemon, "kernel", "show", "odd", "--json"))
    assert document["skipped"] == ["1 device"]
    # no claim that everything is built in: nothing tells
    banger(daemon, "kernel", "import", "bare", "--from", str(root / "boot/vmlinux-6.1.0-9-test"))
    assert "modules:  no\n" in banger(daemon, "kernel", "show", "bare")


def test_full_disk_and_unwritable_state(daemon: DaemonProcess, server: BundleServer, small_disk: Path) -> None:
    """One line, exit code 1, nothing left; the kernels that were there stay."""
    kept = pull(daemon, serve(server, "kept.tar.zst", bundle()))
    package = small_disk.parent / "linux.deb"
    package.write_bytes(builders.deb(builders.kernel_deb_members()))
    kernels = daemon.layout.kernels
    shutil.copytree(kernels, small_disk, dirs_exist_ok=True)
    subprocess.run(["mount", "--bind", small_disk, kernels], check=True)
    try:
        large = serve(server, "large.tar.zst", bundle(padding=40 << 20))
        digest = ["--sha256", large.sha256]
        for argv in (
            ["pull", large.name, *digest],
            ["pull", large.name, *digest, "--as", "kept", "--force"],
        ):
            said = banger(daemon, "kernel", *argv, status=1)
            assert "No space left on device" in said
            assert len([line for line in said.splitlines() if line.startswith("error:")]) == 1
        assert left_behind(daemon) == []
        subprocess.run(["mount", "-o", "remount,bind,ro", kernels], check=True)
        for argv in (["import", "other", "--from", str(package)], ["rm", "kept"], ["pull", large.name, *digest]):
            assert "Read-only file system" in banger(daemon, "kernel", *argv, status=1)
        assert [kernel.name for kernel in daemon.client.call(op.KERNEL_LIST, m.Empty()).kernels] == ["kept"]
        assert daemon.client.call(op.KERNEL_VERIFY, m.KernelVerify()).kernels == [m.KernelCheck("kept")]
        assert daemon.client.call(op.KERNEL_SHOW, m.NameRequest("kept")).sha256 == kept.sha256
    finally:
        subprocess.run(["umount", kernels], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 32 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small filesystem needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", mount], check=True)
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_catalog_that_cannot_be_used_is_named(daemon: DaemonProcess, tmp_path: Path) -> None:
    file = tmp_path / "corp.json"
    file.write_text(json.dumps({"version": 1, "entries": []}))
    banger(daemon, "kernel", "catalog", "add", str(file))
    (daemon.layout.kernel_catalogs / "corp/catalog.json").write_text("{")
    said = banger(daemon, "kernel", "pull", "corp/edge", status=1)
    assert "the catalog 'corp'" in said
    assert "banger kernel catalog refresh corp" in said


def test_what_can_be_pulled_is_a_table(daemon: DaemonProcess, tmp_path: Path) -> None:
    entry = {
        "name": "img",
        "kind": "oci",
        "distro": "mine",
        "arch": "arm64",
        "kernel_version": "6.6.1",
        "image": "a/b:c",
    }
    later = entry | {"name": "later", "kind": "unheard-of"}
    (tmp_path / "corp.json").write_text(json.dumps({"version": 1, "entries": [entry, later]}))
    banger(daemon, "kernel", "catalog", "add", str(tmp_path / "corp.json"))
    header, *rows = (line.split() for line in banger(daemon, "kernel", "list", "--available").splitlines())
    assert header == ["NAME", "CATALOG", "STATE", "ARCH", "DISTRO", "VERSION", "SIZE", "DESCRIPTION"]
    assert ["debian", "banger", "available", "amd64", "debian", "6.1", "67.7", "MiB"] in [row[:8] for row in rows]
    assert [row[:6] for row in rows[-2:]] == [
        [name, "corp", "available", "arm64", "mine", "6.6.1"] for name in ("img", "later")
    ]
    said = banger(daemon, "kernel", "pull", "later", "--arch", "arm64", status=1)
    assert "'unheard-of', which this banger cannot pull" in said
    (tmp_path / "next.json").write_text(json.dumps({"version": 2, "entries": []}))
    assert "needs a newer banger" in banger(daemon, "kernel", "catalog", "add", str(tmp_path / "next.json"), status=1)


def test_what_is_not_one_kernel_is_refused(daemon: DaemonProcess, tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(builders.elf())
    several = ["--from", "host", "--from", str(tmp_path / "vmlinux")]
    assert "use --from host alone" in banger(daemon, "kernel", "import", "mine", *several, status=1)
    foreign = tmp_path / "Image"
    foreign.write_bytes(builders.arm64_image())
    said = banger(daemon, "kernel", "import", "mine", "--from", str(foreign), "--arch", "amd64", status=1)
    assert "is 'arm64', not 'amd64'" in said
    builders.module_tree(tmp_path / "root/lib/modules/6.6.6", builders.VIRTIO, builders.BUILTIN)
    pair = ["--from", str(tmp_path / "vmlinux"), "--from", str(tmp_path / "root")]
    assert "the modules are for '6.6.6'" in banger(daemon, "kernel", "import", "mine", *pair, status=1)
    assert left_behind(daemon) == []


def test_export_is_reproducible_and_can_be_pulled(daemon: DaemonProcess, server: BundleServer, tmp_path: Path) -> None:
    pull(daemon, serve(server, "edge.tar.zst", bundle()))
    first, second = tmp_path / "first.tar.zst", tmp_path / "second.tar.zst"
    url = f"{server.address}/published.tar.zst"
    entry = json.loads(banger(daemon, "kernel", "export", "edge", "-o", str(first), "--url", url))
    assert entry["tarball_sha256"] == sha256(first.read_bytes())
    assert (entry["size_bytes"], entry["tarball_url"]) == (first.stat().st_size, url)
    assert "--force" in banger(daemon, "kernel", "export", "edge", "-o", str(first), status=1)
    server.content["published.tar.zst"] = first.read_bytes()
    again = pull(daemon, m.KernelPull(url, sha256=entry["tarball_sha256"]))
    assert again.name == "published"
    banger(daemon, "kernel", "export", "published", "-o", str(second))
    assert second.read_bytes() == first.read_bytes()
    original, copy = (daemon.layout.kernels / name for name in ("edge", "published"))
    for file in ("vmlinux", "boot-modules.cpio"):
        assert (copy / file).read_bytes() == (original / file).read_bytes()
    assert left_behind(daemon) == []


def test_export_replaces_nothing_but_files(daemon: DaemonProcess, server: BundleServer, tmp_path: Path) -> None:
    pull(daemon, serve(server, "edge.tar.zst", bundle()))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for output in (pipe, Path("/dev/full"), tmp_path):
        with pytest.raises(BangerError, match="is not a regular file") as caught:
            daemon.client.call(op.KERNEL_EXPORT, m.KernelExport("edge", str(output), force=True))
        assert caught.value.code is Code.INVALID
    assert pipe.is_fifo()
    for text in ("/a\0b", "/\ud800", "relative", f"/{'a' * 300}", "/dev/null/a"):
        with pytest.raises(BangerError) as caught:
            daemon.client.call(op.KERNEL_EXPORT, m.KernelExport("edge", text, force=True))
        assert caught.value.code is Code.INVALID
    assert left_behind(daemon) == []


def test_answers_while_kernels_come_and_go(daemon: DaemonProcess, server: BundleServer, tmp_path: Path) -> None:
    """Every question about a kernel that is replaced and removed all the time is about a whole one, or none."""
    requests = [serve(server, f"{number}.tar.zst", bundle(marker=b"%d" % number)) for number in range(2)]
    stop = threading.Event()
    wrong: list[object] = []

    def change() -> None:
        for number in range(20):
            request = requests[number % 2]
            pull(daemon, m.KernelPull(request.name, save_as="edge", sha256=request.sha256, force=True))
            if number % 3 == 2:
                daemon.client.call(op.KERNEL_DELETE, m.KernelDelete("edge"))

    def ask(number: int) -> None:
        output = str(tmp_path / f"{number}.tar.zst")
        while not stop.is_set():
            try:
                wrong.extend(k for k in daemon.client.call(op.KERNEL_LIST, m.Empty()).kernels if k.problem)
                checks = daemon.client.call(op.KERNEL_VERIFY, m.KernelVerify()).kernels
                wrong.extend(check for check in checks if check.problem)
                daemon.client.call(op.KERNEL_SHOW, m.NameRequest("edge"))
                daemon.client.call(op.KERNEL_EXPORT, m.KernelExport("edge", output, force=True))
            except BangerError as error:
                if error.code is not Code.NOT_FOUND:
                    wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        change()
    finally:
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT)
    assert wrong == []
    assert left_behind(daemon) == []


def test_catalog_from_a_file_with_states(daemon: DaemonProcess, server: BundleServer, tmp_path: Path) -> None:
    data = bundle()
    server.content["edge.tar.zst"] = data
    entry: dict[str, object] = {"name": "edge", "distro": "mine", "arch": "amd64", "kernel_version": builders.VERSION}
    entry |= {"tarball_url": f"{server.address}/edge.tar.zst", "tarball_sha256": sha256(data), "size_bytes": len(data)}
    file = tmp_path / "corp.json"
    file.write_text(json.dumps({"version": 1, "updated": "2026-01-01T00:00:00Z", "entries": [entry]}))
    banger(daemon, "kernel", "catalog", "add", str(file))

    def state() -> str:
        catalog = json.loads(banger(daemon, "kernel", "list", "--available", "--json"))["entries"]
        return next(str(found["state"]) for found in catalog if (found["origin"], found["name"]) == ("corp", "edge"))

    assert state() == "available"
    banger(daemon, "kernel", "pull", "corp/edge")
    assert state() == "pulled"
    kernel = daemon.client.call(op.KERNEL_SHOW, m.NameRequest("edge"))
    assert (kernel.origin, kernel.distro) == ("corp/edge", "mine")
    newer = bundle(marker=b"newer")
    server.content["edge.tar.zst"] = newer
    entry |= {"tarball_sha256": sha256(newer), "size_bytes": len(newer)}
    file.write_text(json.dumps({"version": 1, "updated": "2026-01-02T00:00:00Z", "entries": [entry]}))
    assert state() == "pulled"
    banger(daemon, "kernel", "catalog", "refresh")
    assert state() == "outdated"
    banger(daemon, "kernel", "pull", "edge", "--force")
    assert state() == "pulled"
    assert "did you mean 'edge'?" in banger(daemon, "kernel", "pull", "egde", status=1)
    wrong = banger(daemon, "kernel", "pull", "edge", "--force", "--sha256", "0" * 64, status=1)
    assert "SHA-256" in wrong
