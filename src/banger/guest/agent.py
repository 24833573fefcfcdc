"""What one asks of the agent in a guest: typed requests and checked replies on a session."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from banger.api.errors import BangerError, Code
from banger.guest.arguments import HINT
from banger.guest.protocol import (
    DiskRole,
    ExecFlags,
    FieldList,
    Fields,
    FieldValue,
    GuestState,
    InitMode,
    OpenKind,
    ProtocolError,
    Tag,
    TreeFlags,
)
from banger.guest.session import AgentError, AgentSession, Channel, Exit, GuestFailure, decode_exit
from banger.reasons import in_words

_U32_MAX = (1 << 32) - 1
# what an agent of protocol version 1 takes of a configuration
_OLD_TEXT, _OLD_TEXTS = 32768, 1024
_PORT_MAX = (1 << 16) - 1


class ShutdownMode(IntEnum):
    POWER_OFF = 0
    REBOOT = 1


@dataclass(frozen=True)
class Interface:
    """One network interface, found by its hardware address ("52:54:00:12:34:56")."""

    mac: str
    addresses: tuple[str, ...] = ()  # "10.0.2.15/24"
    gateways: tuple[str, ...] = ()
    mtu: int | None = None


@dataclass(frozen=True)
class Disk:
    """One disk, found by its serial; `target` is for the roles OTHER and HOME ('' there: /root)."""

    serial: str
    role: DiskRole
    fstype: str
    target: str = ""
    readonly: bool = False


@dataclass(frozen=True)
class GuestConfig:
    """What `configure` sets; what is None or empty is left alone. Disks and init are for the first time only."""

    hostname: str | None = None
    interfaces: tuple[Interface, ...] = ()
    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # lines of /etc/hosts
    environment: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()  # lines of authorized_keys, in /root and on the home disk
    disks: tuple[Disk, ...] = ()
    init: InitMode | None = None
    words: tuple[str, ...] = ()  # of an init of the image, or those that AUTO looks at; they start in `workdir`
    workdir: str = ""
    volumes: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()  # made when they are missing


@dataclass(frozen=True)
class ExecRequest:
    """A command to run; without argv the user's login shell. `terminal` is (rows, columns) or None for pipes."""

    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str | None = None
    terminal: tuple[int, int] | None = None
    log: bool = False  # its output also goes to the log port
    main: bool = False  # its end is kept for `wait_main` and `health`
    init: bool = False  # it is PID 1 of a PID namespace, which later commands join


@dataclass(frozen=True)
class Health:
    """How the guest is; `exited` tells how the main command ended, None while there is none or it runs."""

    state: GuestState
    agent_version: str
    kernel_release: str
    boot_id: str
    uptime_ms: int
    main_pid: int | None
    exited: Exit | None


@dataclass(frozen=True)
class FilesystemStats:
    target: str
    size: int
    used: int


@dataclass(frozen=True)
class NetStats:
    name: str
    received: int
    sent: int


@dataclass(frozen=True)
class BlockStats:
    name: str
    read: int
    written: int


@dataclass(frozen=True)
class Stats:
    """Sizes in bytes, CPU times in ms of all CPUs together, load averages of 1, 5 and 15 minutes."""

    cpu_total_ms: int
    cpu_busy_ms: int
    cpus: int
    memory_total: int
    memory_available: int
    load: tuple[float, ...]
    processes: int
    filesystems: tuple[FilesystemStats, ...]
    networks: tuple[NetStats, ...]
    blocks: tuple[BlockStats, ...]


@dataclass(frozen=True)
class Listener:
    """A socket that a process in the guest listens on; `process` is its name, "" when unknown."""

    protocol: str
    address: str
    port: int
    pid: int | None
    process: str


@dataclass(frozen=True)
class StatResult:
    """As lstat(2); `link` is the target of a symbolic link, as it is (`printable` is for showing it)."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: str | None


def printable(text: str) -> str:
    """A guest's text with everything escaped that a terminal might act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@contextlib.contextmanager
def guest_errors(what: str, *, argv: Sequence[str] | None = None) -> Iterator[None]:
    """Turn failures of the agent into BangerErrors that begin with `what`, e.g. "cannot run 'make'".

    Where a command `argv` is run, ENOENT becomes COMMAND_NOT_FOUND, and ENOTDIR (its working directory), EACCES,
    ENOEXEC and E2BIG become CANNOT_EXECUTE; else ENOENT and ENOTDIR become NOT_FOUND. Values that the protocol cannot
    carry become INVALID, all others GUEST.
    """
    try:
        yield
    except AgentError as error:
        raise _agent_error(error, what, argv) from error
    except (GuestFailure, ProtocolError) as error:
        hint = "look at the guest's console, and start it again if it hangs"
        raise BangerError(Code.GUEST, f"{what}: {printable(str(error))}", hint) from error
    except TimeoutError as error:
        hint = "it may be busy: try again, or start it again if it hangs"
        raise BangerError(Code.GUEST, f"{what}: the guest did not answer in time", hint) from error
    except ValueError as error:
        raise BangerError(Code.INVALID, f"{what}: {in_words(error)}", "leave that value out, or correct it") from error


