"""The helpers of a VM die or hang: what they do goes on, what was lost is said, and none outlives its VMM."""

import os
import signal
from pathlib import Path

from banger.daemon import vm_disk
from banger.process import ProcessId
from tests.daemons import end, wait_ended
from tests.vm.host import Host

TICKS = "while read line; do echo $line; echo $line >/dev/console; done </srv/lines"


def run(host: Host, name: str) -> Path:
    """Start a VM that prints each line that it is sent, on its console too; gives its directory."""
    host.ok("vm", "run", "-d", "--name", name, "--", "sh", "-c", f"mkfifo /srv/lines; exec 3<>/srv/lines; {TICKS}")
    send(host, name, "one")
    host.wait_output("one\n", "vm", "logs", name)
    return Path(host.vm(name).directory)


def send(host: Host, name: str, line: str) -> None:
    host.ok(
        "vm", "exec", name, "--", "sh", "-c", f"until [ -p /srv/lines ]; do sleep 0.1; done; echo {line} >/srv/lines"
    )


def recorder(directory: Path) -> ProcessId:
    processes = vm_disk.read_processes(directory)
    assert processes is not None
    assert processes.recorder is not None
    return processes.recorder


def end_recorder(directory: Path) -> ProcessId:
    ended = recorder(directory)
    end(ended)
    assert wait_ended([ended])
    return ended


def test_a_recorder_that_dies_is_started_again(host: Host) -> None:
    directory = run(host, "noted")
    end_recorder(directory)
    (warning,) = host.wait_warnings("noted")
    assert warning.startswith("lost: some of its console and logs; the recorder ended at ")
    send(host, "noted", "two")
    host.wait_output("one\ntwo\n", "vm", "logs", "noted")
    host.wait_for(lambda: host.run("vm", "logs", "--console", "noted").stdout.endswith(b"two\r\n"))
    # and while the daemon is away
    host.daemon.kill()
    end_recorder(directory)
    host.daemon.start()
    host.wait_warnings("noted")
    send(host, "noted", "three")
    host.wait_output("one\ntwo\nthree\n", "vm", "logs", "noted")
    # the new one is known: the next daemon finds it
    host.daemon.restart()
    host.wait_state("noted", "running")
    send(host, "noted", "four")
    host.wait_output("one\ntwo\nthree\nfour\n", "vm", "logs", "noted")
    assert host.vm("noted").warnings == []
    host.ok("vm", "rm", "-f", "noted")


def test_a_recorder_that_always_dies_is_given_up(host: Host) -> None:
    directory = run(host, "doomed")
    for number in range(6):
        ended = end_recorder(directory)
        if number < 5:
            host.wait_for(lambda ended=ended: recorder(directory) != ended)  # type: ignore[misc]  # of an argument
    host.wait_for(lambda: "is not started again" in "".join(host.vm("doomed").warnings))
    assert "ended 6 times" in host.vm("doomed").warnings[0]
    assert "banger vm restart doomed" in host.vm("doomed").warnings[0]
    assert host.ok("vm", "exec", "doomed", "--", "echo", "works") == "works\n"
    host.ok("vm", "rm", "-f", "doomed")


def test_a_vmm_of_an_older_banger_takes_no_other_recorder(host: Host) -> None:
    directory = run(host, "elder")
    host.daemon.stop()
    (directory / "serial.sock").unlink()
    host.daemon.start()
    end_recorder(directory)
    (warning,) = host.wait_warnings("elder")
    assert "the recorder ended and cannot be started again (" in warning
    assert warning.endswith("restart the VM with 'banger vm restart elder'")
    assert host.vm("elder").state == "running"
    host.ok("vm", "restart", "elder")
    assert host.vm("elder").warnings == []
    host.ok("vm", "rm", "-f", "elder")


def test_a_network_that_hangs_ends_with_its_vm(host: Host) -> None:
    """A guest can bring an old passt into a loop without end, in which it notices nothing."""
    directory = run(host, "loops")
    processes = vm_disk.read_processes(directory)
    assert processes is not None
    network = [identity for identity in processes.helpers if identity != processes.recorder]
    assert network
    for identity in network:
        os.kill(identity.pid, signal.SIGSTOP)
    host.ok("vm", "stop", "loops")
    assert wait_ended(network)
    # and when the VM ends while no daemon is there
    host.ok("vm", "start", "loops")
    processes = vm_disk.read_processes(directory)
    assert processes is not None
    network = [identity for identity in processes.helpers if identity != processes.recorder]
    for identity in network:
        os.kill(identity.pid, signal.SIGSTOP)
    host.daemon.kill()
    end(processes.vmm)
    host.daemon.start()
    assert wait_ended(network)
    host.ok("vm", "rm", "loops")
