"""Standard streams that are closed, full, or read by nobody: one clear line, nothing lost, nothing hung."""

import subprocess
import sys

import pytest

from tests.vm.host import Host

TIMEOUT = 120  # seconds
NO_OUTPUT = "error: cannot write to standard output: Bad file descriptor\n"
EMPTY = (
    "error: the guest broke off: the tar stream ends before its first member\n"
    "hint: look at the guest's console for what it says about this\n"
)
FULL = "error: cannot write to standard output: No space left on device\n"

# what a shell runs, its status, what it prints, and what on standard error
ROWS: list[tuple[str, int, str, str]] = [
    ("banger vm list -q 2>&-", 0, "guest\n", ""),
    ("banger vm list -q <&-", 0, "guest\n", ""),
    ("banger vm list -q <&- 2>&-", 0, "guest\n", ""),
    ("banger vm list -q >&-", 1, "", NO_OUTPUT),
    ("banger vm list --json >&-", 1, "", NO_OUTPUT),
    ("banger vm list -q >/dev/full", 1, "", FULL),
    ("banger vm list -q 2>/dev/full", 0, "guest\n", ""),
    ("banger vm list -q <&- >&- 2>&-", 1, "", ""),
    ("banger vm show nobody 2>&-", 1, "", ""),
    ("banger vm show nobody 2>/dev/full", 1, "", ""),
    ("banger vm nonsense 2>&-", 2, "", ""),
    ("banger --help >/dev/full", 1, "", FULL),
    ("banger version >&-", 1, "", NO_OUTPUT),
    ("banger completion bash >&-", 1, "", NO_OUTPUT),
    ("set -o pipefail; banger vm inspect guest | true", 141, "", ""),
    ("banger vm inspect guest 2>&1 | head -1", 0, "[\n", ""),
    ("banger daemon logs >&-", 1, "", NO_OUTPUT),
    ("banger vm logs guest >&-", 0, "", ""),  # it has printed nothing
    ("banger vm exec guest -- cat <&-", 0, "", ""),
    ("banger vm exec guest -- cat <&- 2>&-", 0, "", ""),
    ("banger vm exec guest -- cat <&- >&- 2>&-", 0, "", ""),
    ("banger vm exec guest -- cat </dev/null", 0, "", ""),
    ("banger vm exec guest -- echo x >&-", 125, "", NO_OUTPUT),
    ("banger vm exec guest -- echo x >/dev/full", 125, "", FULL),
    ("banger vm exec guest -- true >&-", 0, "", ""),
    ("banger vm exec guest -- sh -c 'echo x; exit 3' 2>&-", 3, "x\n", ""),
    ("banger vm exec guest -- sh -c 'echo x >&2' 2>/dev/full", 125, "", ""),
    ("set -o pipefail; banger vm exec guest -- yes | head -1", 141, "y\n", ""),
    ("banger vm exec guest -- sh -c 'ls /proc/self/fd | wc -l' <&- 2>&-", 0, "4\n", ""),
    ("banger vm exec guest -- test -t 0 <&-", 1, "", ""),
    ("banger vm exec -t guest -- sh -c 'test -t 0 && echo yes' <&-", 0, "yes\n", ""),
    ("banger vm exec -t guest -- echo x >&- <&-", 125, "", NO_OUTPUT),
    ("banger vm cp guest:/etc/hostname - >&-", 1, "", NO_OUTPUT),
    ("banger vm cp guest:/etc/hostname - >/dev/full", 1, "", FULL),
    ("banger vm cp guest:/etc/hostname - | tar x -O", 0, "guest\n", ""),
    ("banger vm cp - guest:/tmp <&-", 1, "", EMPTY),
    ("banger vm run --name talks -- echo x >/dev/null", 0, "", ""),
    ("banger vm logs talks >&-", 1, "", NO_OUTPUT),
    ("banger vm logs talks >/dev/full", 1, "", FULL),
    ("set -o pipefail; banger vm logs talks | true", 141, "", ""),
    ("banger vm rm -f talks <&- >/dev/null", 0, "", ""),
    ("banger vm run --rm -- echo x >&-", 125, "", NO_OUTPUT),
    ("banger vm run --rm -- cat <&-", 0, "", ""),
    ("banger vm list -q", 0, "guest\n", ""),  # nothing of all this has left a VM
]


def shell(host: Host, line: str) -> tuple[int, str, str]:
    """Run a line in a shell to which the installation under test is `banger`."""
    script = f'banger() {{ "{sys.executable}" -m banger.cli "$@"; }}; {line}'
    done = subprocess.run(
        ["bash", "-c", script], env=host.daemon.environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("line", "status", "output", "error"), ROWS, ids=[row[0] for row in ROWS])
def test_streams(host: Host, guest: str, line: str, status: int, output: str, error: str) -> None:
    assert shell(host, line) == (status, output, error)


def test_a_daemon_that_is_started_without_streams_is_like_any_other(host: Host) -> None:
    host.daemon.stop()
    assert shell(host, "banger vm list -q <&- >&- 2>&-")[0] == 1
    assert shell(host, "banger vm exec guest -- echo x") == (0, "x\n", "")
    assert shell(host, "banger daemon stop")[0] == 0
    host.daemon.start()