def _agent_error(error: AgentError, what: str, argv: Sequence[str] | None) -> BangerError:
    code, hint = Code.GUEST, "look at the guest's console for what it says about this"
    command = argv is not None
    if argv is not None and error.errno == errno.ENOENT:
        code, hint = Code.COMMAND_NOT_FOUND, _how_to_name(argv)
    elif command and error.errno == errno.ENOTDIR:
        code, hint = Code.CANNOT_EXECUTE, "give a directory that is there in the guest and that the user may enter"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        code, hint = Code.NOT_FOUND, "check the path; it is one inside the guest"
    elif error.errno == errno.E2BIG:
        code, hint = Code.CANNOT_EXECUTE if command else Code.INVALID, error.hint or HINT
    elif command and error.errno in (errno.EACCES, errno.ENOEXEC):
        code, hint = Code.CANNOT_EXECUTE, "check that it may be executed and is a program for the guest's architecture"
    elif error.errno == errno.ESRCH:
        code, hint = Code.INVALID, "use a user of the guest's /etc/passwd, or a numeric uid"
    elif error.errno == errno.EAGAIN:
        code, hint = Code.EXHAUSTED, "close some of the commands and connections that are open in this guest"
    elif error.errno == errno.ENOSPC:
        code, hint = Code.EXHAUSTED, "free some space in the guest, or give it a larger disk"
    elif error.errno == errno.ECONNREFUSED:
        hint = "nothing listens there in the guest"
    name = errno.errorcode.get(error.errno, str(error.errno))
    return BangerError(code, f"{what}: {printable(str(error))}", hint, {"errno": name})


def _how_to_name(argv: Sequence[str]) -> str:
    if argv and len(argv[0].split()) > 1:  # a whole command line as one word
        return f"its name has spaces in it: leave out the quotes, or let a shell read it: sh -c {shlex.quote(argv[0])}"
    return "check its name; without a slash in it, it has to be in the guest's PATH"


