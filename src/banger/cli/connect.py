"""Finds the user's daemon, starts it when there is none, replaces one of an older version or other installation."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

from banger import __version__
from banger.api import models as m
from banger.api.client import Client, Identity
from banger.api.codec import decode_error
from banger.api.errors import BangerError, Code
from banger.api.operations import DAEMON_STATUS, DAEMON_STOP, OPERATION_LIST
from banger.installation import PACKAGE
from banger.paths import Layout, ensure_runtime, user_layout

READY_VARIABLE = "BANGER_READY_FD"
_OURS = Identity(__version__, str(PACKAGE))
_LOG_TAIL_LINES = 5
_LOG_TAIL_BYTES = 4096


def ensure_daemon(layout: Layout | None = None) -> Client:
    """A client of a daemon that runs and is not older than this program, nor of another installation unless newer.

    Raises BangerError(DAEMON) with the end of the daemon's log when it does not start.
    """
    layout = layout or user_layout()
    client = Client(layout.socket)
    found = find_daemon(client)
    if found is None:
        start_daemon(layout)
    elif _is_to_go(found):
        _replace(layout, client, found)
    return client


def find_daemon(client: Client) -> Identity | None:
    """Whose code the daemon that answers runs, None when nobody answers."""
    try:
        return client.identity()
    except BangerError as error:
        if error.code is not Code.DAEMON:
            raise
        return None


def is_older(version: str, than: str) -> bool:
    """Whether a dotted version precedes another; one that is not numeric (or '') is never older."""
    return bool(version_key(version)) and version_key(version) < version_key(than)


def version_key(version: str) -> tuple[int, ...]:
    """The numbers of a dotted version, by which versions are ordered."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _is_to_go(found: Identity) -> bool:
    """Whether a daemon is older than this program, or of another installation: one that is gone, or not newer."""
    if found.installation == _OURS.installation:
        return is_older(found.version, __version__)
    return not is_older(__version__, found.version) or not Path(found.installation).exists()


def start_daemon(layout: Layout) -> None:
    """Start the daemon unless somebody else does it at the same time, and wait until it is ready."""
    layout.create()
    ensure_runtime(layout.runtime)
    with _start_lock(layout):
        if find_daemon(Client(layout.socket)) is None:
            _spawn(layout)


def stop_daemon(client: Client) -> m.DaemonStatus:
    """Stop the daemon and wait until its process has ended; its VMs go on."""
    status = client.call(DAEMON_STATUS, m.Empty())
    try:
        pidfd = os.pidfd_open(status.pid)
    except ProcessLookupError:
        return status
    try:
        client.call(DAEMON_STOP, m.Empty())
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.poll()
    finally:
        os.close(pidfd)
    return status


def stop_idle_daemon(layout: Layout) -> None:
    """Stop the daemon, where one runs. Raises IN_USE, with what it does, when that would end something."""
    client = Client(layout.socket)
    if find_daemon(client) is None:
        return
    running = [f"{each.name} {each.subject}".rstrip() for each in client.call(OPERATION_LIST, m.Empty()).operations]
    if running or client.call(DAEMON_STATUS, m.Empty()).busy:
        raise BangerError(
            Code.IN_USE,
            f"the daemon is busy: {', '.join(running) or 'commands are attached to machines'}",
            hint="repeat this when it is not, or end them: 'banger operation list' shows operations",
        )
    stop_daemon(client)


def stop_daemon_for_another(layout: Layout, client: Client) -> None:
    """Stop the daemon, unless none could be started after it: raises BangerError when config.toml cannot be read."""
    from banger import config

    try:
        config.load(layout.config_file)
    except BangerError as error:
        message = f"{error.message}; the daemon was not restarted and goes on with what it has read before"
        raise BangerError(error.code, message, error.hint) from error
    stop_daemon(client)


def _replace(layout: Layout, client: Client, found: Identity) -> None:
    from banger.cli.render import note

    status = client.call(DAEMON_STATUS, m.Empty())
    is_other = found.installation != _OURS.installation
    which = f"warning: the daemon is of version {found.version}, this is {__version__}"
    if is_other:
        which = (
            f"warning: the daemon is of another installation of banger, {found.version} in "
            f"{found.installation or 'a directory that it does not tell'}; this is {__version__} in {PACKAGE}"
        )
    if is_other and status.activated:
        note(f"{which}; systemd starts it: run 'banger system install' to have it start this one")
        return
    if status.busy:
        note(f"{which}, and it is busy; run 'banger daemon restart' when it is not")
        return
    with _start_lock(layout):
        # another process may have been quicker
        running = find_daemon(client)
        if running is not None and _is_to_go(running):
            stop_daemon_for_another(layout, client)
            running = find_daemon(client)  # where systemd holds the socket, this has it start the next one
        if running is None:
            _spawn(layout)


@contextlib.contextmanager
def _start_lock(layout: Layout) -> Iterator[None]:
    descriptor = os.open(layout.lock.with_name("start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _spawn(layout: Layout) -> None:
    import subprocess

    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as ready:
        try:
            with open(layout.log_file, "ab") as log:
                logged = os.fstat(log.fileno()).st_size
                daemon = subprocess.Popen(
                    [sys.executable, "-I", "-m", "banger.daemon"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env={**os.environ, READY_VARIABLE: str(writer)},
                    pass_fds=(writer,),
                    start_new_session=True,
                )
        finally:
            os.close(writer)
        line = ready.readline().decode(errors="replace").strip()
    if line == "ok":
        daemon.returncode = 0  # it outlives this process: nothing to wait for
        return
    if line:
        raise decode_error(json.loads(line))
    status = daemon.wait()
    raise BangerError(
        Code.DAEMON,
        f"the daemon did not start (status {status}): {log_tail(layout.log_file, logged) or 'it logged nothing'}",
        hint=f"the whole log is {layout.log_file}; 'banger doctor' checks this host",
    )


def log_tail(path: Path, start: int) -> str:
    """The last lines of a log from a byte on, in one line."""
    with open(path, "rb") as stream:
        stream.seek(max(start, os.fstat(stream.fileno()).st_size - _LOG_TAIL_BYTES))
        return " / ".join(stream.read().decode(errors="replace").strip().splitlines()[-_LOG_TAIL_LINES:])
