"""The SSH key of guests: made once, or configured; checked by ssh-keygen."""

from __future__ import annotations

import os
import subprocess
import threading
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.ssh_keys import SshKey, managed_key
from tests.children import CONTEXT, child


def keygen(*argv: str | Path) -> str:
    return subprocess.run(["ssh-keygen", *argv], check=True, capture_output=True, text=True).stdout.strip()


def check(key: SshKey) -> None:
    """What ssh-keygen thinks of it."""
    assert keygen("-y", "-P", "", "-f", key.private).split()[:2] == key.public.split()[:2]
    assert keygen("-l", "-f", key.private).split()[1] == key.fingerprint


def test_made_on_first_use(tmp_path: Path) -> None:
    path = tmp_path / "state/ssh/id_ed25519"
    key = managed_key(path)
    check(key)
    assert key.private == path
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert (path.parent / "id_ed25519.pub").read_text() == key.public + "\n"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["id_ed25519", "id_ed25519.pub"]
    assert managed_key(path) == key
    (path.parent / "id_ed25519.pub").write_text("another one")
    assert managed_key(path) == key
    assert (path.parent / "id_ed25519.pub").read_text() == key.public + "\n"


def make_in_three_threads(path: Path, barrier: Barrier, results: Queue[str]) -> None:
    def work() -> None:
        barrier.wait()
        results.put(managed_key(path).fingerprint)

    started = [threading.Thread(target=work) for _ in range(3)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def test_many_at_once_make_one(tmp_path: Path) -> None:
    path = tmp_path / "id_ed25519"
    barrier, results = CONTEXT.Barrier(12), CONTEXT.Queue()
    processes = [child(make_in_three_threads, path, barrier, results) for _ in range(4)]
    seen = {results.get(timeout=60) for _ in range(12)}
    for process in processes:
        process.join()
    assert seen == {managed_key(path).fingerprint}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["id_ed25519", "id_ed25519.pub"]


@pytest.mark.parametrize(
    "options",
    [("-t", "ed25519"), ("-t", "rsa", "-b", "2048"), ("-t", "rsa", "-b", "2048", "-m", "PEM"), ("-t", "ecdsa")],
)
@pytest.mark.parametrize("public", [True, False])
def test_a_configured_key(tmp_path: Path, options: tuple[str, ...], public: bool) -> None:
    path = tmp_path / "mine"
    keygen("-q", "-N", "", "-C", "me@here", *options, "-f", path)
    if not public:
        (tmp_path / "mine.pub").unlink()
    key = managed_key(tmp_path / "unused", str(path))
    check(key)
    assert key.public.endswith("me@here" if public else "banger")
    assert not (tmp_path / "unused").exists()


def test_a_configured_key_below_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keygen("-q", "-N", "", "-t", "ed25519", "-f", tmp_path / "mine")
    assert managed_key(tmp_path / "unused", "~/mine").private == tmp_path / "mine"


def test_an_encrypted_key_needs_its_public_half(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    keygen("-q", "-N", "secret", "-t", "ed25519", "-f", path)
    fingerprint = keygen("-l", "-f", tmp_path / "mine.pub").split()[1]
    assert managed_key(tmp_path / "unused", str(path)).fingerprint == fingerprint
    (tmp_path / "mine.pub").unlink()
    error = refusal(tmp_path, path)
    assert "encrypted" in error.message
    assert f"ssh-keygen -y -f {path}" in error.hint


def refusal(tmp_path: Path, configured: Path | str) -> BangerError:
    with pytest.raises(BangerError) as caught:
        managed_key(tmp_path / "unused", str(configured))
    assert "secret" not in caught.value.message
    return caught.value


def test_what_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    assert refusal(tmp_path, path).code is Code.NOT_FOUND
    assert "absolute" in refusal(tmp_path, "relative/key").message
    assert "no private key" in refusal(tmp_path, write(path, "secret nonsense")).message
    assert "damaged" in refusal(tmp_path, write(path, "-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n")).message
    keygen("-q", "-N", "", "-t", "ed25519", "-f", tmp_path / "good")
    assert "without .pub" in refusal(tmp_path, write(path, (tmp_path / "good.pub").read_text())).hint
    for text in ("", "ssh-ed25519", "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAA", "one\ntwo", "ssh-ed25519 !!!"):
        (tmp_path / "good.pub").write_text(text)
        assert "good.pub" in refusal(tmp_path, tmp_path / "good").message
    (tmp_path / "good").chmod(0o644)
    error = refusal(tmp_path, tmp_path / "good")
    assert "0644" in error.message
    assert error.hint == f"run 'chmod 600 {tmp_path / 'good'}'"
    os.mkfifo(tmp_path / "fifo", 0o600)
    assert "cannot be read" in refusal(tmp_path, tmp_path / "fifo").message
    assert "cannot be read" in refusal(tmp_path, tmp_path).message


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_damaged_managed_key_is_said_and_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "id_ed25519", "damaged")
    with pytest.raises(BangerError, match="id_ed25519"):
        managed_key(path)
    assert path.read_text() == "damaged"
