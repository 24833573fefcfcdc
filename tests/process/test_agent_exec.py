"""Commands through the real agent: how they are found and started, their pipes, their end."""

import asyncio
import errno
import hashlib
import os
import platform
import pwd
import random
import re
import signal
import sys
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.guest.agent import Agent, ExecRequest, GuestConfig, guest_errors
from banger.guest.arguments import HINT, MOST_EACH, check_words
from banger.guest.session import AgentError, Channel, ChannelClosed, Data, End, Exit
from tests.process.agents import TIMEOUT, AgentProcess, Fifo, Reader, collect, feed, reports_signal, run

pytestmark = pytest.mark.anyio
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
MEGABYTE = 1 << 20


async def _refusal(agent: Agent, request: ExecRequest) -> AgentError:
    with pytest.raises(AgentError) as caught:
        await agent.exec(request)
    return caught.value


async def test_arguments_arrive_as_they_are(agent: Agent) -> None:
    words = ("", "two words", "\"'$HOME`*", "-n", "caf\u00e9", "\udcff\udcfe", "line\nbreak")
    script = "import os, sys; sys.stdout.buffer.write(b'|'.join(map(os.fsencode, sys.argv[1:])))"
    output = await run(agent, sys.executable, "-c", script, *words)
    assert output.stdout == b"|".join(word.encode("utf-8", "surrogateescape") for word in words)


async def test_the_environment_is_only_what_is_documented(agent: Agent) -> None:
    account = pwd.getpwuid(os.getuid())
    usual = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOSTNAME": platform.node(),
        "HOME": account.pw_dir,
        "USER": account.pw_name,
        "LOGNAME": account.pw_name,
        "SHELL": account.pw_shell,
    }
    assert await _environment(agent, {}) == usual
    await agent.configure(GuestConfig(environment={"SHELL": "/configured", "A": "configured", "B": "configured"}))
    expected = usual | {"SHELL": "/configured", "A": "configured", "B": "requested=yes", "C": ""}
    assert await _environment(agent, {"B": "requested=yes", "C": ""}) == expected


async def _environment(agent: Agent, env: dict[str, str]) -> dict[str, str]:
    output = await run(agent, "env", "-0", env=env)
    pairs = [entry.partition("=") for entry in output.stdout.decode().split("\0")[:-1]]
    assert len({name for name, _, _ in pairs}) == len(pairs)
    return {name: value for name, _, value in pairs}


async def test_commands_are_found_in_the_path_of_the_request(agent: Agent, tmp_path: Path) -> None:
    tool = tmp_path / "mytool"
    tool.write_text("#!/bin/sh\necho mine\n")
    tool.chmod(0o755)
    assert (await run(agent, "mytool", env={"PATH": f"/nonexistent:{tmp_path}"})).stdout == b"mine\n"
    assert (await _refusal(agent, ExecRequest(("mytool",)))).errno == errno.ENOENT


async def test_the_working_directory(agent: Agent, tmp_path: Path) -> None:
    assert (await run(agent, "pwd")).stdout.decode().rstrip("\n") == str(Path.home().resolve())
    assert (await run(agent, "pwd", cwd=str(tmp_path))).stdout.decode().rstrip("\n") == str(tmp_path)
    missing = await _refusal(agent, ExecRequest(("pwd",), cwd="/no/such/place"))
    assert missing.errno == errno.ENOTDIR
    assert "/no/such/place" in missing.message
    (tmp_path / "file").touch()
    not_one = await _refusal(agent, ExecRequest(("pwd",), cwd=str(tmp_path / "file")))
    assert not_one.errno == errno.ENOTDIR
    assert str(tmp_path / "file") in not_one.message
    with pytest.raises(BangerError) as caught, guest_errors("cannot run 'pwd'", argv=["pwd"]):
        raise missing
    assert caught.value.code is Code.CANNOT_EXECUTE
    assert "directory" in caught.value.hint


@needs_root
@pytest.mark.parametrize("user", ["daemon", str(pwd.getpwnam("daemon").pw_uid)])
async def test_a_user_by_name_and_by_number(agent: Agent, user: str) -> None:
    account = pwd.getpwnam("daemon")
    script = 'id -u; id -g; id -G; echo "$USER $LOGNAME $HOME $SHELL"'
    output = await run(agent, "sh", "-c", script, user=user, cwd="/")
    groups = " ".join(str(group) for group in os.getgrouplist("daemon", account.pw_gid))
    names = f"daemon daemon {account.pw_dir} {account.pw_shell}"
    assert output.stdout.decode().splitlines() == [str(account.pw_uid), str(account.pw_gid), groups, names]


