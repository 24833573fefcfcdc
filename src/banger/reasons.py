"""Says why something failed in the words of users, where the error is one of Python or of its libraries."""

from __future__ import annotations

import json
import os

from banger.api.errors import BangerError


def in_words(error: BaseException) -> str:
    """What went wrong, without names of Python's classes, numbers of errors, or advice for programmers."""
    import subprocess  # which the command line need not load to start

    match error:
        case BangerError():
            return error.message
        case json.JSONDecodeError():
            return f"something is wrong at line {error.lineno}, column {error.colno}"
        case UnicodeError():
            return "it is not UTF-8"
        case RecursionError():
            return "it is nested too deeply"
        case KeyError():
            return f"{error.args[0]!r} is missing in it"
        case subprocess.TimeoutExpired():
            return "it did not end in time"
        case subprocess.CalledProcessError():
            return f"it ended with status {error.returncode}"
        case OSError() if error.strerror:
            return error.strerror + ("" if error.filename is None else f": {os.fsdecode(error.filename)}")
        case ValueError() if "integer string conversion" in str(error):  # sys.set_int_max_str_digits
            return "a number has too many digits"
        case ValueError() if "null" in str(error):  # of system calls with a path
            return "a NUL character cannot be in it"
    return str(error)
