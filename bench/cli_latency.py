"""Latency: `vm list`, `vm exec`, and an exec over the API against the same exec straight over the agent's socket."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

from common import Host, in_turn, load, report, scratch_host, seconds

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import call_over, connect
from banger.cli.connect import ensure_daemon, stop_daemon
from banger.guest.agent import Agent, ExecRequest
from banger.guest.session import AgentSession, Exit

ROUNDS = 20
_TURNS = 5  # the daemon owns the agent's socket, so it is stopped for each turn of the direct side
_CALLS = 20  # in a turn


def bare_python() -> float:
    """Seconds that the same interpreter takes for nothing."""
    return seconds(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))


def exec_over_api(host: Host) -> float:
    """Seconds of one vm.exec to its exit status."""

    def run() -> None:
        with host.client.open(op.VM_EXEC, m.VmExec("bench", ["true"])) as stream:
            stream.send_json({"type": "end"})
            events = [message.get("event") for message in stream.messages() if isinstance(message, dict)]
        if events[-1:] != ["exit"]:
            raise SystemExit(f"the exec failed: {events}")

    return seconds(run)


async def exec_over_socket(agent: Agent) -> None:
    """The same exec over a session with the agent."""
    channel = await agent.exec(ExecRequest(("true",)))
    await channel.send_end()
    while not isinstance(await channel.receive(), Exit):
        pass
    await channel.close()


def direct(agent_socket: Path) -> list[float]:
    """Seconds of each exec over a session of our own."""
    with asyncio.Runner() as runner:
        session = runner.run(AgentSession.connect(agent_socket, 30))
        agent = Agent(session)
        runner.run(exec_over_socket(agent))
        taken = [seconds(lambda: runner.run(exec_over_socket(agent))) for _ in range(_CALLS)]
        runner.run(session.close())
    return taken


def list_over(connection: socket.socket) -> None:
    call_over(connection, op.VM_LIST, m.Empty())


def main() -> None:
    with scratch_host() as host, host.running("bench"):
        listing, python = in_turn(ROUNDS, lambda: seconds(lambda: host.banger("vm", "list")), bare_python)
        report("vm list", listing, "python3 -c pass", python)
        command, python = in_turn(
            ROUNDS, lambda: seconds(lambda: host.banger("vm", "exec", "bench", "--", "true")), bare_python
        )
        report("vm exec NAME -- true", command, "python3 -c pass", python)
        with connect(host.layout.socket) as connection:
            calls, _ = in_turn(ROUNDS, lambda: seconds(lambda: list_over(connection)), bare_python)
        print(f"vm.list over an open API connection: {sorted(calls)[len(calls) // 2] * 1e3:.1f} ms")
        agent_socket = Path(host.client.call(op.VM_SHOW, m.VmRef("bench")).directory, "agent.sock")
        over_api: list[float] = []
        over_socket: list[float] = []
        for _ in range(_TURNS):
            exec_over_api(host)
            over_api += [exec_over_api(host) for _ in range(_CALLS)]
            stop_daemon(host.client)
            over_socket += direct(agent_socket)
            ensure_daemon(host.layout)
        report("exec of true over the API", over_api, "straight over the agent's socket", over_socket)
        print(load())


if __name__ == "__main__":
    main()
