"""What a host must have for networks with taps."""

from pathlib import Path

import pytest

from banger.net import tap


def test_what_a_host_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    device, limit = tmp_path / "tun", tmp_path / "limit"
    assert tap.reason_unusable(device, limit) == "pasta is not installed"
    (tmp_path / "pasta").touch(mode=0o755)
    assert tap.reason_unusable(device, limit) == f"{device} does not exist"
    device.touch()
    monkeypatch.setattr("os.access", lambda path, mode: path != device)
    assert tap.reason_unusable(device, limit) == f"{device} may not be opened by this user"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    limit.write_text("0\n")
    assert "user namespaces are switched off" in tap.reason_unusable(device, limit)
    limit.write_text("96364\n")
    assert tap.reason_unusable(device, limit) == ""
