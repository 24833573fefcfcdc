"""Runs an interactive stream: terminal or pipes on one side, the daemon's WebSocket on the other, one poll loop."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import termios
from collections import deque
from collections.abc import Callable, Iterator

from banger import stdio
from banger.api import models as m
from banger.api import operations as op
from banger.api.client import StreamConnection
from banger.api.codec import Json, decode, decode_error
from banger.api.errors import BangerError, Code
from banger.cli.errors import INTERRUPTED
from banger.job import Progress
from banger.stdio import STDERR, STDIN, STDOUT

CHUNK = 64_000  # bytes of input in one message
_FORWARDED = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
# a command that ignores two interrupts gets no third: the user wants to leave
_INTERRUPTS = 2
# terminal attributes, termios(3)
_INPUT, _OUTPUT, _CONTROL, _LOCAL, _CHARACTERS = 0, 1, 2, 3, 6


def terminal_size() -> m.Terminal:
    """The size of the terminal on standard output or input, 24x80 when neither knows it."""
    for descriptor in (STDOUT, STDIN):
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(descriptor)
            if size.lines and size.columns:
                return m.Terminal(rows=size.lines, columns=size.columns)
    return m.Terminal(rows=24, columns=80)


def terminal_env() -> list[str]:
    """What a program on the user's terminal needs to know about it."""
    return [f"{name}={os.environ[name]}" for name in ("TERM", "COLORTERM", "LANG") if os.environ.get(name)]


def stdin_is_terminal() -> bool:
    """Whether standard input is a terminal; a closed one is none."""
    return os.isatty(STDIN)


def on_terminal() -> bool:
    """Whether a person sits at both ends."""
    return stdin_is_terminal() and os.isatty(STDOUT)


def wait_started(stream: StreamConnection, progress: Callable[[Progress], None]) -> Json:
    """Wait for the started event of a detached command or a transfer and return its result."""
    for message in stream.messages():
        if isinstance(message, dict):
            match message.get("event"):
                case "progress":
                    progress(decode(Progress, message))
                case "started":
                    return message.get("result")
                case "error":
                    raise decode_error(message.get("error"))
    raise went_away()


def copy_output(stream: StreamConnection) -> int:
    """Write the output of a stream without input, such as a log, and return its exit status."""
    for message in stream.messages():
        if isinstance(message, bytes):
            target, view = _addressed(message)
            while view:
                view = view[stdio.write(target, view) :]
        elif (status := exit_status(message)) is not None:
            return status
    raise went_away()


def exit_status(event: dict[str, Json]) -> int | None:
    """The status in an exit event (128+n for signal n), None for other events; raises the error of an error event."""
    if event.get("event") == "error":
        raise decode_error(event.get("error"))
    value = event.get("value")
    if event.get("event") != "exit" or not isinstance(value, int):
        return None
    return 128 + value if event.get("signalled") else value


def went_away() -> BangerError:
    """The error for a stream that ended without its last message."""
    return BangerError(Code.DAEMON, "the daemon went away", hint="look at 'banger daemon logs'")