@needs_root
@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("daemon:sys", "1 3 "),
        ("1:3", "1 3 "),
        ("daemon:12345", "1 12345 "),
        ("54321", "54321 "),
        ("54321:12345", "54321 12345 "),
    ],
)
async def test_a_user_with_a_group_and_one_without_an_account(agent: Agent, user: str, ids: str) -> None:
    output = await run(agent, "sh", "-c", 'echo "$(id -u) $(id -g) "', user=user, cwd="/")
    assert output.stdout.decode().startswith(ids)


@needs_root
@pytest.mark.parametrize("user", ["root", "daemon", "54321:12345"])
async def test_the_standard_streams_are_the_users(agent: Agent, user: str, log: Path) -> None:
    script = (
        "for name in out err; do echo $name >/dev/std$name; done; echo out >>/proc/self/fd/1; echo err >/dev/fd/2;"
        "cat /dev/stdin; stat -Lc %u /dev/stdin /dev/stdout /dev/stderr"
    )
    output = await run(agent, "sh", "-c", script, user=user, cwd="/", input=b"typed\n")
    uid = b"%d\n" % {"root": 0, "daemon": 1}.get(user, 54321)
    assert (output.stdout, output.stderr) == (b"out\nout\ntyped\n" + 3 * uid, b"err\nerr\n")
    await agent.spawn(ExecRequest(("sh", "-c", script), cwd="/", user=user, log=True, main=True))
    assert await agent.wait_main() == Exit(False, 0)
    assert b"out\n" in log.read_bytes()


@needs_root
async def test_the_standard_streams_of_one_who_becomes_another(agent: Agent) -> None:
    become = "import os; os.setgroups([]); os.setgid(1234); os.setuid(1234); open('/dev/stdout', 'w').write('other')"
    output = await run(agent, sys.executable, "-c", become, user="daemon" if os.geteuid() else "root", cwd="/")
    assert (output.stdout, output.stderr) == (b"other", b"")


async def test_the_longest_argument_and_all_that_fit_together(agent: Agent) -> None:
    output = await run(agent, "/bin/sh", "-c", "echo ${#1}", "sh", "x" * MOST_EACH)
    assert output.stdout == b"%d\n" % MOST_EACH
    check_words([], ["x" * MOST_EACH])
    env = {f"V{number}": "y" * 100_000 for number in range(20)}
    output = await run(agent, "/bin/sh", "-c", "echo $# ${#V0} ${#V19}", "sh", *["z"] * 1000, env=env)
    assert output.stdout == b"1000 100000 100000\n"
    refusal = await _refusal(agent, ExecRequest(("/bin/true", "x" * (MOST_EACH + 1))))
    assert refusal.errno == errno.E2BIG
    with pytest.raises(BangerError) as caught, guest_errors("cannot run 'true'", argv=["/bin/true"]):
        raise refusal
    assert (caught.value.code, caught.value.hint) == (Code.CANNOT_EXECUTE, HINT)
    refusal = await _refusal(agent, ExecRequest(("/bin/true", *["x" * MOST_EACH] * 33)))
    assert refusal.errno == errno.E2BIG
    assert (await run(agent, "echo", "here")).stdout == b"here\n"


async def test_very_many_variables_with_the_last_of_each_name(agent: Agent) -> None:
    env = {f"V{number}": "given" for number in range(50_000)}
    await agent.configure(GuestConfig(environment={**env, "V1": "configured", "W": "x" * 100_000}))
    expected = {**env, "V1": "configured", "V2": "asked", "W": "x" * 100_000}
    found = await _environment(agent, {"V2": "asked"})
    assert {name: found.get(name) for name in expected} == expected


async def test_an_unknown_user(agent: Agent) -> None:
    for user in ("nobody-of-that-name", "root:no-such-group"):
        refusal = await _refusal(agent, ExecRequest(("true",), user=user))
        assert refusal.errno == errno.ESRCH, user
        with pytest.raises(BangerError) as caught, guest_errors("cannot run 'true'", argv=["true"]):
            raise refusal
        assert caught.value.code is Code.INVALID


