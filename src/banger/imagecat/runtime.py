"""What machines take from the configuration of an image; it may be hostile, and what makes no sense is left out."""

from __future__ import annotations

import contextlib
import posixpath
import re

from banger.imagecat.manifest import ImageConfig
from banger.signals import TERM, signal_number

_MAX_VOLUMES, _MAX_PORTS, _MAX_PATH = 1024, 1024, 4095
_MAX_VOLUME = 200  # bytes of its path: the agent names its directory by that, each slash as %2F
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
    """The variables, NAME=VALUE."""
    return [variable for variable in config.env if not _no_variable(variable)]


def warnings(config: ImageConfig) -> list[str]:
    """What is left out of the environment, a sentence each."""
    refused = [(variable, why) for variable in config.env if (why := _no_variable(variable))]
    return [f"the variable {_shorten(variable)} is left out: {why}" for variable, why in refused]


def _no_variable(text: str) -> str:
    """Why a text of an image's environment cannot be a variable of a command, '' when it can."""
    if "=" not in text:
        return "it has no '='"
    if text.startswith("="):
        return "it has no name"
    if "\0" in text:
        return "it holds a NUL"
    return "" if _is_utf8(text) else "it is no text in UTF-8"


def _shorten(text: str) -> str:
    """The beginning of a stranger's text, safe to print."""
    return ascii(text if len(text) <= 60 else f"{text[:60]}...")


def workdir(config: ImageConfig) -> str:
    """The directory that commands start in, absolute; / unless the image says it, as with container engines."""
    return posixpath.normpath(f"/{config.workdir.lstrip('/')}")


def volumes(config: ImageConfig, home: str) -> list[str]:
    """The directories that are volumes, without those on the home disk, which is one itself."""
    kept: list[str] = []
    for path in config.volumes:
        volume = _normal(path)
        if not path.startswith("/") or ".." in path.split("/") or volume == "/" or not is_plain_path(volume):
            continue
        if len(volume.encode()) + 2 * volume.count("/") + 2 * volume.count("%") > _MAX_VOLUME:
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
    return plain and len(path.encode()) <= _MAX_PATH


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
