"""The per-VM helper that writes the guest's console and its main command's output to size-capped files.

Run as a script with no import of banger, so that it stays small: `recorder.py DIRECTORY CONSOLE_FD LOG_FD`. It outlives
the daemon and ends when the VMM closes both descriptors. `<name>.log` is renamed to `<name>.log.1` at its cap.

console.log holds the bytes as they came. main.log holds records, little-endian: u8 stream (1 stdout, 2 stderr), 3 zero
bytes, u32 length, u64 time in ns since 1970, bytes.
"""

import contextlib
import os
import select
import struct
import sys
import time

CAPS = {"console": 1 << 20, "main": 8 << 20}
RECORD = struct.Struct("<B3xIQ")
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


def main() -> None:
    directory = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    console, log = int(sys.argv[2]), int(sys.argv[3])
    sinks: dict[int, CappedFile | Records] = {
        console: CappedFile(directory, "console"),
        log: Records(CappedFile(directory, "main")),
    }
    poll = select.poll()
    for descriptor in sinks:
        poll.register(descriptor, select.POLLIN)
    while sinks:
        for descriptor, _ in poll.poll():
            try:
                data = os.read(descriptor, 65536)
            except OSError:
                data = b""
            if data:
                sinks[descriptor].write(data)
            else:
                poll.unregister(descriptor)
                del sinks[descriptor]


if __name__ == "__main__":
    main()
