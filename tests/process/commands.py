"""The banger command against a server of a test's own, with pipes or on a terminal."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE

from tests.process.api_server import ApiServer

BANGER = (sys.executable, "-m", "banger.cli")
TIMEOUT = 60.0  # seconds that nothing here takes; only a hang does


class Banger:
    """Runs banger commands against one server."""

    def __init__(self, directory: Path, server: ApiServer) -> None:
        self.server = server
        self.environment = {
            **os.environ,
            "HOME": str(directory),
            **{f"XDG_{name}_HOME": str(directory / name) for name in ("CONFIG", "STATE", "CACHE")},
            "XDG_RUNTIME_DIR": str(directory),
            "TERM": "xterm",
            "GIVEN": "given",
        }

    def popen(
        self,
        arguments: Sequence[str],
        stdin: int = PIPE,
        stdout: int = PIPE,
        stderr: int = PIPE,
        program: Sequence[str] = BANGER,
    ) -> "subprocess.Popen[bytes]":
        command = [*program, *arguments]
        return subprocess.Popen(command, env=self.environment, stdin=stdin, stdout=stdout, stderr=stderr)

    def __call__(self, *arguments: str, input: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        with self.popen(arguments) as process:
            out, err = process.communicate(input, TIMEOUT)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


class Screen:
    """A terminal with a banger command on it, or another program in its environment."""

    def __init__(self, banger: Banger, arguments: Sequence[str], program: Sequence[str] = BANGER) -> None:
        self.terminal, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = banger.popen(arguments, stdin=slave, stdout=slave, stderr=slave, program=program)
        self.seen = b""

    def expect(self, text: bytes) -> bytes:
        """Read until the text has come; drops it, and returns what was before it."""
        while text not in self.seen:
            assert select.select([self.terminal], [], [], TIMEOUT)[0], f"only {self.seen!r} came"
            self.seen += os.read(self.terminal, 65536)
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.terminal)
