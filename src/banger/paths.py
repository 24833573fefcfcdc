"""Where banger keeps things; nothing else knows a path of the state directory."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from banger.api.errors import BangerError, Code


@dataclass(frozen=True)
class Layout:
    """The directories of one user's banger (XDG Base Directory Specification 0.8)."""

    config: Path
    state: Path
    cache: Path
    runtime: Path

    @property
    def config_file(self) -> Path:
        return self.config / "config.toml"

    @property
    def database(self) -> Path:
        return self.state / "banger.db"

    @property
    def kernels(self) -> Path:
        return self.state / "kernels"

    @property
    def kernel_catalogs(self) -> Path:
        return self.state / "kernel-catalogs"

    @property
    def images(self) -> Path:
        return self.state / "images"

    @property
    def image_catalogs(self) -> Path:
        return self.state / "image-catalogs"

    @property
    def blobs(self) -> Path:
        return self.cache / "blobs" / "sha256"

    @property
    def vms(self) -> Path:
        return self.state / "vms"

    @property
    def ssh_key(self) -> Path:
        return self.state / "ssh" / "id_ed25519"

    @property
    def log_file(self) -> Path:
        return self.state / "bangerd.log"

    @property
    def event_log(self) -> Path:
        return self.state / "events.log"

    @property
    def socket(self) -> Path:
        return self.runtime / "bangerd.sock"

    @property
    def lock(self) -> Path:
        return self.runtime / "bangerd.lock"

    def vm(self, vm_id: str) -> Path:
        return self.vms / vm_id

    def create(self) -> None:
        """Make the state and cache directories, private to the user."""
        for directory in (
            self.state,
            self.kernels,
            self.kernel_catalogs,
            self.images,
            self.image_catalogs,
            self.vms,
            self.cache,
        ):
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise BangerError(
                    Code.INVALID,
                    f"cannot create the state directory {directory}: {error.strerror}",
                    hint="set XDG_STATE_HOME and XDG_CACHE_HOME to directories that you can write",
                ) from error


def user_layout() -> Layout:
    """The layout of the user who runs this process, from the XDG variables and their defaults."""

    def base(variable: str, default: str) -> Path:
        value = os.environ.get(variable, "")
        return (Path(value) if value.startswith("/") else _home() / default) / "banger"

    runtime_base = os.environ.get("XDG_RUNTIME_DIR", "")
    runtime = Path(runtime_base) / "banger" if runtime_base.startswith("/") else Path(f"/tmp/banger-{os.getuid()}")
    return Layout(
        config=base("XDG_CONFIG_HOME", ".config"),
        state=base("XDG_STATE_HOME", ".local/state"),
        cache=base("XDG_CACHE_HOME", ".cache"),
        runtime=runtime,
    )


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise BangerError(
            Code.INVALID, f"the user with uid {os.getuid()} has no home directory", hint="set HOME to a directory"
        ) from error


def expand_home(text: str) -> Path:
    """The path with ~ and ~USER replaced by a home directory; ~USER of a user whom there is not stays as it is."""
    path = Path(text)
    with contextlib.suppress(RuntimeError):
        path = path.expanduser()
    return path


def absolute_path(text: str) -> Path:
    """The path that a request names; raises INVALID for a relative one and for what cannot be a path."""
    if not text.startswith("/"):
        raise BangerError(Code.INVALID, f"{text!r} is not an absolute path", hint="the daemon has no working directory")
    try:
        if b"\0" in os.fsencode(text):
            raise ValueError
    except ValueError as error:
        raise BangerError(Code.INVALID, f"{text!r} cannot be a path") from error
    return Path(text)


def ensure_runtime(runtime: Path) -> None:
    """Make the directory of the daemon's socket, 0700; refuse one that is not ours (it may lie in /tmp)."""
    try:
        with contextlib.suppress(FileExistsError):
            runtime.mkdir(mode=0o700, parents=True)
        status = os.lstat(runtime)
    except OSError as error:
        raise BangerError(
            Code.INVALID,
            f"cannot create {runtime}: {error.strerror}",
            hint="set XDG_RUNTIME_DIR to a directory that you can write",
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise BangerError(
            Code.INVALID,
            f"{runtime} is not a private directory of yours",
            hint=f"remove it, or chmod 700 {runtime}, or set XDG_RUNTIME_DIR",
        )
