"""Carrying a client's stream to a real agent and back, without a VM in between."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client, Message
from banger.api.errors import BangerError, Code
from banger.daemon.streams import ClientGone, Peer, carry, finish
from banger.guest.agent import Agent, ExecRequest, guest_errors
from banger.guest.session import AgentSession
from tests.process.agents import TIMEOUT, AgentProcess
from tests.unit.daemon.served import served

left, stuck = threading.Event(), threading.Event()


@pytest.fixture
def client(process: AgentProcess, tmp_path: Path) -> Iterator[Client]:
    """A server whose vm.exec runs in the agent; it tells users that want to leave that the guest is stuck, if it is."""

    stuck.clear()

    def check() -> None:
        if stuck.is_set():
            raise BangerError(Code.EXHAUSTED, "it is stuck")

    async def execute(request: m.VmExec, peer: Peer) -> None:
        session = await AgentSession.connect(process.socket, TIMEOUT)
        try:
            terminal = (request.terminal.rows, request.terminal.columns) if request.terminal else None
            with guest_errors("cannot run it", argv=[]):
                channel = await Agent(session, TIMEOUT).exec(ExecRequest(tuple(request.argv), terminal=terminal))
            await peer.send_event("started", result={})
            await finish(peer, await carry(peer, channel, terminal is not None, check))
        except ClientGone:
            left.set()
        finally:
            await session.close()

    with served(tmp_path, streams={"vm.exec": execute}) as running:
        yield running


def outputs(messages: list[Message]) -> tuple[bytes, bytes]:
    data = [message for message in messages if isinstance(message, bytes)]
    out, err = (b"".join(piece[1:] for piece in data if piece[0] == stream) for stream in (op.STDOUT, op.STDERR))
    return out, err


def events(messages: list[Message], name: str) -> list[dict[str, object]]:
    return [dict(message) for message in messages if isinstance(message, dict) and message["event"] == name]


def test_output_on_both_streams_and_status(client: Client) -> None:
    with client.open(op.VM_EXEC, m.VmExec("vm", ["sh", "-c", "echo out; echo err >&2; exit 7"])) as stream:
        messages = list(stream.messages())
    assert outputs(messages) == (b"out\n", b"err\n")
    assert messages[-1] == {"event": "exit", "signalled": False, "value": 7}


def test_input_is_granted_again_as_it_is_taken(client: Client) -> None:
    """Sent before the command runs, byte for byte; every byte of it comes back as window."""
    sent = bytes(range(256)) * 1024
    with client.open(op.VM_EXEC, m.VmExec("vm", ["cat"])) as stream:
        for position in range(0, len(sent), 10_000):
            stream.send_data(sent[position : position + 10_000])
        stream.send_json({"type": "end"})
        messages = list(stream.messages())
    assert outputs(messages) == (sent, b"")
    granted = [event["bytes"] for event in events(messages, "window")]
    assert sum(number for number in granted if isinstance(number, int)) == len(sent)
    assert messages[-1] == {"event": "exit", "signalled": False, "value": 0}


def test_signal_passes_input_that_nobody_takes(client: Client) -> None:
    with client.open(op.VM_EXEC, m.VmExec("vm", ["sh", "-c", "echo ready; exec sleep 1000"])) as stream:
        for _ in range(8):
            stream.send_data(bytes(op.STREAM_WINDOW // 8))
        following = stream.messages()
        while next(following) != b"\x00ready\n":
            pass
        stream.send_json({"type": "signal", "number": 15})
        *_, last = following
    assert last == {"event": "exit", "signalled": True, "value": 15}


def test_terminal_is_resized(client: Client) -> None:
    script = "stty size; read line; stty size"
    with client.open(op.VM_EXEC, m.VmExec("vm", ["sh", "-c", script], terminal=m.Terminal(11, 22))) as stream:
        stream.send_json({"type": "resize", "rows": 33, "columns": 44})
        stream.send_data(b"\n")
        out, _ = outputs(list(stream.messages()))
    assert out.endswith(b"33 44\r\n")


@pytest.mark.parametrize("number", [1, 2, 3, 15])
def test_a_signal_to_a_guest_that_is_stuck_ends_the_stream_with_the_reason(client: Client, number: int) -> None:
    with client.open(op.VM_EXEC, m.VmExec("vm", ["sh", "-c", "trap '' 1 2 3 10 15; echo ready; sleep 1000"])) as stream:
        following = stream.messages()
        while next(following) != b"\x00ready\n":
            pass
        stuck.set()
        stream.send_json({"type": "signal", "number": 10})  # none that is meant to end anything
        stream.send_json({"type": "signal", "number": number})
        *_, last = following
    assert isinstance(last, dict)
    assert isinstance(last["error"], dict)
    assert (last["error"]["code"], last["error"]["message"]) == ("exhausted", "it is stuck")


def test_ctrl_c_typed_to_a_guest_that_is_stuck_ends_the_stream_with_the_reason(client: Client) -> None:
    request = m.VmExec("vm", ["sh", "-c", "echo ready; sleep 1000"], terminal=m.Terminal(24, 80))
    with client.open(op.VM_EXEC, request) as stream:
        following = stream.messages()
        while b"ready" not in next(following):
            pass
        stuck.set()
        stream.send_data(b"nothing of it")
        stream.send_data(b"but\x03this")
        *_, last = following
    assert isinstance(last, dict)
    assert isinstance(last["error"], dict)
    assert last["error"]["code"] == "exhausted"


def test_ctrl_c_in_a_pipe_is_a_byte_like_any_other(client: Client) -> None:
    stuck.set()
    with client.open(op.VM_EXEC, m.VmExec("vm", ["cat"])) as stream:
        stream.send_data(b"a\x03b")
        stream.send_json({"type": "end"})
        messages = list(stream.messages())
    assert outputs(messages) == (b"a\x03b", b"")


def test_client_that_leaves_hangs_the_command_up(client: Client, tmp_path: Path) -> None:
    left.clear()
    told = tmp_path / "told"
    os.mkfifo(told)
    fifo = os.open(told, os.O_RDWR)  # so that nobody waits for the other end
    # the shell would die of SIGPIPE when it tells that sleep was hung up too
    script = f"trap 'echo hung up >{told}; exit' HUP; echo ready; exec 2>/dev/null; while :; do sleep 0.01; done"
    with client.open(op.VM_EXEC, m.VmExec("vm", ["sh", "-c", script])) as stream:
        following = stream.messages()
        while next(following) != b"\x00ready\n":
            pass
    with open(fifo) as stream_of_fifo:
        assert stream_of_fifo.readline() == "hung up\n"
    assert left.wait(TIMEOUT)


def test_command_that_is_not_there(client: Client) -> None:
    with client.open(op.VM_EXEC, m.VmExec("vm", ["no-such-command"])) as stream:
        (message,) = stream.messages()
    assert isinstance(message, dict)
    assert isinstance(message["error"], dict)
    assert message["error"]["code"] == "command_not_found"


def test_agent_that_dies_is_an_error_of_the_guest(client: Client, process: AgentProcess) -> None:
    """The session ends under the command: the client is told, and not left waiting."""
    with client.open(op.VM_EXEC, m.VmExec("vm", ["sh", "-c", "echo ready; exec sleep 1000"])) as stream:
        following = stream.messages()
        while next(following) != b"\x00ready\n":
            pass
        process.process.terminate()
        *_, last = following
    assert isinstance(last, dict)
    assert isinstance(last["error"], dict)
    assert last["error"]["code"] == "guest"
