"""Where things are kept: the XDG variables, and directories that nobody else may enter."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.paths import Layout, ensure_runtime, user_layout

VARIABLES = ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_variables_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, variable in enumerate(VARIABLES):
        monkeypatch.setenv(variable, f"/base/{number}")
    layout = user_layout()
    assert layout == Layout(*(Path(f"/base/{number}/banger") for number in range(4)))
    assert layout.socket == Path("/base/3/banger/bangerd.sock")


@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_defaults_where_a_variable_says_nothing(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """A relative path is to be ignored (XDG Base Directory Specification 0.8)."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
        if value is not None:
            monkeypatch.setenv(variable, value)
    monkeypatch.setenv("HOME", "/home/me")
    home = Path("/home/me")
    assert user_layout() == Layout(
        home / ".config/banger",
        home / ".local/state/banger",
        home / ".cache/banger",
        Path(f"/tmp/banger-{os.getuid()}"),
    )


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, variable in enumerate(VARIABLES):
        monkeypatch.setenv(variable, f"/base/{number}")

    def no_home(path: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")  # what pathlib says then

    monkeypatch.setattr(Path, "home", classmethod(no_home))
    assert user_layout().state == Path("/base/1/banger")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    with pytest.raises(BangerError, match="no home directory"):
        user_layout()


def test_created_directories_are_private(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "c", tmp_path / "a/b/state", tmp_path / "cache", tmp_path / "run")
    layout.create()
    layout.create()
    for name in ("", "kernels", "kernel-catalogs", "images", "image-catalogs", "vms"):
        assert mode(layout.state / name) == 0o700
    assert mode(layout.cache) == 0o700
    assert not layout.config.exists()


def test_state_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    layout = Layout(tmp_path, tmp_path / "file/state", tmp_path, tmp_path)
    with pytest.raises(BangerError, match="file/state: Not a directory") as caught:
        layout.create()
    assert "XDG_STATE_HOME" in caught.value.hint


def test_runtime_directory_is_made_and_kept(tmp_path: Path) -> None:
    ensure_runtime(tmp_path / "run/banger")
    ensure_runtime(tmp_path / "run/banger")
    assert mode(tmp_path / "run/banger") == 0o700


@pytest.mark.parametrize("what", ["group", "world", "symlink", "dangling", "file", "foreign"])
def test_runtime_directory_of_others_is_refused(tmp_path: Path, what: str) -> None:
    """It may lie in /tmp, where anybody may have made it first."""
    runtime = tmp_path / "banger"
    target = tmp_path / "target"
    if what == "symlink":
        target.mkdir(mode=0o700)
    if what in ("symlink", "dangling"):
        runtime.symlink_to(target)
    elif what == "file":
        runtime.touch()
    else:
        runtime.mkdir(mode=0o700)
    if what == "foreign":
        if os.getuid() != 0:
            pytest.skip("only root can give a directory away")
        os.chown(runtime, 65534, 65534)
    elif what in ("group", "world"):
        runtime.chmod(0o750 if what == "group" else 0o701)
    with pytest.raises(BangerError, match=f"{runtime} is not a private directory of yours") as caught:
        ensure_runtime(runtime)
    assert caught.value.code is Code.INVALID
    assert not target.exists() or what == "symlink"


def test_runtime_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BangerError, match=r"cannot create .*file/banger"):
        ensure_runtime(tmp_path / "file/banger")


def test_command_line_tells_of_a_foreign_runtime_directory(tmp_path: Path) -> None:
    (tmp_path / "banger").mkdir(mode=0o755)
    ended = subprocess.run(
        [sys.executable, "-m", "banger.daemon"],
        env={**os.environ, **{name: str(tmp_path) for name in VARIABLES}, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "is not a private directory of yours" in ended.stderr
    assert "Traceback" not in ended.stderr
