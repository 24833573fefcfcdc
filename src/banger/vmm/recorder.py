"""The per-VM helper that writes the guest's console and its main command's output to size-capped files.

Run as a script with no import of banger, so that it stays small: `recorder.py DIRECTORY CONSOLE_FD LOG_FD LISTENER_FD`.
It outlives the daemon and ends when the VMM closes the first two descriptors. `<name>.log` is renamed to `<name>.log.1`
at its cap.

console.log holds the bytes as they came. main.log holds records, little-endian: u8 stream (1 stdout, 2 stderr), 3 zero
bytes, u32 length, u64 time in ns since 1970, bytes.

Whoever connects to LISTENER_FD, a Unix stream socket, gets the console's output from then on, and what they send is
typed on the console.
"""

import contextlib
import os
import select
import struct
import sys
import time

CONSOLE_SOCKET = "console.sock"  # in the directory, where the daemon makes it
CAPS = {"console": 1 << 20, "main": 8 << 20}
RECORD = struct.Struct("<B3xIQ")
UNSENT_LIMIT = 256 << 10  # bytes that wait for one who looks at the console
TYPED_LIMIT = 64 << 10  # bytes that wait for the guest
MOST_VIEWERS = 16
_GUEST_RECORD = struct.Struct("<I")


class CappedFile:
    """Appends to a file and starts a new one at the cap, keeping one old one."""

    def __init__(self, directory: int, name: str) -> None:
        self.directory = directory
        self.name = f"{name}.log"
        self.cap = CAPS[name]
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self.file = os.open(self.name, flags, 0o600, dir_fd=self.directory)
        self.size = os.fstat(self.file).st_size

    def write(self, data: bytes) -> None:
        # a full disk must not stop the guest: what does not fit whole is lost, what comes later may fit again
        try:
            if self.size + len(data) > self.cap and self.size:
                self._rotate()
            if os.write(self.file, data) < len(data):
                os.ftruncate(self.file, self.size)
            else:
                self.size += len(data)
        except OSError:
            return

    def _rotate(self) -> None:
        full = self.file
        with contextlib.suppress(FileNotFoundError):  # renamed already, but then the disk was full
            os.rename(self.name, f"{self.name}.1", src_dir_fd=self.directory, dst_dir_fd=self.directory)
        self._open()
        os.close(full)


class Records:
    """Turns the guest's log stream (u8 stream, u24 length, bytes) into records with a time; the guest is hostile."""

    def __init__(self, output: CappedFile) -> None:
        self.output = output
        self.pending = b""

    def write(self, data: bytes) -> None:
        self.pending += data
        position = 0
        while len(self.pending) - position >= 4:
            head = _GUEST_RECORD.unpack_from(self.pending, position)[0]
            stream, length = head & 0xFF, head >> 8
            if stream not in (1, 2) or length > 65536:
                # out of step: skip a byte until a plausible header comes
                position += 1
                continue
            if len(self.pending) - position - 4 < length:
                break
            text = self.pending[position + 4 : position + 4 + length]
            self.output.write(RECORD.pack(stream, length, time.time_ns()) + text)
            position += 4 + length
        self.pending = self.pending[position:]


class Console:
    """The VMM's end of the serial console, the file of what comes from it, and those who look at it.

    Nobody who looks holds up the guest: what one does not take is kept up to a limit, and beyond that lost to it alone.
    Neither does a guest that reads nothing: what is typed waits up to a limit, and then with those who type it.
    """

    def __init__(self, descriptor: int, listener: int, output: CappedFile) -> None:
        os.set_blocking(descriptor, False)
        os.set_blocking(listener, False)
        self.descriptor = descriptor
        self.listener = listener
        self.output = output
        self.viewers: dict[int, bytearray] = {}  # what each of them has still to take
        self.typed = bytearray()
        self.open = True

    def wanted(self) -> dict[int, int]:
        """The descriptors to wait on, and for what."""
        if not self.open:
            return {}
        reading = select.POLLIN if len(self.typed) < TYPED_LIMIT else 0
        wanted = {viewer: reading | (select.POLLOUT if unsent else 0) for viewer, unsent in self.viewers.items()}
        return wanted | {
            self.listener: select.POLLIN,
            self.descriptor: select.POLLIN | (select.POLLOUT if self.typed else 0),
        }

    def handle(self, descriptor: int, events: int) -> None:
        if descriptor == self.listener:
            self._accept()
        elif descriptor == self.descriptor:
            self._carry(events)
        elif descriptor in self.viewers:  # and has not left in this very turn
            self._serve(descriptor, events)

    def _accept(self) -> None:
        import socket  # half a megabyte that most VMs never need

        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.listener)) as listener:
            viewer = listener.accept()[0].detach()
            if len(self.viewers) == MOST_VIEWERS:
                os.close(viewer)
                return
            os.set_blocking(viewer, False)
            self.viewers[viewer] = bytearray()

    def _carry(self, events: int) -> None:
        if events & select.POLLOUT:
            with contextlib.suppress(OSError):
                del self.typed[: os.write(self.descriptor, self.typed)]
        if events & ~select.POLLOUT:
            data = _read(self.descriptor)
            if not data:
                self._end()
                return
            self.output.write(data)
            for viewer in list(self.viewers):
                unsent = self.viewers[viewer]
                unsent += data[: UNSENT_LIMIT - len(unsent)]
                self._send(viewer)

    def _serve(self, viewer: int, events: int) -> None:
        if events & select.POLLOUT:
            self._send(viewer)
        if events & ~select.POLLOUT and viewer in self.viewers:
            data = _read(viewer) if events & select.POLLIN else b""
            self.typed += data
            if not data:
                self._leave(viewer)

    def _send(self, viewer: int) -> None:
        unsent = self.viewers[viewer]
        try:
            del unsent[: os.write(viewer, unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._leave(viewer)

    def _leave(self, viewer: int) -> None:
        del self.viewers[viewer]
        os.close(viewer)

    def _end(self) -> None:
        self.open = False
        for descriptor in (self.listener, *self.viewers):
            os.close(descriptor)


def _read(descriptor: int) -> bytes:
    """What is there to read; nothing at the end, and at any failure."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def main() -> None:
    directory = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    descriptor, log, listener = map(int, sys.argv[2:5])
    console = Console(descriptor, listener, CappedFile(directory, "console"))
    records: Records | None = Records(CappedFile(directory, "main"))
    while console.open or records is not None:
        poll = select.poll()
        if records is not None:
            poll.register(log, select.POLLIN)
        for waiting, events in console.wanted().items():
            poll.register(waiting, events)
        for ready, events in poll.poll():
            if ready != log:
                console.handle(ready, events)
            elif records is not None and (data := _read(log)):
                records.write(data)
            else:
                records = None


if __name__ == "__main__":
    main()
