"""`banger vm cp`: files and trees into and out of a running VM, as tar streams."""

from __future__ import annotations

import os
import posixpath
import select
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import click

from banger import stdio
from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client, StreamConnection
from banger.api.errors import BangerError, Code
from banger.cli import errors
from banger.cli.archive import Archive
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault
from banger.cli.extract import extract
from banger.cli.lazy import Command
from banger.cli.options import VM
from banger.cli.progress import Display
from banger.cli.render import note
from banger.cli.terminal import CHUNK, exit_status, went_away
from banger.job import Progress

_STANDARD = "-"
_REPORT_BYTES = 1 << 20  # between two steps of the progress bar


class Place(NamedTuple):
    """One end of a copy; `vm` is '' for this host."""

    vm: str
    path: str


class CopyPath(click.ParamType[Place]):
    """VM:PATH, or a path of this host, which needs a slash before a colon in it; or - for a tar stream."""

    name = "path"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        return value if isinstance(value, Place) else parse_place(str(value))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        from banger.cli.completion import complete_names

        vm, colon, _ = incomplete.partition(":")
        if colon and "/" not in vm:
            return []  # a path in a guest
        names = complete_names("VM", incomplete)
        return [CompletionItem(f"{item.value}:") for item in names] or [CompletionItem(incomplete, type="file")]


def parse_place(text: str) -> Place:
    """The end of a copy that `text` names; raises UsageFault."""
    vm, colon, path = text.partition(":")
    if not colon or "/" in vm or not vm:
        if not text:
            raise UsageFault("an empty path")
        return Place("", text)
    try:
        VM.convert(vm, None, None)
    except UsageFault as fault:
        if os.path.lexists(text):
            fault.hint = f"for the file of this host write ./{text}"
        raise
    if not path:
        raise UsageFault(f"{text!r} names no path in the VM", f"for the user's home directory use {vm}:/root")
    return Place(vm, posixpath.join("/", path))


def _of_this_host(*places: Place) -> str:
    """How the first of these that is a file of this host is written, or else the first of all."""
    names = [f"{place.vm}:{path}" for place in places for path in (place.path[1:], place.path)]
    return f"./{next(filter(os.path.lexists, names), names[0])}"


@click.command(
    "cp",
    cls=Command,
    epilog="""
    banger vm cp notes.txt web:/root/            a file into a directory
    banger vm cp site web:/var/www               a tree: to /var/www/site if /var/www exists
    banger vm cp site/. web:/var/www             what is in it
    banger vm cp web:/etc/hosts .                a file out of the VM
    tar c . | banger vm cp - web:/srv            a tar stream
    banger vm cp web:/var/log - | tar t
    """,
)
@click.argument("source", type=CopyPath(), metavar="SRC")
@click.argument("target", type=CopyPath(), metavar="DST")
@click.option("--user", default="", metavar="NAME", help="Owner of what is copied into the VM instead of root.")
@click.option("-a", "--archive", is_flag=True, help="Keep the numeric owners of what is copied into the VM.")
def copy(source: Place, target: Place, user: str, archive: bool) -> int:
    """Copy files and trees into and out of a running VM.

    SRC or DST is VM:PATH. As with `cp -r`, SRC goes into DST when that is a directory, and becomes DST otherwise. A
    symbolic link given as SRC is followed; links inside of a tree are kept, and out of a VM come only those that stay
    in the tree. A `-` is a tar stream on standard input or output. Exits 1 when something was left out.
    """
    if bool(source.vm) == bool(target.vm):
        hint = f"for a file of this host write {_of_this_host(source, target)}" if source.vm else ""
        raise UsageFault("one of SRC and DST must be VM:PATH, and the other a path of this host", hint)
    if user and archive:
        raise UsageFault("--user and --archive exclude each other")
    if source.vm and (user or archive):
        raise UsageFault("--user and --archive are for copies into a VM", "files from a VM become yours")
    if target.path == _STANDARD and not target.vm and os.isatty(stdio.STDOUT):
        raise UsageFault("a tar stream does not belong on a terminal", "redirect it to a file or a pipe")
    if target.vm and source.path != _STANDARD and not os.path.lexists(source.path):
        raise UsageFault(f"there is no {source.path} on this host")
    with Display() as display:
        client = ensure_daemon()
        if target.vm:
            skipped = _upload(client, source.path, target, user, archive, display)
        else:
            skipped = _download(client, source, target.path, display)
    for line in skipped:
        note(f"skipped {line}")
    return errors.FAILED if skipped else 0


def _upload(client: Client, source: str, target: Place, user: str, keep_owners: bool, display: Display) -> list[str]:
    if source == _STANDARD:
        if _stat(client, target) is None:
            raise _no_such(target)
        owner = user or ("" if keep_owners else "0:0")
        _send(client, m.TreeWrite(target.vm, target.path, owner), _standard_input(), None, display)
        return []
    directory, name = _upload_target(client, source, target)
    tree = Archive(source, name, keep_owners)
    total = tree.size() if sys.stderr.isatty() else None
    _send(client, m.TreeWrite(target.vm, directory, user), tree.chunks(CHUNK), total, display)
    return tree.skipped


def _upload_target(client: Client, source: str, target: Place) -> tuple[str, str]:
    """The directory of the guest to extract in, and the name to give to `source` there ('' for its contents alone)."""
    contents = Path(source).is_dir() and source.rstrip("/").rpartition("/")[2] in ("", ".", "..")
    found = _stat(client, target)
    if found is not None and stat.S_ISDIR(found.mode):
        return target.path, "" if contents else _last_name(source)
    if found is not None and Path(source).is_dir():
        raise BangerError(Code.EXISTS, f"{target.path} in {target.vm} is not a directory, but {source} is one")
    if target.path.endswith("/") and not Path(source).is_dir():
        raise _no_such(target)
    parent = Place(target.vm, posixpath.dirname(target.path.rstrip("/")))
    above = _stat(client, parent)
    if above is None or not stat.S_ISDIR(above.mode):
        raise _no_such(parent)
    return parent.path, _last_name(target.path)