class Agent:
    """The agent of one guest. All methods raise what their session raises; `guest_errors` makes that BangerErrors.

    `timeout` is in seconds and bounds the wait for one reply (TimeoutError).
    """

    def __init__(self, session: AgentSession, timeout: float | None = None) -> None:
        self.session = session
        self._timeout = timeout

    async def configure(self, config: GuestConfig) -> InitMode | None:
        """Configure the guest, or replace what an earlier configuration has set; who is PID 1, None from old agents."""
        if self.session.version < 2:
            _check_old(config)
        reply = await self._call(OpenKind.CONFIGURE, _config_fields(config))
        return InitMode(reply.number(Tag.INIT, max(InitMode))) if Tag.INIT in reply else None

    async def exec(self, request: ExecRequest) -> Channel:
        """Run a command attached to the channel that is returned; closing that sends it SIGHUP."""
        return await self._open(OpenKind.EXEC, _exec_fields(request, ExecFlags(0)))

    async def spawn(self, request: ExecRequest) -> int:
        """Run a command detached, with /dev/null as its input, and return its process id."""
        reply = await self._call(OpenKind.EXEC, _exec_fields(request, ExecFlags.DETACHED))
        return reply.number(Tag.PID, _U32_MAX)

    async def wait_main(self) -> Exit:
        """How the main command ended, once it has; it need not have been started yet."""
        channel = await self._open(OpenKind.WAIT, [])
        try:
            result = await channel.receive()
        finally:
            await channel.close()
        if not isinstance(result, Exit):
            raise ProtocolError("the guest answered WAIT with something else than EXIT")
        return result

    async def dial(self, port: int, address: str = "127.0.0.1") -> Channel:
        """Connect to a TCP port inside the guest."""
        return await self._open(OpenKind.DIAL, [(Tag.ADDRESS, address), (Tag.PORT, port)])

    async def write_tree(self, path: str, user: str | None = None) -> Channel:
        """Extract a tar stream below a directory: send it and its end, then receive Exit; `user` becomes the owner."""
        fields: list[tuple[Tag, FieldValue]] = [(Tag.PATH, path)]
        if user is not None:
            fields.append((Tag.USER, user))
        return await self._open(OpenKind.WRITE_TREE, fields)

    async def read_tree(self, path: str, *, follow: bool = False, contents: bool = False) -> Channel:
        """Receive a file or directory as a tar stream: Data, End, Exit.

        `follow`: a symbolic link at the path itself is followed; `contents`: the members of the directory, without it.
        """
        flags = (TreeFlags.FOLLOW if follow else 0) | (TreeFlags.CONTENTS if contents else 0)
        return await self._open(OpenKind.READ_TREE, [(Tag.PATH, path), (Tag.FLAGS, flags)])

    async def health(self) -> Health:
        """How the guest is; the one call that works before it is configured."""
        reply = await self._call(OpenKind.HEALTH)
        exited = None
        if Tag.EXITED in reply:
            number = reply.number(Tag.EXITED)
            exited = decode_exit(number >> 32, number & _U32_MAX)
        return Health(
            state=GuestState(reply.number(Tag.STATE, max(GuestState))),
            agent_version=printable(reply.string(Tag.AGENT)),
            kernel_release=printable(reply.string(Tag.RELEASE)),
            boot_id=printable(reply.string(Tag.BOOT_ID)),
            uptime_ms=reply.number(Tag.UPTIME),
            main_pid=reply.number(Tag.PID, _U32_MAX) if Tag.PID in reply else None,
            exited=exited,
        )

    async def stats(self) -> Stats:
        """Use of CPU, memory, filesystems, network and disks."""
        reply = await self._call(OpenKind.STATS)
        return Stats(
            cpu_total_ms=reply.number(Tag.CPU_TOTAL),
            cpu_busy_ms=reply.number(Tag.CPU_BUSY),
            cpus=reply.number(Tag.CPUS, _U32_MAX),
            memory_total=reply.number(Tag.MEM_TOTAL),
            memory_available=reply.number(Tag.MEM_FREE),
            load=tuple(load / 100 for load in reply.numbers(Tag.LOAD)),
            processes=reply.number(Tag.PROCESSES, _U32_MAX),
            filesystems=tuple(
                FilesystemStats(printable(item.string(Tag.TARGET)), item.number(Tag.SIZE), item.number(Tag.USED))
                for item in reply.nested(Tag.FILESYSTEM)
            ),
            networks=tuple(
                NetStats(printable(item.string(Tag.NAME)), item.number(Tag.RECEIVED), item.number(Tag.SENT))
                for item in reply.nested(Tag.NET)
            ),
            blocks=tuple(
                BlockStats(printable(item.string(Tag.NAME)), item.number(Tag.READ), item.number(Tag.WRITTEN))
                for item in reply.nested(Tag.BLOCK)
            ),
        )

    async def ports(self) -> tuple[Listener, ...]:
        """The TCP and UDP sockets that somebody in the guest listens on."""
        reply = await self._call(OpenKind.PORTS)
        return tuple(_listener(item) for item in reply.nested(Tag.LISTENER))

    async def stat(self, path: str, *, follow: bool = False) -> StatResult:
        """What lstat(2), or with `follow` stat(2), says in the guest. Raises AgentError with its errno."""
        flags = TreeFlags.FOLLOW if follow else 0
        reply = await self._call(OpenKind.STAT, [(Tag.PATH, path), (Tag.FLAGS, flags)])
        return StatResult(
            mode=reply.number(Tag.MODE, _U32_MAX),
            uid=reply.number(Tag.UID, _U32_MAX),
            gid=reply.number(Tag.GID, _U32_MAX),
            size=reply.number(Tag.SIZE),
            mtime_ns=_signed(reply.number(Tag.MTIME)),
            link=reply.string(Tag.LINK) if Tag.LINK in reply else None,
        )

    async def clock(self, time_ns: int) -> None:
        """Set the guest's wall clock to ns since 1970."""
        await self._call(OpenKind.CLOCK, [(Tag.TIME, time_ns)])

    async def reseed(self, entropy: bytes) -> None:
        """Mix entropy into the guest's random pool: a restored guest must not repeat another's numbers."""
        await self._call(OpenKind.RESEED, [(Tag.ENTROPY, entropy)])

    async def grow(self, role: DiskRole) -> int:
        """Grow the filesystem of the overlay or home disk to its disk's size, which is returned in bytes."""
        reply = await self._call(OpenKind.GROW, [(Tag.ROLE, int(role))])
        return reply.number(Tag.SIZE)

    async def shutdown(
        self, mode: ShutdownMode = ShutdownMode.POWER_OFF, grace_ms: int = 10_000, signal: int = 0
    ) -> None:
        """Ask the guest to go down, with `grace_ms` between SIGTERM and SIGKILL; returns before it is down.

        The main command gets `signal` and time to end before all others get SIGTERM; 0: it is one of them.
        """
        fields = [(Tag.MODE, int(mode)), (Tag.GRACE, grace_ms), (Tag.SIGNAL, signal)]
        await self._call(OpenKind.SHUTDOWN, fields)

    async def _call(self, kind: OpenKind, fields: FieldList = ()) -> Fields:
        return await self.session.call(kind, fields, self._timeout)

    async def _open(self, kind: OpenKind, fields: FieldList) -> Channel:
        return await self.session.open(kind, fields, self._timeout)


