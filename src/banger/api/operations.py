"""The table of operations: server, client and documentation all come from it.

Calls are `POST /v1/<name>` with a JSON body. A long call asked for with `Accept: application/x-ndjson` answers with
`{"event": "progress", ...}` lines and one last `result` or `error` line; its client going away cancels it.

Streams are a WebSocket at `/v1/<name>`. The client's first text message is the request. Then binary messages carry
data behind one byte that names the stream (0 stdin or stdout, 2 stderr), and text messages are JSON objects:

to the daemon      {"type": "end"}, {"type": "resize", "rows": R, "columns": C}, {"type": "signal", "number": N}
to the client      {"event": "progress", ...} as above
                   {"event": "started", "result": ...}   the command runs or the transfer has begun
                   {"event": "window", "bytes": N}        so many more bytes of input may be sent
                   {"event": "vm", "result": ..., "missed": N}   of vm.events: one event, after N that were lost
                   {"event": "exit", "signalled": bool, "value": N}   the last message after success
                   {"event": "error", "error": ...}       the last message after a failure
A client may send STREAM_WINDOW bytes of input before the first window message, so that a signal is never stuck behind
input that the guest does not take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from banger.api import models as m

Request = TypeVar("Request")
Response = TypeVar("Response")

STREAM_WINDOW = 1 << 20
FETCHING = "fetching"  # the stage of progress that begins what may take minutes; its message says what
STDIN, STDOUT, STDERR = 0, 0, 2


@dataclass(frozen=True)
class Call(Generic[Request, Response]):
    """One request, one response; `long` ones report progress and can be cancelled."""

    name: str
    request: type[Request]
    response: type[Response]
    summary: str
    long: bool = False


@dataclass(frozen=True)
class Stream(Generic[Request, Response]):
    """A WebSocket: bytes both ways after `request`; `response` is the result in the started event.

    `long` ones report progress before that.
    """

    name: str
    request: type[Request]
    response: type[Response]
    summary: str
    long: bool = False


KERNEL_LIST = Call("kernel.list", m.Empty, m.KernelList, "List the local kernels.")
KERNEL_SHOW = Call("kernel.show", m.NameRequest, m.KernelInfo, "Show one local kernel.")
KERNEL_DELETE = Call("kernel.delete", m.KernelDelete, m.Empty, "Remove a local kernel.")
KERNEL_IMPORT = Call("kernel.import", m.KernelImport, m.KernelInfo, "Import a kernel from files.", long=True)
KERNEL_PULL = Call("kernel.pull", m.KernelPull, m.KernelInfo, "Fetch a kernel of a catalog or registry.", long=True)
KERNEL_CATALOG = Call("kernel.catalog", m.Empty, m.KernelCatalog, "List the kernels that can be pulled.")
KERNEL_VERIFY = Call("kernel.verify", m.KernelVerify, m.KernelChecks, "Read local kernels again.", long=True)
KERNEL_EXPORT = Call("kernel.export", m.KernelExport, m.BundleEntry, "Write a kernel as a bundle.", long=True)
KERNEL_CATALOG_ADD = Call("kernel.catalog.add", m.CatalogAdd, m.CatalogInfo, "Add a catalog.", long=True)
KERNEL_CATALOG_LIST = Call("kernel.catalog.list", m.Empty, m.CatalogList, "List the catalogs.")
KERNEL_CATALOG_DELETE = Call("kernel.catalog.delete", m.NameRequest, m.Empty, "Remove a catalog.")
KERNEL_CATALOG_REFRESH = Call(
    "kernel.catalog.refresh", m.CatalogRefresh, m.CatalogList, "Fetch catalogs again.", long=True
)

IMAGE_LIST = Call("image.list", m.Empty, m.ImageList, "List the local images.")
IMAGE_SHOW = Call("image.show", m.NameRequest, m.ImageInfo, "Show one local image.")
IMAGE_DELETE = Call("image.delete", m.ImageDelete, m.Empty, "Remove a local image.")
IMAGE_IMPORT = Call("image.import", m.ImageImport, m.ImageInfo, "Import an image from files.", long=True)
IMAGE_REGISTER = Call(
    "image.register", m.ImageRegister, m.ImageInfo, "Make an image of a file that stays where it is.", long=True
)
IMAGE_PROMOTE = Call(
    "image.promote", m.NameRequest, m.ImageInfo, "Copy the files of a registered image and manage them.", long=True
)
IMAGE_TAG = Call("image.tag", m.ImageTag, m.ImageInfo, "Give an image a further name.", long=True)
IMAGE_HISTORY = Call("image.history", m.NameRequest, m.ImageHistory, "Show how an image was made.")
IMAGE_PRUNE = Call("image.prune", m.ImagePrune, m.ImagesRemoved, "Remove broken or unused images.")
IMAGE_VERIFY = Call("image.verify", m.ImageVerify, m.ImageChecks, "Read local images again.", long=True)
IMAGE_EXPORT = Call("image.export", m.ImageExport, m.ImageExported, "Write an image as an OCI layout.", long=True)
IMAGE_PULL = Call("image.pull", m.ImagePull, m.ImageInfo, "Fetch an image of a catalog or registry.", long=True)
IMAGE_CACHE_LIST = Call("image.cache.list", m.Empty, m.BlobList, "List the layers in the cache.")
IMAGE_CACHE_PRUNE = Call("image.cache.prune", m.CachePrune, m.CachePruned, "Remove layers from the cache.")
IMAGE_CACHE_VERIFY = Call(
    "image.cache.verify", m.Empty, m.CacheVerified, "Read the layers in the cache again.", long=True
)
IMAGE_CATALOG = Call("image.catalog", m.Empty, m.ImageCatalog, "List the images that can be pulled.")
IMAGE_CATALOG_ADD = Call("image.catalog.add", m.CatalogAdd, m.CatalogInfo, "Add a catalog.", long=True)
IMAGE_CATALOG_LIST = Call("image.catalog.list", m.Empty, m.CatalogList, "List the catalogs.")
IMAGE_CATALOG_DELETE = Call("image.catalog.delete", m.NameRequest, m.Empty, "Remove a catalog.")
IMAGE_CATALOG_REFRESH = Call(
    "image.catalog.refresh", m.CatalogRefresh, m.CatalogList, "Fetch catalogs again.", long=True
)

VM_LIST = Call("vm.list", m.Empty, m.VmList, "List the VMs.")
VM_SHOW = Call("vm.show", m.VmRef, m.VmInfo, "Show one VM.")
VM_CREATE = Call("vm.create", m.VmCreate, m.VmInfo, "Create a VM without starting it.", long=True)
VM_START = Call("vm.start", m.VmRef, m.VmStarted, "Start a VM.", long=True)
VM_STOP = Call("vm.stop", m.VmStop, m.VmStopped, "Stop a VM, by force after a grace period.", long=True)
VM_RESTART = Call("vm.restart", m.VmStop, m.VmStarted, "Stop a VM if it runs and start it.", long=True)
VM_KILL = Call("vm.kill", m.VmRef, m.VmInfo, "Stop a VM at once, like pulling its plug.")
VM_DELETE = Call("vm.delete", m.VmRemove, m.VmRemoved, "Remove a VM and its disks.")
VM_PRUNE = Call("vm.prune", m.Empty, m.VmRemoved, "Remove every stopped VM.")
VM_STAT = Call("vm.stat", m.GuestPath, m.GuestStat, "stat(2) of a path in a running VM.")
VM_SET = Call("vm.set", m.VmSet, m.VmChanged, "Change what a VM is.", long=True)
VM_WAIT = Call("vm.wait", m.VmWait, m.VmWaited, "Wait until a VM is in a state.", long=True)
VM_INSPECT = Call("vm.inspect", m.VmRef, m.VmDetails, "Show all that is known of a VM.")
VM_PORTS = Call("vm.ports", m.VmPortsRequest, m.VmPorts, "List what listens in a running VM.")
VM_TOP = Call("vm.top", m.VmRef, m.VmProcesses, "List the processes in a running VM.")
VM_STATS = Call("vm.stats", m.VmStatsRequest, m.VmStats, "Measure what running VMs take.")

VM_RUN = Stream("vm.run", m.VmRun, m.VmStarted, "Create and start a VM and run a command in it.", long=True)
VM_EXEC = Stream("vm.exec", m.VmExec, m.Empty, "Run a command in a running VM.")
VM_WRITE_TREE = Stream("vm.write_tree", m.TreeWrite, m.Empty, "Extract a tar stream in a running VM.")
VM_READ_TREE = Stream("vm.read_tree", m.TreeRead, m.Empty, "Read a tree of a running VM as a tar stream.")
VM_LOGS = Stream("vm.logs", m.VmLogs, m.Empty, "Read the output of a VM's main command or its console.")
VM_CONSOLE = Stream("vm.console", m.VmRef, m.Empty, "Look at the serial console of a running VM, and type on it.")
VM_EVENTS = Stream("vm.events", m.VmEvents, m.Empty, "Follow what happens to VMs.")

OPERATION_LIST = Call("operation.list", m.Empty, m.OperationList, "List the long operations under way.")
OPERATION_WATCH = Call("operation.watch", m.OperationRef, m.OperationInfo, "Follow an operation to its end.", long=True)
OPERATION_CANCEL = Call("operation.cancel", m.OperationRef, m.OperationInfo, "Cancel an operation and undo its work.")

DAEMON_STATUS = Call("daemon.status", m.Empty, m.DaemonStatus, "Show the daemon's state.")
DAEMON_STOP = Call("daemon.stop", m.Empty, m.Empty, "Stop the daemon; VMs go on.")
DAEMON_DOCTOR = Call("daemon.doctor", m.Empty, m.Doctor, "Check what banger needs of this host.")
DAEMON_LOGS = Stream("daemon.logs", m.DaemonLogs, m.Empty, "Read the daemon's log.")

CALLS: tuple[Call[object, object], ...] = tuple(value for value in list(globals().values()) if isinstance(value, Call))
STREAMS: tuple[Stream[object, object], ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Stream)
)
