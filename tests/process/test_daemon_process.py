"""The daemon as a process: one per user, a private socket, its start, its end and its crash."""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from banger import __version__, system
from banger.api import models as m
from banger.api import operations as op
from banger.api.client import connect
from banger.api.errors import BangerError, Code
from banger.job import Progress
from banger.vmm.detect import detect
from tests.daemons import TIMEOUT, DaemonProcess, running_daemon, socket_activation

NOBODY = 65534


def status(daemon: DaemonProcess) -> m.DaemonStatus:
    return daemon.client.call(op.DAEMON_STATUS, m.Empty())


def test_status_describes_the_daemon(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        said = status(daemon)
        assert (said.pid, said.version, said.vms_running, said.busy) == (daemon.pid, __version__, 0, 0)
        assert said.socket == str(daemon.layout.socket)
        assert said.state_directory == str(daemon.layout.state)
        assert said.log_file == str(daemon.layout.log_file)
        assert said.driver == f"qemu ({detect().name})"
        assert said.driver_reason == detect().reason
        assert 0 < said.uptime < TIMEOUT
        resident = int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        assert abs(said.resident_bytes - resident) < 16 << 20


def test_memory_stays_bounded_over_many_calls(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        for _ in range(50):
            status(daemon)
        before = status(daemon).resident_bytes
        for _ in range(300):
            daemon.client.call(op.VM_LIST, m.Empty())
            with pytest.raises(BangerError):
                daemon.client.call(op.VM_SHOW, m.VmRef("nobody"))
        after = status(daemon).resident_bytes
    assert after - before < 8 << 20
    assert after < 150 << 20


def test_socket_and_state_are_private(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        assert stat.S_IMODE(daemon.layout.socket.stat().st_mode) == 0o600
        for directory in (daemon.layout.runtime, daemon.layout.state):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can try as somebody else")
def test_other_users_are_refused_even_where_the_path_lets_them(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon, system.staging(Path("/tmp"), "peer") as public:
        # the mode of a socket and of its directory is not all that protects it: open both up
        public.chmod(0o755)
        daemon.layout.runtime.chmod(0o711)
        daemon.layout.socket.chmod(0o666)
        for directory in daemon.layout.runtime.parents:
            if directory.is_relative_to(tmp_path):
                directory.chmod(0o755)
        os.link(daemon.layout.socket, public / "sock")
        script = """
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.connect(sys.argv[1])
    try:
        client.sendall(b"GET /v1 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        print(client.recv(1))
    except ConnectionError:
        print(b"")
"""
        command = ["/usr/bin/python3", "-c", script, str(public / "sock")]
        said = subprocess.run(command, user=NOBODY, check=True, capture_output=True, text=True)
        assert said.stdout == "b''\n"
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        assert said.stdout == "b'H'\n"
        assert status(daemon).pid == daemon.pid


def test_second_daemon_is_refused_and_the_first_unharmed(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        second = DaemonProcess(tmp_path, {})
        with pytest.raises(BangerError, match="a daemon already runs on") as caught:
            second.start()
        assert caught.value.code is Code.DAEMON
        assert status(daemon).pid == daemon.pid


def test_stop_by_request(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        assert daemon.client.call(op.DAEMON_STOP, m.Empty()) == m.Empty()
        daemon.wait()
        assert not daemon.layout.socket.exists()
        with pytest.raises(BangerError, match="no daemon answers") as caught:
            status(daemon)
        assert caught.value.code is Code.DAEMON
        daemon.start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stop_by_signal(tmp_path: Path, number: int) -> None:
    with running_daemon(tmp_path) as daemon:
        os.kill(daemon.pid, number)
        daemon.wait()
        assert not daemon.layout.socket.exists()
        assert list(daemon.layout.state.glob("banger.db-*")) == []


def test_starts_after_a_crash_and_sweeps_what_it_left(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.kill()
        assert daemon.layout.socket.exists()
        leftovers = []
        layout = daemon.layout
        places = (
            layout.kernels,
            layout.kernels / "mine",
            layout.images,
            layout.vms,
            layout.cache,
            layout.ssh_key.parent,
        )
        for directory in places:
            leftovers.append(directory / ".staging-half-12345678")
            (leftovers[-1] / "deep").mkdir(parents=True)
            (leftovers[-1] / "deep/rootfs").write_bytes(b"x" * 100)
        daemon.start()
        assert status(daemon).pid == daemon.pid
        assert [path for path in leftovers if path.exists()] == []


def test_bad_configuration_is_told_to_the_starter(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, {})
    daemon.configure("memry = 1\n")
    with pytest.raises(BangerError, match="unknown key 'memry'"):
        daemon.start()
    assert "Traceback" not in daemon.log
    assert not daemon.layout.socket.exists()


def test_newer_database_is_told_to_the_starter(tmp_path: Path) -> None:
    import sqlite3

    daemon = DaemonProcess(tmp_path, {})
    daemon.layout.create()
    connection = sqlite3.connect(daemon.layout.database)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(BangerError, match="written by a newer banger"):
        daemon.start()


def test_doctor_checks_this_host(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        checks = {check.name: check for check in daemon.client.call(op.DAEMON_DOCTOR, m.Empty()).checks}
        assert checks["guest agent"].status == "ok"
        assert str(daemon.layout.state) in checks["state directory"].message


def test_log_can_be_read_and_followed_to_the_end(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        with daemon.layout.log_file.open("a") as log:
            log.write("one\ntwo\nthree\n")
        with daemon.client.open(op.DAEMON_LOGS, m.DaemonLogs(tail=2)) as stream:
            messages = list(stream.messages())
        assert messages == [
            {"event": "started", "result": {}},
            b"\x00two\nthree\n",
            {"event": "exit", "signalled": False, "value": 0},
        ]
        with daemon.client.open(op.DAEMON_LOGS, m.DaemonLogs(follow=True, tail=1)) as stream:
            following = stream.messages()
            assert next(following) == {"event": "started", "result": {}}
            assert next(following) == b"\x00three\n"
            with daemon.layout.log_file.open("a") as log:
                log.write("four\n")
            assert next(following) == b"\x00four\n"
            daemon.stop()
            *_, last = following
        assert isinstance(last, dict)
        assert last["event"] == "error"


def fake_tool(directory: Path, name: str, script: str) -> dict[str, str]:
    """The environment in which a host tool behaves as `script` does."""
    (directory / "tools").mkdir()
    (directory / "tools" / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / "tools" / name).chmod(0o755)
    return {"PATH": f"{directory / 'tools'}:{os.environ['PATH']}"}


def begin_import(daemon: DaemonProcess, source: Path) -> tuple[threading.Thread, list[BangerError], threading.Event]:
    """Import a directory in a thread; the event is set once the work has begun."""
    begun = threading.Event()
    errors: list[BangerError] = []

    def seen(progress: Progress) -> None:
        begun.set()

    def work() -> None:
        try:
            daemon.client.call(op.IMAGE_IMPORT, m.ImageImport("slow", str(source)), seen)
        except BangerError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, errors, begun


def test_stop_ends_work_that_would_take_for_ever(tmp_path: Path) -> None:
    """And its commands and half-built entries with it."""
    (tmp_path / "rootfs").mkdir()
    variables = fake_tool(tmp_path, "tar", "exec sleep 1000")
    with running_daemon(tmp_path, variables=variables) as daemon:
        thread, errors, begun = begin_import(daemon, tmp_path / "rootfs")
        assert begun.wait(TIMEOUT)
        assert status(daemon).busy == 1
        daemon.stop()
        thread.join()
        assert [(error.code, error.message) for error in errors] == [(Code.DAEMON, "the daemon was stopped")]
        assert daemon.processes() == set()
        assert list(daemon.layout.images.iterdir()) == []


def test_every_stream_is_told_that_the_daemon_stops(tmp_path: Path) -> None:
    """However many there are, also by a reply to whoever has asked for it."""
    count = 60
    with running_daemon(tmp_path) as daemon, contextlib.ExitStack() as stack:
        streams = [stack.enter_context(daemon.client.open(op.VM_EVENTS, m.VmEvents())) for _ in range(count)]
        following = [stream.messages() for stream in streams]
        for messages in following:
            assert next(messages) == {"event": "started", "result": {}}
        assert status(daemon).busy == count
        assert daemon.client.call(op.DAEMON_STOP, m.Empty()) == m.Empty()
        for messages in following:
            (last,) = messages
            assert isinstance(last, dict)
            assert isinstance(last["error"], dict)
            assert (last["error"]["code"], last["error"]["message"]) == ("daemon", "the daemon was stopped")
        daemon.wait()


def test_a_client_that_reads_nothing_does_not_keep_the_daemon(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        with open(daemon.layout.log_file, "ab") as log:
            log.write(b"a line\n" * 1_000_000)
        with daemon.client.open(op.DAEMON_LOGS, m.DaemonLogs(follow=True)) as stream:
            assert next(stream.messages()) == {"event": "started", "result": {}}
            daemon.stop()


def test_client_that_leaves_cancels_an_import(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    variables = fake_tool(tmp_path, "tar", "exec sleep 1000")

    def leave(progress: Progress) -> None:
        raise KeyboardInterrupt

    with running_daemon(tmp_path, variables=variables) as daemon:
        with pytest.raises(KeyboardInterrupt):
            daemon.client.call(op.IMAGE_IMPORT, m.ImageImport("slow", str(tmp_path / "rootfs")), leave)
        # it ends by itself: the daemon counts the work until it has cleaned up
        while status(daemon).busy:
            pass
        assert daemon.processes() == set()
        assert list(daemon.layout.images.iterdir()) == []


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not installed")
def test_started_by_systemd(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, {})
    with socket_activation(daemon) as activator:
        said = status(daemon)
        assert said.pid == activator.pid
        daemon.client.call(op.DAEMON_STOP, m.Empty())
        _, errors = activator.communicate(timeout=TIMEOUT)
        assert (activator.returncode, b"Traceback" in errors) == (0, False)
        # the socket is systemd's: the next connection must find it to start the next daemon
        assert daemon.layout.socket.exists()


def test_takes_a_passed_socket(tmp_path: Path) -> None:
    """sd_listen_fds(3), done by hand where systemd's own tool is not installed."""
    daemon = DaemonProcess(tmp_path, {})
    daemon.layout.create()
    daemon.layout.runtime.mkdir(mode=0o700, parents=True)
    listener = system.bind_unix(daemon.layout.socket)
    script = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
        "os.execv(sys.executable, [sys.executable, '-m', 'banger.daemon'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(listener.fileno())],
        env=daemon.environment,
        pass_fds=(listener.fileno(),),
        stderr=subprocess.PIPE,
    )
    try:
        assert status(daemon).pid == process.pid
        process.terminate()
        _, errors = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, b"Traceback" in errors) == (0, False)
        assert daemon.layout.socket.exists()
        connect(daemon.layout.socket).close()
    finally:
        process.kill()
        process.wait()
        listener.close()


def test_garbage_on_the_socket_harms_nobody(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        for garbage in (
            b"",
            b"\0" * 70_000,
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/vm.list HTTP/1.1\r\nContent-Length: 9\r\n",
        ):
            with connect(daemon.layout.socket) as client:
                client.settimeout(TIMEOUT)
                try:
                    client.sendall(garbage)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass
                except ConnectionError:
                    pass
        assert status(daemon).busy == 0


def test_lost_readiness_reader_does_not_matter(tmp_path: Path) -> None:
    """Whoever started the daemon may be gone by the time that it is ready."""
    daemon = DaemonProcess(tmp_path, {})
    daemon.layout.create()
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "banger.daemon"],
        env={**daemon.environment, "BANGER_READY_FD": str(writer)},
        pass_fds=(writer,),
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    try:
        assert process.stderr is not None
        while True:
            assert process.poll() is None
            with contextlib.suppress(BangerError):  # none is there, or it is bound and not listening yet
                assert status(daemon).pid == process.pid
                break
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