async def test_commands_that_cannot_be_executed(agent: Agent, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program\n")
    no_program = tmp_path / "no-program"
    no_program.write_text("no program\n")
    no_program.chmod(0o755)
    orphan = tmp_path / "orphan"
    orphan.write_text("#!/no/such/interpreter\n")
    orphan.chmod(0o755)
    expected = {
        "no-such-command": (errno.ENOENT, Code.COMMAND_NOT_FOUND),
        "/no/such/command": (errno.ENOENT, Code.COMMAND_NOT_FOUND),
        f"{plain}/below": (errno.ENOENT, Code.COMMAND_NOT_FOUND),
        "": (errno.ENOENT, Code.COMMAND_NOT_FOUND),
        str(orphan): (errno.ENOEXEC, Code.CANNOT_EXECUTE),
        str(plain): (errno.EACCES, Code.CANNOT_EXECUTE),
        str(tmp_path): (errno.EACCES, Code.CANNOT_EXECUTE),
        str(no_program): (errno.ENOEXEC, Code.CANNOT_EXECUTE),
    }
    for command, (number, code) in expected.items():
        refusal = await _refusal(agent, ExecRequest((command,)))
        assert refusal.errno == number, command
        assert command in refusal.message
        with pytest.raises(BangerError) as caught, guest_errors(f"cannot run {command!r}", argv=[command]):
            raise refusal
        assert caught.value.code is code
        assert caught.value.hint
    assert (await run(agent, "echo", "still there")).stdout == b"still there\n"


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["ls -l /"], "its name has spaces in it: leave out the quotes, or let a shell read it: sh -c 'ls -l /'"),
        (["echo it's", "x"], """its name .*: sh -c 'echo it'"'"'s'"""),
        (["no-such-command", "a b"], "check its name; .*"),
        ([" "], "check its name; .*"),
    ],
)
async def test_a_command_line_in_one_word_is_told_how_to_be_written(agent: Agent, argv: list[str], hint: str) -> None:
    refusal = await _refusal(agent, ExecRequest(tuple(argv)))
    with pytest.raises(BangerError) as caught, guest_errors("cannot run it", argv=argv):
        raise refusal
    assert caught.value.code is Code.COMMAND_NOT_FOUND
    assert re.fullmatch(hint, caught.value.hint)


async def test_stdout_and_stderr_are_separate_and_end_before_the_exit(agent: Agent) -> None:
    output = await run(agent, "sh", "-c", "echo out; echo err >&2; exit 37")
    assert (output.stdout, output.stderr, output.exit) == (b"out\n", b"err\n", Exit(False, 37))
    assert [item for item in output.items if not isinstance(item, Data)][-1] == Exit(False, 37)
    assert {item for item in output.items if isinstance(item, End)} == {End(0), End(1)}
    assert isinstance(output.items[-1], Exit)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
async def test_a_command_that_a_signal_ends(agent: Agent, number: signal.Signals) -> None:
    output = await run(agent, "sh", "-c", f"kill -{int(number)} $$")
    assert output.exit == Exit(True, number)
    assert output.exit.status == 128 + number


async def test_megabytes_through_a_pipe_both_ways(agent: Agent) -> None:
    content = random.Random(3).randbytes(32 * MEGABYTE)
    output = await run(agent, "cat", input=content)
    assert hashlib.sha256(output.stdout).digest() == hashlib.sha256(content).digest()
    assert output.exit == Exit(False, 0)


