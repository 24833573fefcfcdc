"""A client of Firecracker's API, which mirrors its specification (src/firecracker/swagger/firecracker.yaml there).

One dataclass a request body, with the specification's names; what is None is left out, since Firecracker refuses keys
that its version does not know. Keys that this client does not know are ignored in replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from banger.api import http1
from banger.api.codec import Json, decode, encode
from banger.api.errors import BangerError, Code
from banger.system import connect_unix
from banger.vmm.words import own_words

_CALL_SECONDS = 30.0
_SNAPSHOT_SECONDS = 600.0
_REPLY_LIMIT = 1 << 20  # bytes; a configuration is some kilobytes

Reply = TypeVar("Reply")


# Request bodies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenBucket:
    """`size` tokens (bytes or operations), refilled within `refill_time` ms; `one_time_burst` more at the beginning."""

    size: int
    refill_time: int
    one_time_burst: int | None = None


@dataclass(frozen=True)
class RateLimiter:
    bandwidth: TokenBucket | None = None
    ops: TokenBucket | None = None


@dataclass(frozen=True)
class MachineConfiguration:
    """`cpu_template` is one of the static ones: C3, T2, T2S, T2CL, T2A, V1N1."""

    vcpu_count: int
    mem_size_mib: int
    smt: bool | None = None
    cpu_template: str | None = None
    track_dirty_pages: bool | None = None
    huge_pages: str | None = None


@dataclass(frozen=True)
class BootSource:
    kernel_image_path: str
    initrd_path: str | None = None
    boot_args: str | None = None


@dataclass(frozen=True)
class Drive:
    """`cache_type` is Unsafe (the guest cannot flush) or Writeback."""

    drive_id: str
    path_on_host: str
    is_read_only: bool
    is_root_device: bool = False
    cache_type: str | None = None
    io_engine: str | None = None
    rate_limiter: RateLimiter | None = None


@dataclass(frozen=True)
class PartialDrive:
    """After the start: another file, or the same one that has grown, and other limits."""

    drive_id: str
    path_on_host: str | None = None
    rate_limiter: RateLimiter | None = None


@dataclass(frozen=True)
class NetworkInterface:
    iface_id: str
    host_dev_name: str
    guest_mac: str | None = None
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None


@dataclass(frozen=True)
class PartialNetworkInterface:
    iface_id: str
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None


@dataclass(frozen=True)
class Vsock:
    guest_cid: int
    uds_path: str


@dataclass(frozen=True)
class EntropyDevice:
    rate_limiter: RateLimiter | None = None


@dataclass(frozen=True)
class Balloon:
    """`free_page_reporting` since 1.14."""

    amount_mib: int
    deflate_on_oom: bool
    stats_polling_interval_s: int | None = None
    free_page_reporting: bool | None = None


@dataclass(frozen=True)
class BalloonUpdate:
    amount_mib: int


@dataclass(frozen=True)
class BalloonStatsUpdate:
    stats_polling_interval_s: int


@dataclass(frozen=True)
class Logger:
    log_path: str | None = None
    level: str | None = None
    show_level: bool | None = None
    show_log_origin: bool | None = None
    module: str | None = None


@dataclass(frozen=True)
class Metrics:
    metrics_path: str


@dataclass(frozen=True)
class SerialDevice:
    """Where the console goes instead of standard output; since 1.14."""

    serial_out_path: str | None = None


@dataclass(frozen=True)
class SnapshotCreateParams:
    """`snapshot_type` is Full or Diff."""

    snapshot_path: str
    mem_file_path: str
    snapshot_type: str = "Full"


@dataclass(frozen=True)
class MemoryBackend:
    """`backend_type` is File or Uffd."""

    backend_path: str
    backend_type: str = "File"


@dataclass(frozen=True)
class NetworkOverride:
    """Another tap for a restored interface; since 1.12."""

    iface_id: str
    host_dev_name: str


@dataclass(frozen=True)
class SnapshotLoadParams:
    """`track_dirty_pages` replaces `enable_diff_snapshots` since 1.13."""

    snapshot_path: str
    mem_backend: MemoryBackend
    enable_diff_snapshots: bool | None = None
    track_dirty_pages: bool | None = None
    resume_vm: bool | None = None
    network_overrides: list[NetworkOverride] | None = None


# Replies -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InstanceInfo:
    """`state` is Not started, Running or Paused."""

    id: str
    state: str
    vmm_version: str
    app_name: str = ""


@dataclass(frozen=True)
class FirecrackerVersion:
    firecracker_version: str


@dataclass(frozen=True)
class BalloonStats:
    """What the balloon holds, and, once the guest has told it, the guest's own view in bytes."""

    target_mib: int
    actual_mib: int
    free_memory: int | None = None
    total_memory: int | None = None
    available_memory: int | None = None
    disk_caches: int | None = None


