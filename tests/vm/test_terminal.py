"""Shells on a terminal: login shell, size, keys, job control, status."""

from tests.vm.host import Host

PROMPT = "READY> "


def test_a_login_shell_behaves_like_one(host: Host, guest: str) -> None:
    with host.terminal("vm", "shell", guest) as terminal:
        terminal.type(f"PS1='{PROMPT[:3]}''{PROMPT[3:]}'\n")
        terminal.expect(PROMPT)
        terminal.type("stty size; shopt -q login_shell && echo is-login; echo $TERM; tty\n")
        terminal.expect("24 80")
        terminal.expect("is-login")
        terminal.expect("xterm-256color")
        terminal.expect("/dev/pts/")
        terminal.resize(40, 132)
        terminal.type("until [ \"$(stty size)\" = '40 132' ]; do sleep 0.1; done; echo resi''zed\n")
        terminal.expect("resized")
        terminal.type("sh -c 'echo sta''rted; exec sleep 1000'\n")
        terminal.expect("started")
        terminal.type("\x03")
        terminal.expect(PROMPT)
        terminal.type("echo status=$?\n")
        terminal.expect("status=130")
        terminal.type("sh -c 'echo sta''rted; exec sleep 1000'\n")
        terminal.expect("started")
        terminal.type("\x1a")
        terminal.expect("Stopped")
        terminal.type("jobs; kill %1; wait %1; exit 42\n")
        assert terminal.wait() == 42


def test_run_on_a_terminal_gives_a_shell_and_reports_the_vm(host: Host) -> None:
    with host.terminal("vm", "run", "--name", "interactive") as terminal:
        terminal.expect("# ")
        terminal.type("echo $((6*7)); exit\n")
        terminal.expect("42")
        terminal.expect("banger vm stop interactive")
        assert terminal.wait() == 0
    assert host.vm("interactive").state == "running"
    with host.terminal(
        "vm", "exec", "interactive", "--", "sh", "-c", "test -t 0 && test -t 1 && echo both"
    ) as terminal:
        terminal.expect("both")
        assert terminal.wait() == 0
    for end, what in (("stop", "stopped"), ("kill", "killed"), ("rm -f", "removed")):
        with host.terminal("vm", "shell", "interactive") as terminal:
            terminal.expect("# ")
            host.ok("vm", *end.split(), "interactive")
            terminal.expect(f"\r\nerror: interactive was {what}\r\n")
            assert terminal.wait() == 125
        if end != "rm -f":
            host.ok("vm", "start", "interactive")