class Session:
    """An attached command. `terminal`: it has a pseudo-terminal, and ours becomes raw if we have one.

    `leaving` is the character that ends the session (then `left` is true) instead of being sent, when it is typed on
    our terminal; b"" for none. With None signals go to the command, and else they end the session.
    """

    def __init__(
        self,
        stream: StreamConnection,
        terminal: bool,
        progress: Callable[[Progress], None],
        started: Callable[[Json], None] = lambda result: None,
        leaving: bytes | None = None,
    ) -> None:
        self._stream = stream
        self._terminal = terminal
        self._raw = terminal and stdin_is_terminal()
        self._progress = progress
        self._on_started = started
        self._started = False
        self._status: int | None = None
        self._credit = op.STREAM_WINDOW
        self._interrupts = 0
        self._leaving = leaving
        self.left = False
        self._mid_line = False
        # without a pseudo-terminal, our terminal is not the command's input
        self._input_open = self._raw or not stdin_is_terminal()
        self._output: deque[tuple[int, memoryview]] = deque()
        self._whole_writes = {target for target in (STDOUT, STDERR) if _never_blocks(target)}

    def run(self) -> int:
        """Carry input, output, signals and sizes until the command ends; its exit status.

        Leaving in any other way closes the stream, which hangs up on the command.
        """
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._stream.close)
            cleanup.push(self._break_line)  # when the terminal is as it was
            wake: int | None = None
            while self._status is None or self._output:
                if self._started and wake is None:
                    wake = cleanup.enter_context(_caught_signals((*_FORWARDED, signal.SIGWINCH, signal.SIGCONT)))
                    if self._raw:
                        cleanup.enter_context(_raw_terminal())
                    self._begin()
                self._turn(wake)
        return self._status

    def _break_line(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Let the error that ends a session on our terminal begin on a line of its own."""
        if isinstance(error, BangerError):
            self._drain()
            if self._raw and self._mid_line:
                stdio.write(STDERR, b"\n")

    def _begin(self) -> None:
        if self._terminal:
            self._send_size()
        if not self._input_open:
            self._stream.send_json({"type": "end"})

    def _turn(self, wake: int | None) -> None:
        poller = select.poll()
        if wake is not None:
            poller.register(wake, select.POLLIN)
        # nothing is taken from the daemon before this is written
        wanted = 0 if self._output else select.POLLIN
        if self._output:
            poller.register(self._output[0][0], select.POLLOUT)
        if self._stream.unsent:
            wanted |= select.POLLOUT
        if wanted:
            poller.register(self._stream, wanted)
        if self._started and self._input_open and self._credit > 0 and self._status is None:
            poller.register(STDIN, select.POLLIN)
        for descriptor, events in poller.poll():
            if descriptor == wake:
                for number in os.read(wake, 64):
                    self._handle_signal(number)
            elif descriptor == self._stream.fileno():
                self._stream.flush()
                if wanted & select.POLLIN and events & ~select.POLLOUT:
                    self._receive()
            elif descriptor == STDIN:
                self._send_input()
            else:
                self._write()

    def _receive(self) -> None:
        for message in self._stream.receive():
            if isinstance(message, bytes):
                if len(message) > 1:
                    self._output.append(_addressed(message))
                continue
            match message.get("event"):
                case "progress":
                    self._progress(decode(Progress, message))
                case "started":
                    self._started = True
                    self._on_started(message.get("result"))
                case "window" if isinstance(granted := message.get("bytes"), int):
                    self._credit += granted
                case _:
                    status = exit_status(message)
                    self._status = self._status if status is None else status
        if self._stream.ended and self._status is None:
            self._drain()
            raise went_away()

    def _drain(self) -> None:
        while self._output:
            self._write()

    def _write(self) -> None:
        target, view = self._output.popleft()
        # a pipe that polls writable takes PIPE_BUF bytes without blocking, pipe(7)
        written = stdio.write(target, view if target in self._whole_writes else view[: select.PIPE_BUF])
        self._mid_line = view[written - 1] != ord("\n")
        if written < len(view):
            self._output.appendleft((target, view[written:]))

    def _send_input(self) -> None:
        data = stdio.read(min(CHUNK, self._credit))
        if self._raw and self._leaving and self._leaving in data:
            data = data.partition(self._leaving)[0]
            self.left = True
            self._status = 0
        if data:
            self._credit -= len(data)
            self._stream.send_data(data)
        elif not self.left:
            self._input_open = False
            self._stream.send_json({"type": "end"})

    def _handle_signal(self, number: int) -> None:
        match number:
            case signal.SIGWINCH | signal.SIGCONT:
                if self._raw and number == signal.SIGCONT:
                    _make_raw(termios.TCSANOW)  # the shell that stopped us has its own settings
                if self._terminal:
                    self._send_size()
            case signal.SIGTERM | signal.SIGHUP if self._raw:
                raise SystemExit(128 + number)
            case _ if self._leaving is not None:
                raise SystemExit(128 + number)
            case signal.SIGINT if self._interrupts == _INTERRUPTS:
                raise SystemExit(INTERRUPTED)
            case _:
                self._interrupts += number == signal.SIGINT
                self._stream.send_json({"type": "signal", "number": number})

    def _send_size(self) -> None:
        size = terminal_size()
        self._stream.send_json({"type": "resize", "rows": size.rows, "columns": size.columns})


def _addressed(message: bytes) -> tuple[int, memoryview]:
    return (STDERR if message[0] == op.STDERR else STDOUT), memoryview(message)[1:]


def _never_blocks(descriptor: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return False


@contextlib.contextmanager
def _caught_signals(numbers: tuple[signal.Signals, ...]) -> Iterator[int]:
    """A descriptor from which the numbers of these signals are read while the block runs."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    previous_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # what the caller ignores (nohup, a background job) stays ignored
    caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda number, frame: None) for number in caught}
    try:
        yield reader
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_wakeup)
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    saved = termios.tcgetattr(STDIN)
    try:
        _make_raw(termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(STDIN, termios.TCSADRAIN, saved)


def _make_raw(when: int) -> None:
    """cfmakeraw(3)."""
    mode = termios.tcgetattr(STDIN)
    mode[_INPUT] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    mode[_OUTPUT] &= ~termios.OPOST
    mode[_LOCAL] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    mode[_CONTROL] = mode[_CONTROL] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    mode[_CHARACTERS][termios.VMIN], mode[_CHARACTERS][termios.VTIME] = 1, 0
    termios.tcsetattr(STDIN, when, mode)
