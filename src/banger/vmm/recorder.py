"""The per-VM helper that writes the guest's console and its main command's output to size-capped files.

Run as a script with no import of banger, so that it stays small: `recorder.py DIRECTORY CONSOLE_FD LOG_FD LISTENER_FD
[NAME=FD]...`. It outlives the daemon and ends when the VMM closes the first two descriptors. `<name>.log` is renamed to
`<name>.log.1` at its cap.

console.log holds the bytes as they came. main.log holds records, little-endian: u8 stream (1 stdout, 2 stderr), 3 zero
bytes, u32 length, u64 time in ns since 1970, bytes.

Whoever connects to LISTENER_FD, a Unix stream socket, gets the console's output from then on, and what they send is
typed on the console.

A VMM whose guest connects to the host by itself has a listening socket `main=FD` in place of LOG_FD, which is -1 then.
`typed=FD`: where what is typed goes, when CONSOLE_FD is a pipe. `vmm=FD`, `metrics=FD`: pipes with the VMM's own
messages and metrics, for vmm.log and metrics.log.
"""

import contextlib
import os
import select
import struct
import sys
import time

CONSOLE_SOCKET = "console.sock"  # in the directory, where the daemon makes it
CAPS = {"console": 1 << 20, "main": 8 << 20, "vmm": 1 << 20, "metrics": 1 << 20}
RECORD = struct.Struct("<B3xIQ")
MOST_BYTES = 65536  # of one record
UNSENT_LIMIT = 256 << 10  # bytes that wait for one who looks at the console
TYPED_LIMIT = 64 << 10  # bytes that wait for the guest
MOST_VIEWERS = 16
MOST_GUESTS = 4  # connections for the main command's output: one, and those that it replaces
_GUEST_RECORD = struct.Struct("<I")


class CappedFile:
    """Appends to a file and starts a new one at the cap, keeping one old one."""

    def __init__(self, directory: int, name: str, cap: int) -> None:
        self.directory = directory
        self.name = f"{name}.log"
        self.cap = cap
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
            if stream not in (1, 2) or length > MOST_BYTES:
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

    def __init__(self, descriptor: int, listener: int, output: CappedFile, keyboard: int) -> None:
        for end in (descriptor, listener, keyboard):
            os.set_blocking(end, False)
        self.descriptor = descriptor
        self.keyboard = keyboard  # the descriptor itself, or another
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
        wanted |= {self.listener: select.POLLIN, self.descriptor: select.POLLIN}
        if self.typed:
            wanted[self.keyboard] = wanted.get(self.keyboard, 0) | select.POLLOUT
        return wanted

    def handle(self, descriptor: int, events: int) -> None:
        if descriptor == self.listener:
            self._accept()
        elif descriptor in (self.descriptor, self.keyboard):
            self._carry(descriptor, events)
        elif descriptor in self.viewers:  # and has not left in this very turn
            self._serve(descriptor, events)

    def _accept(self) -> None:
        if (viewer := _accept(self.listener)) is None:
            return
        if len(self.viewers) == MOST_VIEWERS:
            os.close(viewer)
        else:
            self.viewers[viewer] = bytearray()

    def _carry(self, descriptor: int, events: int) -> None:
        if descriptor == self.keyboard and self.typed:
            try:
                del self.typed[: os.write(self.keyboard, self.typed)]
            except BlockingIOError:
                pass
            except OSError:  # the VMM listens no more: what is typed is lost
                self.typed.clear()
        if descriptor == self.descriptor and events & ~select.POLLOUT:
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


class GuestLog:
    """The listening socket to which the guest connects with the output of its main command, and its connections."""

    def __init__(self, listener: int, output: CappedFile) -> None:
        os.set_blocking(listener, False)
        self.listener = listener
        self.output = output
        self.guests: dict[int, Records] = {}

    def accept(self) -> None:
        if (guest := _accept(self.listener)) is None:
            return
        if len(self.guests) == MOST_GUESTS:
            os.close(guest)
        else:
            self.guests[guest] = Records(self.output)

    def read(self, guest: int) -> bool:
        """Take what has come; False when there is nothing."""
        if data := _read(guest):
            self.guests[guest].write(data)
            return True
        del self.guests[guest]
        os.close(guest)
        return False


class Recorder:
    """All that one VM's recorder reads, by descriptor."""

    def __init__(self, directory: int, console: Console, log: int, others: dict[str, int]) -> None:
        self.console = console
        main_output = CappedFile(directory, "main", CAPS["main"])
        self.log = log
        self.records: Records | None = Records(main_output) if log >= 0 else None
        self.guest_log = GuestLog(others["main"], main_output) if "main" in others else None
        names = [name for name in ("vmm", "metrics") if name in others]
        self.files = {others[name]: CappedFile(directory, name, CAPS[name]) for name in names}
        for descriptor in self.files:
            os.set_blocking(descriptor, False)

    def run(self) -> None:
        """Record until the VMM is gone, and then what it has left in the pipes."""
        while self.console.open or self.records is not None:
            poll = select.poll()
            for descriptor in self._inputs():
                poll.register(descriptor, select.POLLIN)
            for descriptor, wanted in self.console.wanted().items():
                poll.register(descriptor, wanted)
            for descriptor, events in poll.poll():
                self._handle(descriptor, events)
        if self.guest_log is not None:
            self.guest_log.accept()
        for descriptor in self._inputs():
            while self._take(descriptor):
                pass

    def _inputs(self) -> list[int]:
        log = [self.log] if self.records is not None else []
        guests = [self.guest_log.listener, *self.guest_log.guests] if self.guest_log is not None else []
        return [*log, *guests, *self.files]

    def _handle(self, descriptor: int, events: int) -> None:
        if descriptor in self.console.wanted():
            self.console.handle(descriptor, events)
        elif self.guest_log is not None and descriptor == self.guest_log.listener:
            self.guest_log.accept()
        else:
            self._take(descriptor)

    def _take(self, descriptor: int) -> bool:
        """Write down what has come; False when there is nothing, nor ever will be."""
        data = b""
        if self.guest_log is not None and descriptor in self.guest_log.guests:
            return self.guest_log.read(descriptor)
        if descriptor in self.files:
            if data := _read(descriptor):
                self.files[descriptor].write(data)
            else:
                del self.files[descriptor]
        elif descriptor == self.log and self.records is not None:
            if data := _read(descriptor):
                self.records.write(data)
            else:
                self.records = None
        return bool(data)


def _accept(listener: int) -> int | None:
    """Who connects, not blocking; None when nobody does any more."""
    import socket  # half a megabyte that most VMs never need

    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(listener)) as listening:
        descriptor = listening.accept()[0].detach()
        os.set_blocking(descriptor, False)
        return descriptor
    return None


def _read(descriptor: int) -> bytes:
    """What is there to read; nothing at the end, and at any failure."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def main() -> None:
    directory = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    descriptor, log, listener = map(int, sys.argv[2:5])
    others = {name: int(number) for name, _, number in (word.partition("=") for word in sys.argv[5:])}
    keyboard = others.get("typed", descriptor)
    console = Console(descriptor, listener, CappedFile(directory, "console", CAPS["console"]), keyboard)
    Recorder(directory, console, log, others).run()


if __name__ == "__main__":
    main()
