"""A unit of blocking work: external commands, progress, and cancelling from another thread."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.job import Job, Progress
from banger.process import identify


def test_output_and_input_of_a_command() -> None:
    assert Job().run(["cat"], input=b"some\0bytes") == b"some\0bytes"
    assert Job().run(["cat"]) == b""


def test_failure_quotes_the_end_of_stderr() -> None:
    with pytest.raises(BangerError) as caught:
        Job().run(["sh", "-c", "echo one >&2; echo two >&2; echo three >&2; echo four >&2; exit 3"], code=Code.DOWNLOAD)
    assert caught.value.code is Code.DOWNLOAD
    assert caught.value.message == "sh failed with status 3: two / three / four"
    assert caught.value.details["command"].startswith("sh -c ")


def test_missing_tool_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match=r"'tar2sqfs' is not installed .*squashfs-tools-ng") as caught:
        Job().run(["tar2sqfs"], env={"PATH": str(tmp_path)})
    assert caught.value.code is Code.MISSING_TOOL
    with pytest.raises(BangerError, match="'no-such-tool' is not installed"):
        Job().run(["no-such-tool"])


def test_progress_is_reported_until_cancelled() -> None:
    seen: list[Progress] = []
    job = Job(seen.append)
    job.progress("download", "x", 1, 2, "files")
    job.cancel()
    with pytest.raises(BangerError) as caught:
        job.progress("download", "x", 2, 2)
    assert caught.value.code is Code.CANCELLED
    assert seen == [Progress("download", "x", 1, 2, "files")]


def test_cancel_kills_the_whole_process_group() -> None:
    """The command's own child holds the pipe: only its death too lets `run` return."""
    job = Job()
    reader, writer = os.pipe()
    failures: list[BangerError] = []

    def work() -> None:
        try:
            with job.popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=writer) as child:
                os.close(writer)
                child.wait()
        except BangerError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    with open(reader, "rb") as stream:
        sleeper = int(stream.readline())
        assert identify(sleeper) is not None
        job.cancel()
        thread.join()
        assert stream.read() == b""
    assert [failure.code for failure in failures] == [Code.CANCELLED]


def test_cancel_reaches_what_a_command_left_behind() -> None:
    """The command has ended; what it started still holds its output."""
    job = Job()
    reader, writer = os.pipe()
    failures: list[BangerError] = []

    def work() -> None:
        try:
            job.run(["sh", "-c", f"sleep 1000 & echo $$ >/proc/{os.getpid()}/fd/{writer}"])
        except BangerError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    with open(reader, "rb") as stream:
        command = int(stream.readline())
    os.close(writer)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, command, os.WEXITED | os.WNOWAIT)
    job.cancel()
    thread.join(60)
    assert not thread.is_alive()
    assert [failure.code for failure in failures] == [Code.CANCELLED]


def test_cancelled_job_starts_nothing(tmp_path: Path) -> None:
    job = Job()
    job.cancel()
    with pytest.raises(BangerError):
        job.run(["touch", tmp_path / "file"])
    assert not (tmp_path / "file").exists()


def test_leaving_the_block_ends_the_command() -> None:
    with pytest.raises(ValueError, match="changed my mind"), Job().popen(["sleep", "1000"]) as child:
        raise ValueError("changed my mind")
    assert child.returncode == -signal.SIGKILL


def test_cancel_spares_a_command_that_was_waited_for() -> None:
    """Its number may belong to another process group: here the same number lives on in a child of the command."""
    job = Job()
    with contextlib.suppress(BangerError), job.popen(["sh", "-c", "sleep 1000 >/dev/null & echo $!"]) as child:
        assert child.stdout is not None
        sleeper = int(child.stdout.readline())
        child.wait()
        job.cancel()
    try:
        assert identify(sleeper) is not None
    finally:
        os.kill(sleeper, signal.SIGKILL)


def test_command_has_a_session_of_its_own() -> None:
    script = "import os; print(os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid())"
    assert Job().run([sys.executable, "-c", script]) == b"True True\n"


def test_many_commands_leave_no_descriptors() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    for _ in range(5):
        Job().run(["true"])
        with Job().popen(["cat"], stdin=subprocess.PIPE):
            pass
    assert set(Path("/proc/self/fd").iterdir()) == before