def _check_old(config: GuestConfig) -> None:
    """Raise AgentError(E2BIG) for an environment that an agent of protocol version 1 refuses without a word of why."""
    longest = max(config.environment, key=lambda name: len(name) + len(config.environment[name]), default="")
    size = len(f"{longest}={config.environment.get(longest, '')}".encode("utf-8", "surrogateescape"))
    if size > _OLD_TEXT or len(config.environment) > _OLD_TEXTS:
        what = f"the variable {longest!r} has {size:,} bytes" if size > _OLD_TEXT else "there are too many variables"
        raise AgentError(
            errno.E2BIG,
            f"{what}, and the agent of this VM, which is from an older banger, takes {_OLD_TEXTS:,} variables of"
            f" {_OLD_TEXT:,} bytes",
            "take it away with 'banger vm set --unset-env NAME', or create the VM anew to give it today's agent",
        )


def _config_fields(config: GuestConfig) -> list[tuple[Tag, FieldValue]]:
    fields: list[tuple[Tag, FieldValue]] = []
    if config.hostname is not None:
        fields.append((Tag.HOSTNAME, config.hostname))
    for interface in config.interfaces:
        nested: list[tuple[Tag, FieldValue]] = [(Tag.MAC, _mac(interface.mac))]
        nested += [(Tag.CIDR, address) for address in interface.addresses]
        nested += [(Tag.GATEWAY, gateway) for gateway in interface.gateways]
        if interface.mtu is not None:
            nested.append((Tag.MTU, interface.mtu))
        fields.append((Tag.INTERFACE, nested))
    for tag, texts in (
        (Tag.NAMESERVER, config.nameservers),
        (Tag.SEARCH, config.search),
        (Tag.HOST, config.hosts),
        (Tag.KEY, config.keys),
        (Tag.VOLUME, config.volumes),
        (Tag.DIRECTORY, config.directories),
    ):
        fields += [(tag, text) for text in texts]
    fields += _environment_fields(config.environment)
    for disk in config.disks:
        nested = [(Tag.SERIAL, disk.serial), (Tag.ROLE, int(disk.role)), (Tag.FSTYPE, disk.fstype)]
        nested += [(Tag.TARGET, disk.target)] if disk.target else []
        fields.append((Tag.DISK, [*nested, (Tag.READONLY, int(disk.readonly))]))
    if config.init is not None:
        fields.append((Tag.INIT, int(config.init)))
        fields += [(Tag.ARG, word) for word in config.words]
        fields += [(Tag.CWD, config.workdir)] if config.workdir else []
    return fields


def _exec_fields(request: ExecRequest, flags: ExecFlags) -> list[tuple[Tag, FieldValue]]:
    fields: list[tuple[Tag, FieldValue]] = [(Tag.ARG, word) for word in request.argv]
    fields += _environment_fields(request.env)
    if request.cwd is not None:
        fields.append((Tag.CWD, request.cwd))
    if request.user is not None:
        fields.append((Tag.USER, request.user))
    if request.terminal is not None:
        rows, columns = request.terminal
        fields.append((Tag.TERMINAL, (rows & 0xFFFF) << 16 | columns & 0xFFFF))
    flags |= ExecFlags.LOG if request.log else ExecFlags(0)
    flags |= ExecFlags.MAIN if request.main else ExecFlags(0)
    flags |= ExecFlags.INIT if request.init else ExecFlags(0)
    return [*fields, (Tag.FLAGS, int(flags))]


def _environment_fields(environment: Mapping[str, str]) -> list[tuple[Tag, FieldValue]]:
    for name in environment:
        if not name or "=" in name:
            raise ValueError(f"{name!r} cannot be the name of an environment variable")
    return [(Tag.ENV, f"{name}={value}") for name, value in environment.items()]


def _mac(text: str) -> bytes:
    mac = bytes.fromhex(text.replace(":", ""))
    if len(mac) != 6:
        raise ValueError(f"{text!r} is not a hardware address")
    return mac


def _listener(item: Fields) -> Listener:
    protocol, address = item.string(Tag.PROTOCOL), item.string(Tag.ADDRESS)
    if protocol not in ("tcp", "udp"):
        raise ProtocolError(f"a listener with the protocol {protocol!r}")
    try:
        address = str(ipaddress.ip_address(address))
    except ValueError:
        raise ProtocolError(f"a listener with the address {address!r}") from None
    return Listener(
        protocol=protocol,
        address=printable(address),
        port=item.number(Tag.PORT, _PORT_MAX),
        pid=item.number(Tag.PID, _U32_MAX) if Tag.PID in item else None,
        process=printable(item.string(Tag.NAME)) if Tag.NAME in item else "",
    )


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
