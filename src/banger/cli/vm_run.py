"""`banger vm run` and `banger vm create`."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable, Iterator

import click

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.codec import Json, decode
from banger.api.errors import BangerError, Code
from banger.cli import terminal
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault, around_guest_command
from banger.cli.lazy import Command
from banger.cli.options import (
    CONDITION,
    DURATION,
    KERNEL,
    PUBLISH,
    SIGNAL,
    SIZE,
    USED_IMAGE,
    VM,
    Decorated,
    FileName,
    Whole,
    auto_stop_option,
    balloon_option,
    configured,
    interactive_option,
    json_option,
    label_option,
    resolve_env,
    restart_option,
)
from banger.cli.progress import Display
from banger.cli.render import format_address, note, print_json
from banger.cli.timings import print_timings
from banger.reasons import in_words

_SEPARATOR = "--"


class _Words(FileName):
    """The words of a command; where the first of them would be an image, it is completed from those there are."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        if isinstance(ctx.command, _ImageFirst) and not ctx.meta[_SEPARATOR] and not ctx.params.get("image"):
            return USED_IMAGE.shell_complete(ctx, param, incomplete)
        return super().shell_complete(ctx, param, incomplete)


class _CommandAfter(Command):
    """Takes a command after `--`, or after --image: any other word could be meant as an image or a name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        found = given.get("command")
        words = [word for word in found if isinstance(word, str)] if isinstance(found, tuple) else []
        options = args[: len(args) - len(words)]
        ctx.meta[_SEPARATOR] = options[-1:] == [_SEPARATOR]
        if words and not ctx.meta[_SEPARATOR] and not given.get("image"):
            args = self.read_first(ctx, options, words)
        return super().parse_args(ctx, args)

    def read_first(self, ctx: click.Context, options: list[str], words: list[str]) -> list[str]:
        """The arguments that are meant by `words` after `options`, without `--` between them."""
        if ctx.resilient_parsing:
            return options
        path, first = ctx.command_path, shlex.quote(words[0])
        named = f"{path} --name {first}" if self.name == "create" else f"banger run {first}"
        raise UsageFault(
            f"what is {words[0]!r}? An image is given with --image, a name with --name, and a command after --",
            f"'{named}', '{path} --image {first}' or '{path} -- {shlex.join(words)}'",
        )


class _ImageFirst(_CommandAfter):
    """As `docker run`: the first word is the image, and all that follows it belongs to the command."""

    def read_first(self, ctx: click.Context, options: list[str], words: list[str]) -> list[str]:
        image, *command = words
        return [*options, "--image", image, _SEPARATOR, *(command[1:] if command[:1] == [_SEPARATOR] else command)]

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        options, *_ = super().collect_usage_pieces(ctx)
        return [options, "[IMAGE [CMD...] | -- CMD...]"]


_MIB = "in binary units: 512M, 1.5GiB"
_OPTIONS = (
    click.option(
        "--image",
        metavar="NAME|REF",
        type=USED_IMAGE,
        help="Image to start from: a local one, or one that is pulled: from a catalog, or docker.io/library/alpine.",
    ),
    click.option("--kernel", type=KERNEL, help="Kernel to boot instead of the image's own."),
    click.option("--name", type=VM, metavar="NAME", help="Name of the VM; one is made up otherwise."),
    click.option(
        "--vcpu",
        type=Whole(1),
        metavar="N",
        help="Number of processors." + configured("2, 1 where it is emulated", "vcpu"),
    ),
    click.option("--memory", type=SIZE, help=f"Memory, {_MIB}." + configured("1 GiB", "memory")),
    click.option(
        "--disk-size", type=SIZE, help=f"Disk for everything but /root, {_MIB}." + configured("16 GiB", "disk_size")
    ),
    click.option("--home-size", type=SIZE, help=f"Disk for /root, {_MIB}." + configured("8 GiB", "home_size")),
    click.option(
        "-e",
        "--env",
        multiple=True,
        metavar="NAME[=VALUE]",
        help="Environment variable; a NAME alone takes your value. Can be given several times.",
    ),
    click.option(
        "-w", "--workdir", default="", metavar="PATH", help="Directory that commands start in; made if missing."
    ),
    click.option("-u", "--user", default="", metavar="NAME[:GROUP]", help="User that commands run as."),
    click.option("--net", type=click.Choice(["none", "user"]), help="Network of the VM.  [default: user]"),
    click.option(
        "-p",
        "--publish",
        type=PUBLISH,
        multiple=True,
        help="Lead a TCP port of this host to one of the guest: on 127.0.0.1 without ADDR, a free one without HOST. "
        "Can be given several times.",
    ),
    click.option(
        "-P",
        "--publish-all",
        is_flag=True,
        help="Lead a free port of 127.0.0.1 to each TCP port that the image exposes.",
    ),
    click.option("--rm", "auto_remove", is_flag=True, help="Remove the VM when it stops."),
    click.option("--init", type=click.Choice(["auto", "agent", "image", "command"]), help="Who is PID 1 in the guest."),
    click.option("--vmm", type=click.Choice(["auto", "firecracker", "qemu"]), help="What runs the VM."),
    click.option("--shell", is_flag=True, help="A login shell, whatever the image's own command is."),
    click.option("--entrypoint", default=None, metavar="PROGRAM", help="Replace the image's entrypoint."),
    label_option,
    auto_stop_option,
    restart_option(" 'vm run' takes this with --detach.  [default: no]"),
    balloon_option,
    click.option("--stop-signal", type=SIGNAL, help="What 'vm stop' sends to CMD first, instead of the image's."),
    click.argument("command", nargs=-1, type=_Words(), metavar="[-- CMD...]"),
)


def _create_options(function: Callable[..., int]) -> Decorated:
    """The options that decide what the VM is; the function gets them as one VmCreate, `create`."""

    @functools.wraps(function)
    def with_request(
        image: str | None,
        kernel: str | None,
        name: str | None,
        vcpu: int | None,
        memory: int | None,
        disk_size: int | None,
        home_size: int | None,
        env: tuple[str, ...],
        workdir: str,
        user: str,
        net: str | None,
        publish: tuple[str, ...],
        publish_all: bool,
        auto_remove: bool,
        init: str | None,
        shell: bool,
        entrypoint: str | None,
        stop_signal: str | None,
        vmm: str | None,
        labels: tuple[tuple[str, str], ...],
        auto_stop: float | None,
        restart: str | None,
        balloon: bool | None,
        command: tuple[str, ...],
        **others: object,
    ) -> int:
        if shell and (command or entrypoint is not None):
            raise UsageFault("--shell goes with neither a command nor --entrypoint")
        if auto_remove and restart not in (None, "no"):
            raise UsageFault("--rm and --restart exclude each other")
        if net == "none" and (publish or publish_all):
            which = "--publish" if publish else "--publish-all"
            raise UsageFault(f"{which} needs a network", "leave out --net none")
        create = m.VmCreate(
            image=image or "",
            kernel=kernel or "",
            name=name or "",
            vcpu=vcpu or 0,
            memory_bytes=memory or 0,
            disk_bytes=disk_size or 0,
            home_bytes=home_size or 0,
            env=resolve_env(env),
            workdir=workdir,
            user=user,
            net=net or "",
            publish=list(publish),
            publish_all=publish_all,
            auto_remove=auto_remove,
            init=init or "",
            entrypoint=entrypoint,
            shell=shell,
            command=list(command),
            stop_signal=stop_signal or "",
            vmm=vmm or "",
            labels=dict(labels),
            auto_stop=auto_stop,
            restart=restart or "",
            balloon=balloon,
        )
        return function(create=create, **others)

    decorated: Decorated = with_request
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


@click.command(
    cls=_CommandAfter,
    context_settings={"allow_interspersed_args": False},
    epilog="""
    banger vm run --rm                                   a shell in a machine that is gone afterwards
    banger vm run --rm -- sh -c 'uname -a; id'           one command in it
    tar c . | banger vm run --rm -- tar t                pipes work
    banger vm run -d --name web -p 8080:80 --memory 1G   stays in the background
    banger vm run -d -P --image NAME                     its ports on free ones of 127.0.0.1
    banger vm run -d --restart on-failure:5 -- serve     comes back when it fails, five times in a row
    banger vm run -d --auto-stop 30m -l tier=dev         stops when nobody uses it
    banger vm run -d --balloon --memory 8G               takes of that what it needs
    banger vm run -d -p 80 --wait-for 80 -- serve        returns when something in it listens on that port
    banger vm run -d --wait-for http://:8080/health      when a GET of this in it succeeds
    banger vm run -d --wait-for 'log:ready to accept'    when its command has printed this
    banger vm run -d --wait-for exec:pg_isready          when this succeeds in its shell
    banger vm run -d --wait-for health                   when the HEALTHCHECK of its image does
    """,
)
@_create_options
@click.option("-d", "--detach", is_flag=True, help="Leave it running in the background and print its name.")
@click.option(
    "--wait-for",
    type=CONDITION,
    metavar="CONDITION",
    help="With --detach: return when it is ready, as in the examples; fail when the VM or its command ends first.",
)
@click.option(
    "--wait-timeout",
    type=DURATION,
    help="With --wait-for: no longer than this; the VM stays." + configured("60s", "wait_timeout"),
)
@click.option("-t", "--tty", is_flag=True, help="A terminal for the command even when this is none.")
@interactive_option
@click.option("--timings", is_flag=True, help="Tell how long each stage took.")
@click.option("--json", "as_json", is_flag=True, help="With --detach: print the VM as one JSON document.")
def run(
    create: m.VmCreate,
    detach: bool,
    wait_for: str | None,
    wait_timeout: float | None,
    tty: bool,
    timings: bool,
    as_json: bool,
) -> int:
    """Create a VM, start it and run CMD in it: by default the image's own command, or a login shell.

    Exits with the command's status; 125 when banger failed, 126 when CMD cannot be executed, 127 when there is none,
    124 when it is not ready in time (--wait-for). The VM stays afterwards, also one that fails to start, unless --rm
    is given; Ctrl-C while it starts leaves nothing.

    CMD comes after `--`, or after --image. Options of CMD are its own.
    """
    if detach and tty:
        raise UsageFault("--tty and --detach exclude each other", "leave out -t: 'banger logs VM' shows what it prints")
    if create.restart not in ("", "no") and not detach:
        raise UsageFault("--restart goes with --detach: a command run from here is run once", "add -d")
    if as_json and not detach:
        raise UsageFault("--json goes with --detach: otherwise the output is the command's own")
    if wait_for and not detach:
        raise UsageFault("--wait-for goes with --detach: a command run from here shows by itself", "add -d")
    if wait_timeout is not None and not wait_for:
        raise UsageFault("--wait-timeout goes with --wait-for", "for example --wait-for 80")
    with around_guest_command(), _options_told(create), Display() as display:
        client = ensure_daemon()
        if detach:
            started = _run_detached(
                client, m.VmRun(create, detach=True, wait_for=wait_for or "", wait_timeout=wait_timeout), display
            )
            display.close()
            _tell_ports(create, started.vm)
            if as_json:
                print_json(started.vm)
            else:
                print(started.vm.name)
            status = 0
        else:
            status, started = _run_attached(client, create, tty, display)
    if timings:
        print_timings(started)
    return status


run_image = _ImageFirst(
    "run",
    params=run.params,
    callback=run.callback,
    context_settings=run.context_settings,
    help="""Start a VM of IMAGE and run CMD in it: by default the image's own command, or a login shell.

    The first word that is no option is the image, and all that follows belongs to CMD, options too. Without an image,
    put `--` before CMD: the default image is started.

    Exits with the command's status; 125 when banger failed, 126 when CMD cannot be executed, 127 when there is none,
    124 when it is not ready in time (--wait-for). The VM stays afterwards unless --rm is given.""",
    epilog="""
    banger run --rm                                   a shell in a machine that is gone afterwards
    banger run --rm -- uname -a                       one command in the default image
    banger run --rm alpine                            a shell in another image, which is pulled when it is missing
    banger run --rm alpine ls -l /                    one command in it
    banger run -d --name web -p 8080:80 nginx         stays in the background
    """,
)


@click.command(
    cls=_CommandAfter,
    context_settings={"allow_interspersed_args": False},
    epilog="""
    banger vm create --name web -p 8080:80
    banger vm start web
    """,
)
@_create_options
@json_option
def create(create: m.VmCreate, as_json: bool) -> int:
    """Create a VM without starting it, and print its name. CMD becomes its main command."""
    with Display() as display:
        vm = ensure_daemon().call(op.VM_CREATE, create, display.reporter("creating"))
    _tell_ports(create, vm)
    if as_json:
        print_json(vm)
    else:
        print(vm.name)
    return 0


@contextlib.contextmanager
def _options_told(create: m.VmCreate) -> Iterator[None]:
    """Where an option was run as a command, say where options stand."""
    try:
        yield
    except BangerError as error:
        if error.code is Code.COMMAND_NOT_FOUND and create.command[:1] and create.command[0].startswith("-"):
            error.hint = "options of banger stand before the image and the command: banger run -it IMAGE CMD"
        raise


def _run_detached(client: Client, request: m.VmRun, display: Display) -> m.VmStarted:
    with client.open(op.VM_RUN, request) as stream:
        started = _decode_started(terminal.wait_started(stream, display.reporter("starting")))
        if request.wait_for:
            display.close()
            if terminal.on_terminal():
                note(f"{started.vm.name} runs; waiting until it is ready")
            terminal.copy_output(stream)
        return started


def _run_attached(client: Client, create: m.VmCreate, tty: bool, display: Display) -> tuple[int, m.VmStarted]:
    started: list[m.VmStarted] = []

    def on_started(result: Json) -> None:
        display.close()
        started.append(_decode_started(result))
        _tell_ports(create, started[0].vm)

    wants_terminal = tty or terminal.on_terminal()
    request = m.VmRun(
        create,
        terminal=terminal.terminal_size() if wants_terminal else None,
        env=terminal.terminal_env() if wants_terminal else [],
    )
    stream = client.open(op.VM_RUN, request)
    status = terminal.Session(stream, wants_terminal, display.reporter("starting"), on_started).run()
    if not started:
        raise terminal.went_away()
    if terminal.on_terminal() and not create.auto_remove:
        _tell_if_running(client, started[0].vm)
    return status, started[0]


def _tell_ports(create: m.VmCreate, vm: m.VmInfo) -> None:
    """Say on standard error which ports of the host banger chose, and what was not published."""
    without_host = [text for text in create.publish if ":" not in text]
    for port in vm.ports:
        if create.publish_all or str(port.guest_port) in without_host:
            note(f"{format_address(port)} leads to port {port.guest_port} of {vm.name}")
    left = [port for port in vm.exposed_ports if not port.endswith("/tcp")]
    if create.publish_all and left:
        note(f"not published, since only TCP ports are: {', '.join(left)}")


def _tell_if_running(client: Client, vm: m.VmInfo) -> None:
    # the command's status counts, whatever becomes of this courtesy
    with contextlib.suppress(BangerError):
        if client.call(op.VM_SHOW, m.VmRef(vm.id)).state == "running":
            note(f"VM {vm.name} is still running; stop it with: banger vm stop {vm.name}")


def _decode_started(result: Json) -> m.VmStarted:
    try:
        return decode(m.VmStarted, result)
    except ValueError as error:
        raise BangerError(Code.DAEMON, f"the daemon's answer to vm.run makes no sense: {in_words(error)}") from error