def _download(client: Client, source: Place, target: str, display: Display) -> list[str]:
    found = _stat(client, source)
    if found is None:
        raise _no_such(source)
    if target == _STANDARD:
        with client.open(op.VM_READ_TREE, m.TreeRead(source.vm, source.path, follow=True)) as stream:
            for data in _received(stream):
                _write_all(stdio.STDOUT, data)
        return []
    is_directory = stat.S_ISDIR(found.mode)
    place, name = _download_target(source, target, is_directory)
    if is_directory:
        place.mkdir(exist_ok=True)
    request = m.TreeRead(source.vm, source.path, follow=True, contents=is_directory)
    total = None if is_directory else found.size
    with client.open(op.VM_READ_TREE, request) as stream:
        reader = _Reader(_received(stream))
        advance = _meter(display, f"copying {source.path}", total)
        skipped = extract(reader, os.fspath(place), f"{source.vm}:{source.path}", name, advance)
        reader.drain()
    return skipped


def _download_target(source: Place, target: str, is_directory: bool) -> tuple[Path, str]:
    """The directory of this host to extract in, and the name of the file ('' for a directory's contents)."""
    path = Path(target)
    name = _last_name(source.path) if not source.path.endswith(("/.", "/..")) else ""
    if path.is_dir():
        return (path / name, "") if is_directory else (path, name)
    if is_directory and path.exists():
        raise BangerError(Code.EXISTS, f"{target} is not a directory, but {source.path} in {source.vm} is one")
    if not path.parent.is_dir() or (target.endswith("/") and not is_directory):
        raise BangerError(Code.NOT_FOUND, f"there is no directory {path if target.endswith('/') else path.parent}")
    return (path, "") if is_directory else (path.parent, path.name)


def _last_name(path: str) -> str:
    return posixpath.basename(path.rstrip("/"))


def _stat(client: Client, place: Place) -> m.GuestStat | None:
    """What is at a place in a guest; None when there is nothing."""
    try:
        return client.call(op.VM_STAT, m.GuestPath(place.vm, place.path))
    except BangerError as error:
        if error.code is not Code.NOT_FOUND:
            raise
        client.call(op.VM_SHOW, m.VmRef(place.vm))  # raises when it is the VM that is missing
        return None


def _no_such(place: Place) -> BangerError:
    return BangerError(Code.NOT_FOUND, f"there is no {place.path} in {place.vm}")


def _standard_input() -> Iterator[bytes]:
    while data := stdio.read(CHUNK):
        yield data


def _meter(display: Display, label: str, total: int | None) -> Callable[[int], None]:
    """Counts bytes and shows them now and then."""
    done = shown = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        if done - shown >= _REPORT_BYTES:
            shown = done
            display.show(label, Progress("", done=done, total=total))

    return advance


def _send(client: Client, request: m.TreeWrite, chunks: Iterable[bytes], total: int | None, display: Display) -> None:
    advance = _meter(display, f"copying to {request.path}", total)
    with client.open(op.VM_WRITE_TREE, request) as stream:
        inbox = _Inbox(stream)
        for chunk in chunks:
            inbox.wait_for_credit(len(chunk))
            stream.send_data(chunk)
            advance(len(chunk))
        stream.send_json({"type": "end"})
        inbox.wait_for_end()


class _Inbox:
    """What the daemon says while it is sent a tree: how much more it takes, and how it ends."""

    def __init__(self, stream: StreamConnection) -> None:
        self._stream = stream
        self._credit = op.STREAM_WINDOW
        self._poller = select.poll()
        self._poller.register(stream, select.POLLIN)
        self._ended = False

    def wait_for_credit(self, size: int) -> None:
        self._credit -= size
        while self._credit < 0 or self._poller.poll(0):
            self._receive()

    def wait_for_end(self) -> None:
        while not self._ended:
            self._receive()

    def _receive(self) -> None:
        for message in self._stream.receive():
            if isinstance(message, bytes):
                continue
            if message.get("event") == "window" and isinstance(granted := message.get("bytes"), int):
                self._credit += granted
            elif (status := exit_status(message)) is not None:
                _check_status(status)
                self._ended = True
        if self._stream.ended and not self._ended:
            raise went_away()


def _received(stream: StreamConnection) -> Iterator[memoryview]:
    """The data of a stream up to its good end."""
    for message in stream.messages():
        if isinstance(message, bytes):
            yield memoryview(message)[1:]
        elif (status := exit_status(message)) is not None:
            _check_status(status)
            return
    raise went_away()


def _check_status(status: int) -> None:
    if status:
        raise BangerError(Code.GUEST, f"the copy failed in the guest with status {status}")


class _Reader:
    """Pieces as a file that is read in whole records."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        gathered: list[memoryview] = []
        while size:
            if not self._rest:
                self._rest = next(self._pieces, memoryview(b""))
                if not self._rest:
                    break
            piece, self._rest = self._rest[:size], self._rest[size:]
            gathered.append(piece)
            size -= len(piece)
        return b"".join(gathered)

    def drain(self) -> None:
        """Take what follows the archive, so that a failure that the daemon reports last is not missed."""
        for _ in self._pieces:
            pass


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[stdio.write(descriptor, data) :]
