"""`banger vm run`: transparent to pipes, statuses and signals, and nothing is left behind."""

import hashlib
import io
import os
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.vm.host import Host


def test_a_command_runs_and_its_vm_is_gone(host: Host) -> None:
    done = host.run("vm", "run", "--rm", "--timings", "--", "uname", "-sr")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"Linux 6.1.")
    assert b"boot" in done.stderr
    assert b"create" in done.stderr
    assert host.names() == []
    assert host.directories() == []
    assert host.daemon.nothing_runs()


def test_the_status_is_the_commands_own(guest: str, host: Host) -> None:
    for script, status in (("exit 7", 7), ("kill -TERM $$", 128 + 15), ("kill -SEGV $$", 128 + 11)):
        assert host.run("vm", "exec", guest, "--", "sh", "-c", script).returncode == status
    assert host.run("vm", "run", "--rm", "--", "sh", "-c", "exit 9").returncode == 9


def test_a_command_that_is_not_there_or_no_program(host: Host, guest: str) -> None:
    error = host.fails(127, "vm", "exec", guest, "--", "no-such-command")
    assert "no-such-command" in error
    error = host.fails(126, "vm", "exec", guest, "--", "/etc/passwd")
    assert "/etc/passwd" in error
    error = host.fails(127, "vm", "run", "--rm", "--", "no-such-command")
    assert "no-such-command" in error
    assert "is kept" not in error
    assert host.names() == [guest]


@pytest.mark.parametrize(
    ("how", "command", "status"), [((), ("no-such-command",), 127), (("-d",), ("/etc/passwd",), 126)]
)
def test_a_vm_whose_command_cannot_be_run_is_kept(
    host: Host, how: tuple[str, ...], command: tuple[str, ...], status: int
) -> None:
    error = host.fails(status, "vm", "run", "--name", "wrong", *how, "--", *command)
    first, *_, last = error.splitlines()
    vm = host.vm("wrong")
    assert (vm.state, f"error: {vm.reason}") == ("stopped", first)
    assert first.startswith(f"error: cannot run '{command[0]}' in 'wrong': ")
    assert last == "the VM wrong is kept: see 'banger vm show wrong', remove it with 'banger vm rm wrong'"
    assert vm.reason in host.ok("vm", "show", "wrong")
    host.ok("vm", "logs", "--console", "wrong")
    host.ok("vm", "rm", "wrong")


def test_a_vm_that_is_stopped_while_vm_run_starts_it_is_kept(host: Host) -> None:
    run = host.spawn("vm", "run", "-d", "--name", "halted", "--", "sleep", "1000")
    host.wait_there("halted")
    host.hold_start("halted")
    host.ok("vm", "stop", "halted")
    assert b"the start of 'halted' was cancelled" in run.communicate(timeout=60)[1]
    assert run.returncode == 125
    assert host.vm("halted").state == "stopped"
    host.ok("vm", "rm", "halted")


def test_streams_are_binary_and_separate(host: Host, guest: str) -> None:
    data = os.urandom(3_000_001)
    done = host.run("vm", "exec", guest, "--", "sh", "-c", "tee /dev/stderr | cat", input=data)
    assert done.returncode == 0
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    assert hashlib.sha256(done.stderr).digest() == hashlib.sha256(data).digest()


def test_tar_through_a_throwaway_vm(host: Host, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/big").write_bytes(os.urandom(8 << 20))
    (tmp_path / "dir/small").write_text("small")
    packed = subprocess.run(["tar", "c", "-C", tmp_path, "dir"], stdout=subprocess.PIPE, check=True).stdout
    listing = host.ok("vm", "run", "--rm", "--", "tar", "t", input=packed)
    assert sorted(listing.split()) == ["dir/", "dir/big", "dir/small"]
    done = host.run("vm", "run", "--rm", "--", "sh", "-c", "tar x -C /tmp && tar c -C /tmp dir", input=packed)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        member = archive.extractfile("dir/big")
        assert member is not None
        assert member.read() == (tmp_path / "dir/big").read_bytes()


def test_a_reader_that_stops_early_ends_the_command(host: Host, guest: str) -> None:
    process = host.spawn("vm", "exec", guest, "--", "yes")
    assert process.stdout is not None
    assert process.stdout.read(1000) == b"y\n" * 500
    process.stdout.close()
    assert process.wait(60) != 0
    process.communicate()


def test_environment_directory_and_user(host: Host) -> None:
    done = host.ok(
        "vm", "run", "--rm", "-e", "GREETING=hello world", "--workdir", "/usr", "--user", "nobody",
        "--", "sh", "-c", 'echo "$GREETING"; pwd; id -un; echo $HOME',
    )  # fmt: skip
    assert done.splitlines() == ["hello world", "/usr", "nobody", "/nonexistent"]


def test_signals_reach_the_command(host: Host, guest: str) -> None:
    script = "trap 'echo got it; exit 5' INT; echo ready; while :; do sleep 0.1; done"
    process = host.spawn("vm", "exec", guest, "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out == b"got it\n"
    assert process.returncode == 5


def test_a_client_that_dies_takes_its_throwaway_vm_along(host: Host) -> None:
    process = host.spawn("vm", "run", "--rm", "--name", "doomed", "--", "sh", "-c", "echo up; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.kill()
    process.communicate()
    host.wait_gone("doomed")
    assert all("doomed" not in path.name for path in host.directories())


def test_ctrl_c_while_it_boots_leaves_nothing(host: Host) -> None:
    process = host.spawn("vm", "run", "--name", "interrupted", "--", "sleep", "1000")
    host.wait_there("interrupted")
    host.hold_start("interrupted")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    host.wait_gone("interrupted")


def test_a_vm_without_rm_stays_and_its_output_is_logged(host: Host) -> None:
    host.ok("vm", "run", "--name", "stays", "--", "sh", "-c", "echo out; echo err >&2")
    assert host.vm("stays").state == "running"
    # the log comes another way than what the command prints
    host.wait_output("out\n", "vm", "logs", "stays")
    host.wait_for(lambda: host.run("vm", "logs", "stays").stderr == b"err\n")
    host.ok("vm", "rm", "--force", "stays")
    assert "stays" not in host.names()
