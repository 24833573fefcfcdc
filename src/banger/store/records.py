"""What is kept of a VM: the same record in the database and in `vms/<id>/vm.json`."""

from __future__ import annotations

from dataclasses import dataclass, field

from banger.api.models import PublishedPort
from banger.signals import TERM
from banger.vmm.machine import Machine

CREATED, RUNNING, STOPPED = "created", "running", "stopped"
# Intents: written to the database, and there alone, before the step that they name. See docs/architecture.md.
CREATING, STARTING, STOPPING, REMOVING = "creating", "starting", "stopping", "removing"
INTENTS = (CREATING, STARTING, STOPPING, REMOVING)
BROKEN = "broken"  # never written: what stands for a VM whose record cannot be read


@dataclass(frozen=True)
class VmRecord:
    """A VM as created, and its state: CREATED, RUNNING, STOPPED, or an intent.

    `command` runs detached at each start. `image_env` comes from the image, `env` from the user. `attached`: the VM
    belongs to a `vm run --rm` whose client waits for it. `volumes` and `exposed_ports` (8080/tcp) are the image's;
    `stop_signal`, a name or a number, is what its main command gets first when the VM is stopped; `home` is where
    the home disk is mounted. `driver_reason` is why it has the VMM that it has.

    `wanted`: somebody has started it and nobody has stopped it since; `failed`: its last run ended in a failure;
    `restarts`: so often in a row its `restart` policy has brought it back. `status` is how its main command ended.
    `balloon`: memory that its guest leaves idle is taken from it.
    `healthcheck` is the image's command that tells whether it works, [] without one.
    `init_command` is what an init of the image is started with, [] for the one in the usual place; `beside` what then
    runs beside it (None: `command`). `pid1` is who was PID 1 at the last start: agent, image or command, '' before.
    `next_machine` and `next_ports` take the place of `machine` and `ports`, which are what its VMM runs with, once it
    has ended.
    """

    id: str
    name: str
    state: str
    reason: str
    image: str
    image_sha256: str
    kernel: str
    created_at: str
    started_at: str
    init: str
    net: str
    ports: list[PublishedPort]
    image_env: list[str]
    env: list[str]
    user: str
    workdir: str
    command: list[str]
    auto_remove: bool
    attached: bool
    machine: Machine
    # what older records lack
    volumes: list[str] = field(default_factory=list)
    exposed_ports: list[str] = field(default_factory=list)
    stop_signal: str = TERM
    home: str = "/root"
    driver_reason: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    auto_stop: float = 0.0
    restart: str = "no"
    restarts: int = 0
    wanted: bool = False
    failed: bool = False
    status: int | None = None
    next_machine: Machine | None = None
    next_ports: list[PublishedPort] | None = None
    balloon: bool = False
    healthcheck: list[str] = field(default_factory=list)
    init_command: list[str] = field(default_factory=list)
    beside: list[str] | None = None
    pid1: str = ""


def broken_record(vm_id: str, name: str, reason: str) -> VmRecord:
    """What stands for a VM of which there is nothing but a directory."""
    machine = Machine("", "", "", "", "", "", 0, 0, "", "", "", "", [], [], [], -1)
    return VmRecord(
        id=vm_id,
        name=name,
        state=BROKEN,
        reason=reason,
        image="",
        image_sha256="",
        kernel="",
        created_at="",
        started_at="",
        init="",
        net="",
        ports=[],
        image_env=[],
        env=[],
        user="",
        workdir="",
        command=[],
        auto_remove=False,
        attached=False,
        machine=machine,
    )
