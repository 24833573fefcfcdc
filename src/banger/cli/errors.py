"""How failures reach the user: one line, a hint, and the exit status of the design."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from types import TracebackType

import click

from banger.api.errors import BangerError, Code
from banger.cli.render import note, plain

TIMED_OUT = 124  # as timeout(1)
FAILED, USAGE, GUEST_FAILED, CANNOT_EXECUTE, NOT_FOUND, INTERRUPTED = 1, 2, 125, 126, 127, 130


class UsageFault(click.UsageError):
    """Wrong usage with a hint of its own."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def report(message: str, hint: str = "") -> None:
    """Print an error and what to do about it on standard error."""
    print(f"error: {plain(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {plain(hint)}", file=sys.stderr)


def report_failure(error: BangerError) -> None:
    """Print what an operation failed with, the last lines of console or log that came along, and which VM it left."""
    report(error.message, error.hint)
    for line in (error.details.get("console") or error.details.get("log", "")).splitlines():
        print(f"  | {plain(line)}", file=sys.stderr)
    if name := error.details.get("kept"):
        note(f"the VM {name} is kept: see 'banger vm show {name}', remove it with 'banger vm rm {name}'")


def report_usage(error: click.UsageError) -> None:
    """Print a usage error in the same form as all others."""
    message = error.format_message().rstrip(".")
    hint = getattr(error, "hint", "")
    if isinstance(error, click.NoSuchOption):
        message = f"there is no option {error.option_name}"
        hint = _option_instead(error)
    if isinstance(error, click.MissingParameter) and isinstance(getattr(error.param, "type", None), click.Choice):
        message = message.partition(". Choose from")[0]  # a list with line ends of its own; the name has them already
    message = re.sub(r"is not a valid (integer|float)( range)?$", r"is not a number", message)
    if not hint and error.ctx is not None:
        hint = f"see '{error.ctx.command_path} --help'"
    if not message[1:2].isupper():  # the name of an argument stays as the help shows it
        message = message[:1].lower() + message[1:]
    report(message, hint)


def _option_instead(error: click.NoSuchOption) -> str:
    """What the user of an option that there is not may have meant, '' when nobody can tell."""
    from banger.cli.vocabulary import option_hint

    if error.ctx is not None:
        known = [name for parameter in error.ctx.command.get_params(error.ctx) for name in parameter.opts]
        if hint := option_hint(error.ctx.command.name or "", known, error.option_name):
            return hint
    return f"did you mean {' or '.join(sorted(error.possibilities))}?" if error.possibilities else ""


@contextlib.contextmanager
def around_guest_command() -> Iterator[None]:
    """Give banger's own failures the statuses that a guest command's cannot be mistaken for."""
    try:
        yield
    except BangerError as error:
        report_failure(error)
        statuses = {
            Code.CANNOT_EXECUTE: CANNOT_EXECUTE,
            Code.COMMAND_NOT_FOUND: NOT_FOUND,
            Code.TIMED_OUT: TIMED_OUT,
        }
        raise SystemExit(statuses.get(error.code, GUEST_FAILED)) from error
    except BrokenPipeError:
        raise
    except Exception as error:  # the outermost frame: a bug must not end with a status of the guest's command
        report_bug(type(error), error, error.__traceback__)
        raise SystemExit(GUEST_FAILED) from error


def report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook: one line for what nobody expected, with the traceback only when debugging."""
    if os.environ.get("BANGER_LOG_LEVEL", "").lower() == "debug":
        sys.__excepthook__(kind, error, trace)
    from banger.reasons import in_words

    hint = "set BANGER_LOG_LEVEL=debug to see where it happened"
    if not isinstance(error, OSError) or not error.strerror:
        report(f"banger has a bug: {kind.__name__}: {error}", hint)
    elif isinstance(error.filename, str):  # a path of the user's, mostly
        report(f"the system refuses {error.filename!r}: {error.strerror}")
    else:  # a full disk under our output, say
        report(f"the system refused: {in_words(error)}", hint)