class FirecrackerApi:
    """One connection to one Firecracker; requests are answered one after the other.

    Answers may take `timeout` seconds, those about snapshots longer. Every method raises BangerError(GUEST): with
    Firecracker's own words when it refuses, when it does not answer in time, or when it has ended. A connection whose
    answer nobody waits for any more is dropped, and the next request makes another.
    """

    def __init__(self, path: Path, timeout: float = _CALL_SECONDS) -> None:
        self._path = path
        self._timeout = timeout
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._closed = False
        self._turn = asyncio.Lock()

    @classmethod
    async def connect(cls, path: Path, timeout: float = _CALL_SECONDS) -> FirecrackerApi:
        """Connect to the API socket at `path`; raises OSError when nobody listens there."""
        api = cls(path, timeout)
        api._streams = await _open(path)
        return api

    def close(self) -> None:
        """Drop the connection for good; Firecracker goes on."""
        self._closed = True
        self._drop()

    # General ---------------------------------------------------------------------------------------------------------

    async def describe_instance(self) -> InstanceInfo:
        return await self._get("/", InstanceInfo)

    async def get_version(self) -> str:
        """The version of the process, such as 1.12.1."""
        return (await self._get("/version", FirecrackerVersion)).firecracker_version

    async def get_vm_config(self) -> Json:
        """Everything that is configured, in the words of `--config-file`."""
        return await self._request("GET", "/vm/config")

    # Before the start ------------------------------------------------------------------------------------------------

    async def put_machine_configuration(self, body: MachineConfiguration) -> None:
        await self._send("PUT", "/machine-config", body)

    async def get_machine_configuration(self) -> MachineConfiguration:
        return await self._get("/machine-config", MachineConfiguration)

    async def put_cpu_configuration(self, template: Json) -> None:
        """A custom CPU template, in the form that Firecracker's documentation gives (docs/cpu_templates)."""
        await self._request("PUT", "/cpu-config", template)

    async def put_boot_source(self, body: BootSource) -> None:
        await self._send("PUT", "/boot-source", body)

    async def put_drive(self, body: Drive) -> None:
        await self._send("PUT", f"/drives/{body.drive_id}", body)

    async def put_network_interface(self, body: NetworkInterface) -> None:
        await self._send("PUT", f"/network-interfaces/{body.iface_id}", body)

    async def put_vsock(self, body: Vsock) -> None:
        await self._send("PUT", "/vsock", body)

    async def put_entropy(self, body: EntropyDevice) -> None:
        await self._send("PUT", "/entropy", body)

    async def put_balloon(self, body: Balloon) -> None:
        await self._send("PUT", "/balloon", body)

    async def put_logger(self, body: Logger) -> None:
        await self._send("PUT", "/logger", body)

    async def put_metrics(self, body: Metrics) -> None:
        await self._send("PUT", "/metrics", body)

    async def put_serial(self, body: SerialDevice) -> None:
        await self._send("PUT", "/serial", body)

    async def load_snapshot(self, body: SnapshotLoadParams) -> None:
        """In a process that nothing but logger and metrics has been configured of."""
        await self._send("PUT", "/snapshot/load", body, _SNAPSHOT_SECONDS)

    # Actions ---------------------------------------------------------------------------------------------------------

    async def instance_start(self) -> None:
        await self._action("InstanceStart")

    async def send_ctrl_alt_del(self) -> None:
        """Press these keys, on x86 only: a guest's init takes that as a wish to restart, which ends Firecracker."""
        await self._action("SendCtrlAltDel")

    async def flush_metrics(self) -> None:
        await self._action("FlushMetrics")

    # After the start -------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        await self._request("PATCH", "/vm", {"state": "Paused"})

    async def resume(self) -> None:
        await self._request("PATCH", "/vm", {"state": "Resumed"})

    async def create_snapshot(self, body: SnapshotCreateParams) -> None:
        """Of a guest that is paused; a Diff one holds the pages changed since the last, when they are tracked."""
        await self._send("PUT", "/snapshot/create", body, _SNAPSHOT_SECONDS)

    async def patch_drive(self, body: PartialDrive) -> None:
        await self._send("PATCH", f"/drives/{body.drive_id}", body)

    async def patch_network_interface(self, body: PartialNetworkInterface) -> None:
        await self._send("PATCH", f"/network-interfaces/{body.iface_id}", body)

    async def get_balloon(self) -> Balloon:
        return await self._get("/balloon", Balloon)

    async def patch_balloon(self, body: BalloonUpdate) -> None:
        await self._send("PATCH", "/balloon", body)

    async def get_balloon_statistics(self) -> BalloonStats:
        return await self._get("/balloon/statistics", BalloonStats)

    async def patch_balloon_statistics(self, body: BalloonStatsUpdate) -> None:
        await self._send("PATCH", "/balloon/statistics", body)

    # Transport -------------------------------------------------------------------------------------------------------

    async def _action(self, name: str) -> None:
        await self._request("PUT", "/actions", {"action_type": name})

    async def _get(self, target: str, kind: type[Reply]) -> Reply:
        reply = await self._request("GET", target)
        try:
            return decode(kind, reply)
        except ValueError as error:
            why = own_words(error)
            raise BangerError(Code.GUEST, f"Firecracker's answer to GET {target} makes no sense: {why}") from error

    async def _send(self, method: str, target: str, body: object, seconds: float | None = None) -> None:
        await self._request(method, target, _without_none(encode(body)), seconds)

    async def _request(self, method: str, target: str, body: Json = None, seconds: float | None = None) -> Json:
        seconds = self._timeout if seconds is None else seconds
        content = b"" if body is None else json.dumps(body).encode()
        headers = {"Host": "localhost", "Content-Type": "application/json"}
        try:
            async with self._turn, asyncio.timeout(seconds), self._connection() as (reader, writer):
                writer.write(http1.format_request(method, target, headers, content))
                status, reply = await _response(reader)
        except TimeoutError as error:
            raise BangerError(Code.GUEST, f"Firecracker did not answer {method} {target} for {seconds:g} s") from error
        except BlockingIOError as error:  # too many have connected, of which it has noticed none
            raise BangerError(Code.GUEST, "Firecracker takes no connections") from error
        except (OSError, EOFError, ValueError, RecursionError, asyncio.LimitOverrunError) as error:
            raise BangerError(Code.GUEST, "Firecracker has ended") from error
        if status >= 400:
            raise BangerError(Code.GUEST, f"Firecracker refused {method} {target}: {_fault(reply)}")
        return reply

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """The connection, or a new one, for one request; one that was not answered whole is the last on it.

        An answer that comes late must not be taken for that of the next request.
        """
        if self._closed:
            raise EOFError
        if self._streams is None or self._streams[0].at_eof() or self._streams[1].is_closing():
            self._drop()
            self._streams = await _open(self._path)
        try:
            if self._closed:  # meanwhile
                raise EOFError
            yield self._streams
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _open(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    connection = connect_unix(path, timeout=0)
    connection.setblocking(False)
    return await asyncio.open_unix_connection(sock=connection, limit=_REPLY_LIMIT)


async def _response(reader: asyncio.StreamReader) -> tuple[int, Json]:
    head = http1.read_response(io.BytesIO(await reader.readuntil(b"\r\n\r\n")))
    size = int(head.headers.get("content-length", "0"))
    if not 0 <= size <= _REPLY_LIMIT:
        raise ValueError(f"a reply of {size} bytes")
    body = await reader.readexactly(size)
    return head.status, json.loads(body) if body else None


def _fault(reply: Json) -> str:
    """Firecracker's own words on one line."""
    message = reply.get("fault_message") if isinstance(reply, dict) else None
    return own_words(message or "without a reason")


def _without_none(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def drive_serial(path: Path) -> str:
    """What a guest sees as the serial of a drive: device and inode of its file (build_device_id in Firecracker)."""
    status = path.lstat()
    return f"{status.st_dev}{status.st_rdev}{status.st_ino}"[:20]  # VIRTIO_BLK_ID_BYTES
