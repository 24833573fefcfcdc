"""The composition root: makes the services, maps operations to them, and serves the socket."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from banger import __version__, doctor, system
from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.daemon import logs
from banger.daemon.balloon import Balloons
from banger.daemon.bodies import MAX_BODY
from banger.daemon.event_log import EventLog
from banger.daemon.events import Events
from banger.daemon.host_network import HostNetwork
from banger.daemon.http import CallHandler, Handlers, Requests, StreamHandler, build_app
from banger.daemon.image_service import ImageService
from banger.daemon.jobs import Report, Workers
from banger.daemon.kernel_service import KernelService
from banger.daemon.operations import Noting, Operation, Operations, noting, subject
from banger.daemon.sessions import Sessions
from banger.daemon.streams import Peer
from banger.daemon.vm_forwards import Forwards
from banger.daemon.vm_launch import Launcher
from banger.daemon.vm_lifecycle import Lifecycle
from banger.daemon.vm_load import kept_records
from banger.daemon.vm_observer import VmObserver
from banger.daemon.vm_ports import VmPorts
from banger.daemon.vm_readiness import Readiness
from banger.daemon.vm_recovery import Recovery
from banger.daemon.vm_service import VmService
from banger.daemon.vm_settings import VmSettings
from banger.daemon.vm_stats import VmStats
from banger.daemon.vm_supervisor import Supervisor
from banger.daemon.vm_table import VmTable
from banger.daemon.vm_top import VmTop
from banger.installation import PACKAGE
from banger.job import Job
from banger.paths import Layout, ensure_runtime
from banger.store.database import Store
from banger.vmm.choice import choose
from banger.vmm.firecracker import FirecrackerDriver
from banger.vmm.qemu import QemuDriver

_log = logging.getLogger(__name__)
_SHUTDOWN_SECONDS = 5
_WAITING = {op.VM_WAIT.name, op.OPERATION_WATCH.name}  # long, but they do nothing that others could cancel


class Daemon:
    """Holds the services and what they share; forwards operations to them."""

    def __init__(self, layout: Layout, config: Config) -> None:
        self._layout = layout
        self._config = config
        self._started = time.monotonic()
        self._stop = asyncio.Event()
        self._operations = Operations()
        self._workers = Workers()
        self._store = Store(layout.database, lambda: kept_records(layout))
        publication = threading.Lock()
        table, network = VmTable(), HostNetwork()
        drivers = {driver.name: driver for driver in (QemuDriver(), FirecrackerDriver(config))}
        self._events = events = Events(EventLog(layout.event_log))
        self._kernels = KernelService(layout, config, self._workers, publication, table)
        self._images = ImageService(layout, config, self._workers, publication, table, self._kernels)
        launcher = Launcher(layout, config, self._workers, network, drivers, table, events)
        self._lifecycle = Lifecycle(layout, config, self._store, self._workers, launcher, table, events)
        self._recovery = Recovery(layout, self._store, self._workers, table, self._lifecycle, events)
        self._vms = VmService(
            *(layout, config, self._store, self._workers, publication, network, table, self._lifecycle, self._images),
            events,
        )
        self._settings = VmSettings(layout, network, table, self._lifecycle, self._vms, events)
        self._forwards = Forwards(table, events)
        readiness = Readiness(table, self._vms, self._forwards, events)
        self._observer = VmObserver(layout, table, self._vms, readiness, events)
        self._ports = VmPorts(self._vms, self._forwards)
        self._top = VmTop(self._vms)
        self._stats = VmStats(self._workers, table, self._vms)
        self._supervisor = Supervisor(table, self._lifecycle, events)
        self._balloons = Balloons(table, events)
        self._sessions = Sessions(config, self._vms, self._lifecycle, self._images, readiness)

    async def recover(self) -> None:
        """Bring the state directory in order and take over running VMs."""
        for directory in (
            self._layout.kernels,
            *self._layout.kernels.glob("[!.]*/"),  # a boot archive is made in the directory of its kernel
            self._layout.kernel_catalogs,
            self._layout.images,
            self._layout.image_catalogs,
            self._layout.cache,
            self._layout.blobs,
            self._layout.ssh_key.parent,
        ):
            for leftover in await self._workers.run(functools.partial(_sweep, directory)):
                _log.info("removed what an interrupted operation left: %s", leftover)
        await self._recovery.run()
        self._supervisor.begin()
        self._balloons.begin()
        self._forwards.begin()

    async def stopped(self) -> None:
        """Return when somebody has asked the daemon to stop."""
        await self._stop.wait()

    def stop(self) -> None:
        self._stop.set()

    async def cancel(self) -> None:
        """Cancel all that is under way and wait until it is undone; its clients are told."""
        await self._operations.stop()

    async def close(self) -> None:
        """Let go of everything; VMs go on."""
        await self._supervisor.close()
        await self._balloons.close()
        await self._forwards.close()
        await self._lifecycle.close()
        self._workers.close()
        self._store.close()
        self._events.close()

    def handlers(self) -> Handlers:
        """What serves each operation of the table."""
        kernels, images, vms, sessions = self._kernels, self._images, self._vms, self._sessions
        calls: dict[str, CallHandler] = {
            op.KERNEL_LIST.name: kernels.list,
            op.KERNEL_SHOW.name: kernels.show,
            op.KERNEL_DELETE.name: kernels.delete,
            op.KERNEL_IMPORT.name: kernels.import_,
            op.KERNEL_PULL.name: kernels.pull,
            op.KERNEL_CATALOG.name: kernels.catalog,
            op.KERNEL_VERIFY.name: kernels.verify,
            op.KERNEL_EXPORT.name: kernels.export,
            op.KERNEL_CATALOG_ADD.name: kernels.catalogs.add,
            op.KERNEL_CATALOG_LIST.name: kernels.catalogs.list,
            op.KERNEL_CATALOG_DELETE.name: kernels.catalogs.delete,
            op.KERNEL_CATALOG_REFRESH.name: kernels.catalogs.refresh,
            op.IMAGE_LIST.name: images.image_list,
            op.IMAGE_SHOW.name: images.image_show,
            op.IMAGE_DELETE.name: images.image_delete,
            op.IMAGE_IMPORT.name: images.image_import,
            op.IMAGE_REGISTER.name: images.image_register,
            op.IMAGE_PROMOTE.name: images.image_promote,
            op.IMAGE_TAG.name: images.image_tag,
            op.IMAGE_HISTORY.name: images.image_history,
            op.IMAGE_PRUNE.name: images.image_prune,
            op.IMAGE_VERIFY.name: images.image_verify,
            op.IMAGE_EXPORT.name: images.image_export,
            op.IMAGE_PULL.name: images.image_pull,
            op.IMAGE_CACHE_LIST.name: images.image_cache_list,
            op.IMAGE_CACHE_PRUNE.name: images.image_cache_prune,
            op.IMAGE_CACHE_VERIFY.name: images.image_cache_verify,
            op.IMAGE_CATALOG.name: images.image_catalog,
            op.IMAGE_CATALOG_ADD.name: images.catalogs.add,
            op.IMAGE_CATALOG_LIST.name: images.catalogs.list,
            op.IMAGE_CATALOG_DELETE.name: images.catalogs.delete,
            op.IMAGE_CATALOG_REFRESH.name: images.catalogs.refresh,
            op.VM_LIST.name: vms.list,
            op.VM_SHOW.name: vms.show,
            op.VM_CREATE.name: vms.create,
            op.VM_START.name: vms.start,
            op.VM_STOP.name: vms.stop,
            op.VM_RESTART.name: vms.restart,
            op.VM_KILL.name: vms.kill,
            op.VM_DELETE.name: vms.delete,
            op.VM_PRUNE.name: vms.prune,
            op.VM_STAT.name: vms.stat,
            op.VM_SET.name: self._settings.set,
            op.VM_WAIT.name: self._observer.wait,
            op.VM_INSPECT.name: self._observer.inspect,
            op.VM_PORTS.name: self._ports.ports,
            op.VM_TOP.name: self._top.top,
            op.VM_STATS.name: self._stats.stats,
            op.OPERATION_LIST.name: self._operations.list,
            op.OPERATION_WATCH.name: self._operations.watch,
            op.OPERATION_CANCEL.name: self._operations.cancel,
            op.DAEMON_STATUS.name: self._status,
            op.DAEMON_STOP.name: self._stop_daemon,
            op.DAEMON_DOCTOR.name: self._doctor,
        }
        streams: dict[str, StreamHandler] = {
            op.VM_RUN.name: sessions.run,
            op.VM_EXEC.name: sessions.exec,
            op.VM_WRITE_TREE.name: sessions.write_tree,
            op.VM_READ_TREE.name: sessions.read_tree,
            op.VM_LOGS.name: self._vm_logs,
            op.VM_CONSOLE.name: sessions.console,
            op.VM_EVENTS.name: self._observer.events,
            op.DAEMON_LOGS.name: self._daemon_logs,
        }
        return Handlers(
            {call.name: self._counted_call(call, calls[call.name]) for call in op.CALLS},
            {stream.name: self._counted_stream(stream, streams[stream.name]) for stream in op.STREAMS},
        )

    def _counted_call(self, call: op.Call[object, object], handler: CallHandler) -> CallHandler:
        shown = call.long and call.name not in _WAITING

        async def serve(request: object, report: Report) -> object:
            operation = Operation(call.name, subject(request), shown)
            return await self._operations.run(operation, handler(request, noting(operation, report)))

        return serve

    def _counted_stream(self, stream: op.Stream[object, object], handler: StreamHandler) -> StreamHandler:
        async def serve(request: object, peer: Peer) -> None:
            operation = Operation(stream.name, subject(request), stream.long)
            await self._operations.run(operation, handler(request, Noting(peer, operation)))

        return serve

    async def _status(self, request: m.Empty, report: Report) -> m.DaemonStatus:
        choice = await self._workers.run(lambda job: choose(self._config, net="user"))
        return m.DaemonStatus(
            pid=os.getpid(),
            socket=str(self._layout.socket),
            version=__version__,
            uptime=time.monotonic() - self._started,
            resident_bytes=_resident_bytes(),
            state_directory=str(self._layout.state),
            log_file=str(self._layout.log_file),
            vms_running=self._vms.running,
            busy=len(self._operations) - 1,
            driver=f"{choice.driver} ({choice.accelerator})",
            driver_reason=choice.reason,
            warnings=[f"the database was damaged: it is kept as {aside}"] if (aside := self._store.set_aside) else [],
            installation=str(PACKAGE),
            executable=sys.executable,
            activated=_activated(),
        )

    async def _stop_daemon(self, request: m.Empty, report: Report) -> m.Empty:
        self.stop()
        return m.Empty()

    async def _doctor(self, request: m.Empty, report: Report) -> m.Doctor:
        return await self._workers.run(lambda job: doctor.look())

    async def _vm_logs(self, request: m.VmLogs, peer: Peer) -> None:
        vm = self._vms.find(request.vm)
        directory = self._layout.vm(vm.record.id)
        path = directory / ("console.log" if request.console else "main.log")
        follow = (lambda: vm.goes_on) if request.follow else None
        await _send_log(peer, path, not request.console, request.tail, follow)

    async def _daemon_logs(self, request: m.DaemonLogs, peer: Peer) -> None:
        follow = (lambda: not self._stop.is_set()) if request.follow else None
        await _send_log(peer, self._layout.log_file, False, request.tail, follow)


async def _send_log(peer: Peer, path: Path, records: bool, tail: int | None, follow: Callable[[], bool] | None) -> None:
    async def send() -> None:
        async for stream, data in logs.read(path, records, tail, follow):
            await peer.send_data(stream, data)

    await peer.send_event("started", result={})
    sending = asyncio.create_task(send())
    gone = asyncio.create_task(peer.gone())
    try:
        await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
            await peer.send_event("exit", signalled=False, value=0)
    finally:
        for task in (sending, gone):
            task.cancel()
        await asyncio.gather(sending, gone, return_exceptions=True)


def _sweep(directory: Path, job: Job) -> list[Path]:
    return system.sweep_staging(directory)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _PrivateListener(socket.socket):
    """A listening Unix socket that accepts connections of this user and root only (SO_PEERCRED, unix(7))."""

    def accept(self) -> tuple[socket.socket, object]:
        client, address = super().accept()
        _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (os.getuid(), 0):
            client.close()
            raise ConnectionAbortedError
        return client, address


def listen(layout: Layout) -> socket.socket:
    """The daemon's listening socket: the one that systemd passed (sd_listen_fds(3)), else our own, mode 0600."""
    if _activated():
        return _PrivateListener(fileno=3)
    return _PrivateListener(fileno=system.bind_unix(layout.socket).detach())


