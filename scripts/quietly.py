"""Runs a stage of a long preparation: one line with its time, and what its commands print only when it fails.

Uses the standard library alone, because what it runs first is what installs everything else.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_LOGS = Path(__file__).resolve().parent.parent / "build/log"
_LAST_LINES = 20


def quietly(label: str, *commands: Sequence[str | Path]) -> int:
    """Run commands one after the other, also after one that fails; returns the exit status of the last.

    All they print goes to `build/log/<label>.log`. Standard error gets the label and the seconds, or the last lines of
    the log and its path when the last command fails.
    """
    _LOGS.mkdir(parents=True, exist_ok=True)
    log = _LOGS / f"{label.replace(' ', '-')}.log"
    begin = time.monotonic()
    status = 0
    with open(log, "wb") as output:
        for command in commands:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            status = done.returncode
    # in one write each, since other stages may be under way
    if status == 0:
        sys.stderr.write(f"  {label:<24} {time.monotonic() - begin:5.1f} s\n")
    else:
        last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        shown = "".join(f"    {line}\n" for line in last)
        sys.stderr.write(f"  {label} failed with status {status}; the end of {log}:\n{shown}")
    return status


if __name__ == "__main__":
    try:
        sys.exit(quietly(sys.argv[1], sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
