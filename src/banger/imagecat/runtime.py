"""What machines take from the configuration of an image; it may be hostile, and what makes no sense is left out."""

from __future__ import annotations

import contextlib
import posixpath
import re

from banger.imagecat.manifest import ImageConfig
from banger.signals import TERM, signal_number

# a guest's whole configuration is one frame of 64 KiB, of which the user's own part needs some
_MAX_ENV_BYTES, _MAX_ENV = 32 << 10, 512
_MAX_VOLUMES, _MAX_PORTS, _MAX_PATH = 64, 1024, 200
# kernel filesystems, and /run, which is a tmpfs
_NO_VOLUMES = ("/proc", "/sys", "/dev", "/run")
# programs that are an init by their place: podman-run(1), --systemd; the agent looks for all of them (boot.c)
_INITS = frozenset(
    (
        *("/sbin/init", "/usr/sbin/init", "/usr/local/sbin/init", "/bin/init"),
        *("/lib/systemd/systemd", "/usr/lib/systemd/systemd", "/bin/systemd", "/usr/bin/systemd"),
    )
)


def environment(config: ImageConfig) -> list[str]:
    """The variables, NAME=VALUE, as many as fit."""
    kept: list[str] = []
    left = _MAX_ENV_BYTES
    for variable in config.env[:_MAX_ENV]:
        if "=" not in variable or variable.startswith("=") or "\0" in variable or not _is_utf8(variable):
            continue
        left -= len(variable.encode())
        if left >= 0:
            kept.append(variable)
    return kept


def workdir(config: ImageConfig) -> str:
    """The directory that commands start in, absolute, or ''."""
    return posixpath.normpath(f"/{config.workdir.lstrip('/')}") if config.workdir else ""


def volumes(config: ImageConfig, home: str) -> list[str]:
    """The directories that are volumes, without those on the home disk, which is one itself."""
    kept: list[str] = []
    for path in config.volumes:
        volume = _normal(path)
        if not path.startswith("/") or ".." in path.split("/") or volume == "/" or not is_plain_path(volume):
            continue
        if volume not in kept and not any(_is_within(volume, directory) for directory in (*_NO_VOLUMES, home)):
            kept.append(volume)
    return kept[:_MAX_VOLUMES]


def exposed_ports(config: ImageConfig) -> list[str]:
    """The ports as 8080/tcp, the lowest first."""
    ports: set[tuple[int, str]] = set()
    for text in config.exposed_ports:
        match = re.fullmatch(r"([0-9]{1,5})(?:/(tcp|udp|sctp))?", text.lower(), re.ASCII)
        if match is not None and 1 <= int(match[1]) <= 65535:
            ports.add((int(match[1]), match[2] or "tcp"))
    return [f"{number}/{protocol}" for number, protocol in sorted(ports)[:_MAX_PORTS]]


def stop_signal(config: ImageConfig) -> str:
    """The signal that asks the main command to end, SIGTERM when the image names none that there is."""
    with contextlib.suppress(ValueError):
        signal_number(config.stop_signal)
        return config.stop_signal
    return TERM


def wants_own_init(config: ImageConfig) -> bool:
    """Whether the image's own command is an init, which has to be PID 1: systemd or one at an init's usual place."""
    words = [*config.entrypoint, *config.cmd]
    return bool(words) and _normal(words[0]) in _INITS


def is_plain_path(path: str) -> bool:
    """Whether a path of the guest is absolute, not too long and nothing but text."""
    plain = path.startswith("/") and _is_utf8(path) and not any(character < " " for character in path)
    # the agent names a volume's directory by the path, each slash as %2F
    return plain and len(path.encode()) + 2 * path.count("/") + 2 * path.count("%") <= _MAX_PATH


def _normal(path: str) -> str:
    return posixpath.normpath(path).replace("//", "/", 1)  # POSIX gives two slashes at the start a meaning of their own


def _is_within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