def _activated() -> bool:
    """Whether systemd has passed the socket, which then stays its own."""
    return os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1"


def claim(layout: Layout) -> int:
    """Hold the lock that makes this the only daemon of its user; raises BangerError(DAEMON) when there is one."""
    ensure_runtime(layout.runtime)
    lock = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise BangerError(
            Code.DAEMON, f"a daemon already runs on {layout.socket}", hint="see 'banger daemon status'"
        ) from error
    return lock


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would end before the daemon has let go of its VMs."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(layout: Layout, config: Config, ready: Callable[[], None]) -> None:
    """Run a daemon until it is asked to stop; calls `ready` once it answers."""
    _log.info("the daemon of banger %s starts, pid %d", __version__, os.getpid())
    daemon = Daemon(layout, config)
    try:
        await daemon.recover()
        listener = listen(layout)
        requests = Requests(build_app(daemon.handlers()))
        server = _Server(
            uvicorn.Config(
                requests,
                http="httptools",
                ws="websockets-sansio",
                ws_max_size=MAX_BODY,
                ws_per_message_deflate=False,
                ws_ping_interval=None,
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, daemon.stop)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        ready()  # the socket listens already: what connects now is answered as soon as the loop turns
        await asyncio.wait((serving, asyncio.create_task(daemon.stopped())), return_when=asyncio.FIRST_COMPLETED)
        if not _activated():
            layout.socket.unlink(missing_ok=True)
        try:
            async with asyncio.timeout(_SHUTDOWN_SECONDS):
                await daemon.cancel()
                await requests.answered()  # uvicorn would cut streams off before they tell why they end
        except TimeoutError:  # mostly a client that is there and takes nothing
            for connection in server.server_state.connections:
                connection.transport.abort()
        server.should_exit = True
        await serving
    finally:
        await daemon.close()
        _log.info("the daemon stops; VMs go on")