async def test_megabytes_on_both_outputs_at_once(agent: Agent) -> None:
    size = 8 * MEGABYTE
    output = await run(agent, "sh", "-c", f"head -c {size} /dev/zero & yes | head -c {size} >&2; wait")
    assert output.stdout == bytes(size)
    assert output.stderr == b"y\n" * (size // 2)


async def test_the_end_of_input_ends_the_reader(agent: Agent) -> None:
    channel = await agent.exec(ExecRequest(("wc", "-c")))
    await channel.send(b"12345")
    await channel.send_end()
    assert (await collect(channel)).stdout.strip() == b"5"


async def test_input_that_nobody_takes_does_not_hold_up_the_sender(agent: Agent, fifo: Fifo) -> None:
    channel = await agent.exec(ExecRequest(("sh", "-c", f"exec <&-; echo closed; read line <{fifo.path}")))
    await Reader(channel).until(b"closed\n")
    await channel.send(bytes(4 * MEGABYTE))
    await channel.send_end()
    await channel.close()


async def _send_forever(channel: Channel) -> None:
    while True:
        await channel.send(bytes(MEGABYTE))


async def test_sending_to_a_command_that_ends_is_told(agent: Agent) -> None:
    channel = await agent.exec(ExecRequest(("sh", "-c", "head -c 1 >/dev/null; exit 3")))
    with pytest.raises(ChannelClosed):
        await _send_forever(channel)
    assert (await collect(channel)).exit == Exit(False, 3)


async def test_what_is_in_the_pipe_when_the_command_ends_still_comes(agent: Agent, fifo: Fifo) -> None:
    channel = await agent.exec(ExecRequest(("sh", "-c", f"head -c 900000 /dev/zero; echo done >{fifo.path}")))
    assert await fifo.line() == "done"
    output = await collect(channel)
    assert (len(output.stdout), output.exit) == (900000, Exit(False, 0))


async def test_a_process_left_behind_does_not_delay_the_exit(agent: Agent) -> None:
    output = await run(agent, "sh", "-c", "sleep 1000 & echo $!; exit 4")
    left_behind = int(output.stdout)
    os.kill(left_behind, signal.SIGKILL)  # raises when it is gone already
    assert output.exit == Exit(False, 4)


async def test_signals_reach_the_whole_process_group(agent: Agent, fifo: Fifo) -> None:
    channel = await agent.exec(reports_signal(signal.SIGTERM, fifo, "child = os.fork()"))
    reader = Reader(channel)
    for _ in ("parent", "child"):
        await reader.until(b"ready\n")
    await channel.signal(signal.SIGTERM)
    for _ in ("parent", "child"):
        assert await fifo.line() == "SIGTERM"
    assert (await collect(channel)).exit == Exit(False, 0)


async def test_closing_the_channel_hangs_the_command_up(agent: Agent, fifo: Fifo) -> None:
    channel = await agent.exec(reports_signal(signal.SIGHUP, fifo))
    await Reader(channel).until(b"ready\n")
    await channel.close()
    assert await fifo.line() == "SIGHUP"


async def test_the_end_of_the_session_hangs_commands_up_even_stopped_ones(process: AgentProcess, fifo: Fifo) -> None:
    async with process.connected() as agent:
        channel = await agent.exec(reports_signal(signal.SIGHUP, fifo))
        await Reader(channel).until(b"ready\n")
        await channel.signal(signal.SIGSTOP)
        await agent.health()
    assert await fifo.line() == "SIGHUP"


async def test_a_new_hello_hangs_the_commands_of_the_old_session_up(process: AgentProcess, fifo: Fifo) -> None:
    async with process.connected() as agent:
        channel = await agent.exec(reports_signal(signal.SIGHUP, fifo))
        await Reader(channel).until(b"ready\n")
    async with process.connected() as agent:
        assert await fifo.line() == "SIGHUP"
        assert (await run(agent, "echo", "next")).stdout == b"next\n"


async def test_a_detached_command_survives_its_session(process: AgentProcess, fifo: Fifo, tmp_path: Path) -> None:
    result = Fifo(tmp_path / "result")
    script = f"read line <{fifo.path}; read none || echo $line $$ >{result.path}"
    async with process.connected() as agent:
        pid = await agent.spawn(ExecRequest(("sh", "-c", script)))
    fifo.write("question")
    assert await result.line() == f"question {pid}"
    result.close()


async def test_a_detached_command_that_does_not_exist_is_an_error(agent: Agent) -> None:
    with pytest.raises(AgentError) as caught:
        await agent.spawn(ExecRequest(("no-such-command",)))
    assert caught.value.errno == errno.ENOENT


async def test_the_login_shell_is_the_default(agent: Agent) -> None:
    account = pwd.getpwuid(os.getuid())
    output = await run(agent, input=b'echo "name=$0"\n')
    assert f"name=-{Path(account.pw_shell).name}\n".encode() in output.stdout


async def test_cancelling_an_exec_leaves_the_session_usable(agent: Agent) -> None:
    for _ in range(30):
        starting = asyncio.create_task(agent.exec(ExecRequest(("sleep", "1000"))))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    assert (await run(agent, "echo", "fine")).stdout == b"fine\n"


async def test_many_commands_at_once_keep_their_output_apart(agent: Agent) -> None:
    async with asyncio.timeout(TIMEOUT), asyncio.TaskGroup() as group:
        runs = [group.create_task(run(agent, "sh", "-c", f"cat; echo {i}", input=b"%d," % i * 1000)) for i in range(40)]
    for i, task in enumerate(runs):
        assert task.result().stdout == b"%d," % i * 1000 + b"%d\n" % i


async def test_a_stuck_reader_holds_up_its_own_channel_only(agent: Agent) -> None:
    stuck = await agent.exec(ExecRequest(("cat", "/dev/zero")))
    content = random.Random(4).randbytes(4 * MEGABYTE)
    assert (await run(agent, "cat", input=content)).stdout == content
    await stuck.close()


async def test_a_command_that_reads_nothing_holds_up_its_own_sender_only(agent: Agent, fifo: Fifo) -> None:
    lazy = await agent.exec(ExecRequest(("sh", "-c", f"read line <{fifo.path}; wc -c")))
    content = random.Random(5).randbytes(4 * MEGABYTE)
    sending = asyncio.create_task(feed(lazy, content))
    assert (await run(agent, "cat", input=content)).stdout == content
    assert not sending.done()
    fifo.write("now")
    assert int((await collect(lazy)).stdout) == len(content)
    await sending
