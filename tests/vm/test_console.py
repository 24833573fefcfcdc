"""The serial console of a guest: what a shell on it answers, also after the daemon has gone and come."""

from tests.vm.host import Host


def test_a_shell_on_the_serial_port(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "serial", "--", "sleep", "infinity")
    host.ok("vm", "exec", "-d", "serial", "--", "sh", "-c", "exec sh -i <>/dev/ttyS0 >&0 2>&0")
    for first in (True, False):
        with host.terminal("vm", "console", "serial") as terminal:
            terminal.expect("ctrl-] leaves")
            terminal.type("echo $((6*7)) $(tty)\r")
            terminal.expect("42 /dev/ttyS0")
            terminal.type("\x1d")
            assert terminal.wait() == 0
        if first:
            host.daemon.kill()
            host.daemon.start()
            host.wait_state("serial", "running")
    assert "42 /dev/ttyS0" in host.ok("vm", "logs", "--console", "serial")
    with host.terminal("vm", "console", "serial") as terminal:
        terminal.expect("ctrl-] leaves")
        host.ok("vm", "kill", "serial")
        assert terminal.wait() == 0
    assert "is stopped, not running" in host.fails(1, "vm", "console", "serial")
    host.ok("vm", "rm", "serial")
