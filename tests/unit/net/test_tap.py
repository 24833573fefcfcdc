"""What a host must have for networks with taps."""

import os
import shutil
from pathlib import Path

import pytest

from banger.net import tap, tap_helper


def test_what_a_host_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    device, limit = tmp_path / "tun", tmp_path / "limit"
    assert tap.reason_unusable(device, limit) == "pasta is not installed"
    (tmp_path / "pasta").touch(mode=0o755)
    assert tap.reason_unusable(device, limit) == f"{device} does not exist (as root: modprobe tun)"
    device.touch()
    monkeypatch.setattr("os.access", lambda path, mode: path != device)
    assert tap.reason_unusable(device, limit) == f"{device} may not be opened by this user"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    limit.write_text("0\n")
    assert "user namespaces are switched off" in tap.reason_unusable(device, limit)
    limit.write_text("96364\n")
    # and what only making a network shows
    helper = tmp_path / "helper.py"
    helper.write_text("import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(b'no network bridge')")
    monkeypatch.setattr(tap_helper, "__file__", str(helper))
    tap._try_out.cache_clear()
    assert tap.reason_unusable(device, limit) == "no network bridge"
    helper.write_text("nonsense")
    assert tap.reason_unusable(device, limit) == "the helper that makes networks does not run"
    monkeypatch.undo()


@pytest.mark.skipif(os.getuid() != 0, reason="others may not be allowed to")
@pytest.mark.skipif(shutil.which("pasta") is None, reason="pasta is not installed")
def test_a_network_can_be_made_here() -> None:
    tap._try_out.cache_clear()
    assert tap.reason_unusable() == ""
