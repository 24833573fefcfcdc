"""The per-VM helper that holds a network namespace with taps for a VMM, pasta behind one of them.

Run as a script with no import of banger: `tap_helper.py CONTROL_FD UID PASTA_JSON FORWARDS_JSON`. `UID` is the user to
become when root, else -1; PASTA_JSON pasta's argument vector without the namespace, or null to try whether this works
here; FORWARDS_JSON a list of listening descriptor and guest address and port. It makes a user namespace in which that
user is root, and in it:

    tap net0 -- bridge -- tap pasta     the outside, as pasta gives it
    tap net1 (10.0.3.2/24)              published ports: connections that this helper makes to the guest

and sends `ok` with descriptors of the user and the network namespace over CONTROL_FD, or an error. It ends when the
VMM closes net0, and before that when CONTROL_FD is closed while no VMM has opened net0. Everything that it made goes
with it, even when it is killed: pasta runs in a PID namespace of which it is the init process.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# ioctl(2) numbers and flags of linux/if_tun.h, linux/sockios.h, linux/if.h, and unshare(2), mount(2), prctl(2)
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_UP, _IFF_LOWER_UP = 0x2, 0x1000, 0x1, 0x10000
_SIOCBRADDBR, _SIOCBRADDIF, _SIOCGIFINDEX = 0x89A0, 0x89A2, 0x8933
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 0x2, 0x8, 0x4000, 0x40000
_RTM_GETLINK, _RTM_SETLINK, _RTM_NEWQDISC, _RTM_NEWTFILTER, _RTMGRP_LINK = 18, 19, 36, 44, 1
_IFLA_TXQLEN = 13
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
_PR_SET_DUMPABLE = 4
_NETLINK_MESSAGE = struct.Struct("=IHHIIBxHiII")  # rtnetlink(7): nlmsghdr and ifinfomsg
_TC_INGRESS, _TC_INGRESS_HANDLE, _TC_ALL_PROTOCOLS = 0xFFFFFFF1, 0xFFFF0000, 1 << 16 | 0x0300
_TCA_KIND, _TCA_OPTIONS, _TCA_BPF_OPS_LEN, _TCA_BPF_OPS, _TCA_BPF_FLAGS, _TCA_BPF_FLAG_ACT_DIRECT = 1, 2, 4, 5, 8, 1

# Frames to addresses that mean the host itself: 0.0.0.0/8, 127.0.0.0/8, ::/8 (with ::1 and mapped IPv4 addresses).
# Versions of pasta before 2023-09 connect to them like to any other. Classic BPF: code, jump if true, if false, value.
_OK, _DROP = 0, 2
_NOT_THE_HOST = (
    (0x28, 0, 0, 12),  # load the EtherType
    (0x15, 0, 3, 0x0800),
    (0x30, 0, 0, 30),  # IPv4: the first byte of the destination
    (0x15, 4, 0, 0),
    (0x15, 3, 2, 127),
    (0x15, 0, 1, 0x86DD),
    (0x30, 0, 0, 38),  # IPv6: the same
    (0x06, 0, 0, _OK),
    (0x06, 0, 0, _DROP),
)

OUTSIDE, PUBLISH, BRIDGE, PASTA = "net0", "net1", "bridge", "pasta"
PUBLISH_ADDRESS, PUBLISH_NETMASK = "10.0.3.2", "255.255.255.0"
# Frames that wait in a tap. Nothing slows down who sends over a bridge, what does not fit is lost, and the pasta of
# Debian 12 then stalls or resets connections, so there is room for all that the windows of some connections allow.
_QUEUE = 16384
_MAX_CONNECTIONS = 512
_BUFFER = 256 << 10
# seconds that a client is kept for a guest that does not listen yet, and between two attempts
_PATIENCE, _PAUSE = 10.0, 0.1


class SetupError(Exception):
    """What could not be made, for people."""


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    uid = int(sys.argv[2])
    pasta: list[str] | None = json.loads(sys.argv[3])
    forwards: list[tuple[int, str, int]] = json.loads(sys.argv[4])
    for descriptor in (control.fileno(), *(forward[0] for forward in forwards)):
        os.set_inheritable(descriptor, False)
    try:
        child = enter_user_namespace(uid)
    except (OSError, SetupError) as error:
        fail(control, f"no namespace for the network: {said(error)}")
    if child.pid:
        # the one that the daemon holds on to: it ends with the helper, and the helper with it
        control.close()
        for descriptor, *_ in forwards:
            os.close(descriptor)
        os.waitpid(child.pid, 0)
        return
    try:
        if pasta is None:
            make_network(True)
            control.send(b"ok")
        else:
            run(control, child.lifeline, pasta, forwards)
    except (OSError, SetupError) as error:
        fail(control, said(error))


def said(error: OSError | SetupError) -> str:
    """What failed, for people."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def fail(control: socket.socket, message: str) -> NoReturn:
    with contextlib.suppress(OSError):  # the daemon may be gone
        control.send(message.encode())
    sys.exit(1)


class Child:
    """A fork into the new PID namespace as both see it: in the child `pid` is 0; `lifeline` ends with the parent."""

    def __init__(self, pid: int, lifeline: int) -> None:
        self.pid = pid
        self.lifeline = lifeline


def enter_user_namespace(uid: int) -> Child:
    """Become root of a new user namespace, and fork its init process of a new PID namespace."""
    gid = uid
    if uid >= 0:
        os.setgroups([])
        own_device(uid)
    else:
        uid, gid = os.getuid(), os.getgid()
    # the namespace's maps are written from outside: only there may root map another user than itself
    request, requested = os.pipe()
    unshared = os.getpid()
    mapper = os.fork()
    if mapper == 0:
        os.close(requested)
        os._exit(0 if os.read(request, 1) and write_maps(unshared, uid, gid) else 1)
    os.close(request)
    _call("unshare", _CLONE_NEWUSER | _CLONE_NEWPID)
    os.write(requested, b"x")
    os.close(requested)
    if os.waitstatus_to_exitcode(os.waitpid(mapper, 0)[1]):
        raise SetupError("its users could not be mapped")
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # others of this user, and pasta, are to find our namespaces below /proc
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)
    lifeline, held = os.pipe()
    pid = os.fork()
    os.close(lifeline if pid else held)
    return Child(pid, lifeline)


def own_device(uid: int) -> None:
    """Let the user open /dev/net/tun whatever its mode on this host is, in a mount namespace of our own."""
    _call("unshare", _CLONE_NEWNS)
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", b"tmpfs", b"/dev/net", b"tmpfs", _MS_NOSUID | _MS_NOEXEC, b"mode=755")
    os.mknod("/dev/net/tun", 0o20600, os.makedev(10, 200))
    os.chown("/dev/net/tun", uid, uid)


def write_maps(pid: int, uid: int, gid: int) -> bool:
    """Let `uid` and `gid` be 0 in the user namespace of a process."""
    try:
        for name, text in (("setgroups", "deny"), ("gid_map", f"0 {gid} 1"), ("uid_map", f"0 {uid} 1")):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    return True


def run(control: socket.socket, lifeline: int, pasta: list[str], forwards: list[tuple[int, str, int]]) -> None:
    # the number by which processes outside of the PID namespace know this one
    path = f"/proc/{Path('/proc/self').readlink()}/ns/net"
    go, went = os.pipe()
    pasta_pid = os.fork()  # before the network namespace is left
    if pasta_pid == 0:
        control.close()
        os.close(went)
        if os.read(go, 1):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # pasta gives up where it finds it ignored
            with contextlib.suppress(OSError):
                os.execvp(pasta[0], [*pasta, "--netns", path, "--netns-only", "--ns-ifname", PASTA])
        os._exit(127)
    os.close(go)
    pasta_end = os.pidfd_open(pasta_pid)
    links = make_network(bool(forwards))
    drop_capabilities()
    os.write(went, b"x")
    os.close(went)
    loop = Loop()
    loop.add(lifeline, lambda: sys.exit(0))
    loop.add(pasta_end, lambda: sys.exit(1))
    loop.add(links.socket.fileno(), links.drain)
    while not links.carrier(PASTA):
        loop.turn()
    loop.remove(links.socket.fileno())
    with open("/proc/self/ns/user", "rb") as user, open("/proc/self/ns/net", "rb") as network:
        socket.send_fds(control, [b"ok"], [user.fileno(), network.fileno()])

    def on_release() -> None:
        loop.remove(control.fileno())
        control.close()
        if not links.carrier(OUTSIDE):
            sys.exit(0)
        loop.add(links.socket.fileno(), on_links)

    def on_links() -> None:
        links.drain()
        if not links.carrier(OUTSIDE):
            sys.exit(0)

    loop.add(control.fileno(), on_release)
    for descriptor, address, port in forwards:
        Listener(loop, socket.socket(fileno=descriptor), (address, port))
    while True:
        loop.turn()


def make_network(publish: bool) -> "Links":
    _call("unshare", _CLONE_NEWNET)
    # a new namespace may inherit these from the host's settings; without IPv6 the bridge itself never speaks
    for name, value in (
        ("ipv4/ip_forward", "0"),
        ("ipv6/conf/all/disable_ipv6", "1"),
        ("ipv6/conf/default/disable_ipv6", "1"),
    ):
        with contextlib.suppress(OSError), open(f"/proc/sys/net/{name}", "w") as file:
            file.write(value)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        try:
            fcntl.ioctl(handle, _SIOCBRADDBR, BRIDGE.encode() + b"\0")
        except OSError as error:
            raise SetupError(f"no network bridge: {error.strerror}") from error
        up(handle, BRIDGE)
        for name in (OUTSIDE, PASTA):
            make_tap(name)
            lengthen_queue(name)
            fcntl.ioctl(handle, _SIOCBRADDIF, struct.pack("16si20x", BRIDGE.encode(), socket.if_nametoindex(name)))
            up(handle, name)
        filter_frames(OUTSIDE)
        if publish:
            make_tap(PUBLISH)
            for request, address in ((_SIOCSIFADDR, PUBLISH_ADDRESS), (_SIOCSIFNETMASK, PUBLISH_NETMASK)):
                sockaddr = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
                fcntl.ioctl(handle, request, struct.pack("16s16s8x", PUBLISH.encode(), sockaddr))
            up(handle, PUBLISH)
    return Links()


def drop_capabilities() -> None:
    """Give up all rights in the namespaces; pasta, which has fewer than root, may then look at them below /proc."""
    header = struct.pack("=Ii", 0x20080522, 0)  # capset(2): _LINUX_CAPABILITY_VERSION_3, this thread
    _call("capset", header, bytes(24))


def up(handle: socket.socket, name: str) -> None:
    fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sh22x", name.encode(), _IFF_UP))


def make_tap(name: str) -> None:
    """A tap that stays without anybody holding it, and that the VM's user may open."""
    try:
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SetupError(f"/dev/net/tun: {error.strerror}") from error
    try:
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        fcntl.ioctl(tap, _TUNSETOWNER, 0)
        fcntl.ioctl(tap, _TUNSETPERSIST, 1)
    finally:
        os.close(tap)


def filter_frames(name: str) -> None:
    """Let no frame to the host itself come from a tap: an ingress qdisc with a BPF classifier, tc-bpf(8)."""
    index = socket.if_nametoindex(name)
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in _NOT_THE_HOST)
    options = (
        attribute(_TCA_BPF_OPS_LEN, struct.pack("=H", len(_NOT_THE_HOST)))
        + attribute(_TCA_BPF_OPS, program)
        + attribute(_TCA_BPF_FLAGS, struct.pack("=I", _TCA_BPF_FLAG_ACT_DIRECT))
    )
    classifier = attribute(_TCA_KIND, b"bpf\0") + attribute(_TCA_OPTIONS, options)
    try:
        traffic_control(_RTM_NEWQDISC, index, _TC_INGRESS_HANDLE, _TC_INGRESS, 0, attribute(_TCA_KIND, b"ingress\0"))
        traffic_control(_RTM_NEWTFILTER, index, 0, _TC_INGRESS_HANDLE, _TC_ALL_PROTOCOLS, classifier)
    except OSError as error:
        raise SetupError(f"no filter for frames (sch_ingress, cls_bpf): {error.strerror}") from error


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def lengthen_queue(name: str) -> None:
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(name), 0, 0)
    netlink(_RTM_SETLINK, 0, body + attribute(_IFLA_TXQLEN, struct.pack("=I", _QUEUE)))


def traffic_control(request: int, index: int, handle: int, parent: int, info: int, attributes: bytes) -> None:
    message = struct.pack("=B3xiIII", socket.AF_UNSPEC, index, handle, parent, info)  # tcmsg of linux/rtnetlink.h
    netlink(request, _NLM_F_CREATE | _NLM_F_EXCL, message + attributes)


def netlink(request: int, flags: int, message: bytes) -> None:
    """One request of rtnetlink(7) and its acknowledgement."""
    header = struct.pack("=IHHII", 16 + len(message), request, _NLM_F_REQUEST | _NLM_F_ACK | flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asking:
        asking.send(header + message)
        reply = asking.recv(65536)
    (error,) = struct.unpack_from("=i", reply, 16)
    if error:
        raise OSError(-error, os.strerror(-error))


class Links:
    """Tells whether somebody holds a tap open: that is its carrier, rtnetlink(7)."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        self.socket.bind((0, _RTMGRP_LINK))

    def drain(self) -> None:
        """Read the changes that made the socket readable; what they say is asked anew."""
        with contextlib.suppress(OSError):  # ENOBUFS: there were too many
            while self.socket.recv(65536):
                pass

    def carrier(self, name: str) -> bool:
        size, index = _NETLINK_MESSAGE.size, socket.if_nametoindex(name)
        question = _NETLINK_MESSAGE.pack(size, _RTM_GETLINK, _NLM_F_REQUEST, 1, 0, socket.AF_UNSPEC, 0, index, 0, 0)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asking:
            asking.send(question)
            flags: int = _NETLINK_MESSAGE.unpack_from(asking.recv(65536))[8]
        return bool(flags & _IFF_LOWER_UP)


class Loop:
    """Calls what was added for a descriptor when that has something to say."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()

    def add(self, descriptor: int, callback: Callable[[], None], events: int = select.EPOLLIN) -> None:
        self._callbacks[descriptor] = callback
        self._epoll.register(descriptor, events)

    def change(self, descriptor: int, events: int) -> None:
        self._epoll.modify(descriptor, events)

    def remove(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)
        del self._callbacks[descriptor]

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call once after so many seconds, the same number in all calls."""
        self._waiting.append((time.monotonic() + seconds, callback))

    def turn(self) -> None:
        timeout = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
        for descriptor, _ in self._epoll.poll(timeout):
            # an earlier callback of this turn may have removed it, or given its number to another
            if callback := self._callbacks.get(descriptor):
                callback()
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            self._waiting.popleft()[1]()


class Listener:
    """One published port."""

    def __init__(self, loop: Loop, listening: socket.socket, target: tuple[str, int]) -> None:
        self._loop = loop
        self._listening = listening
        self._target = target
        self._connections = 0
        listening.setblocking(False)
        loop.add(listening.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            client, _ = self._listening.accept()
        except OSError:  # gone again
            return
        self._connections += 1
        if self._connections == _MAX_CONNECTIONS:
            self._loop.remove(self._listening.fileno())
        Connecting(self._loop, client, self._target, self._closed)

    def _closed(self) -> None:
        if self._connections == _MAX_CONNECTIONS:
            self._loop.add(self._listening.fileno(), self._accept)
        self._connections -= 1


class Connecting:
    """A client for whom the guest is tried until something listens there, for a while; then it is reset."""

    def __init__(self, loop: Loop, client: socket.socket, target: tuple[str, int], closed: Callable[[], None]) -> None:
        self._loop = loop
        self._client = client
        self._target = target
        self._closed = closed
        self._until = time.monotonic() + _PATIENCE
        self._try()

    def _try(self) -> None:
        guest = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        guest.setblocking(False)
        error = guest.connect_ex(self._target)
        if error in (0, errno.EINPROGRESS):
            self._loop.add(guest.fileno(), lambda: self._tried(guest), select.EPOLLOUT)
        else:
            self._failed(guest)

    def _tried(self, guest: socket.socket) -> None:
        error = guest.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not error:
            try:
                guest.getpeername()
            except OSError:  # not connected yet: the event was for who had this number before
                return
        self._loop.remove(guest.fileno())
        if error:
            self._failed(guest)
        else:
            Connection(self._loop, self._client, guest, self._closed)

    def _failed(self, guest: socket.socket) -> None:
        guest.close()
        if time.monotonic() < self._until:
            self._loop.later(_PAUSE, self._try)
            return
        reset_by_closing(self._client)
        self._client.close()
        self._closed()


def reset_by_closing(end: socket.socket) -> None:
    """Let the other side see a reset when this end is closed: socket(7), SO_LINGER."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Connection:
    """Carries bytes and ends of stream between a client and the guest; a reset of one becomes one of the other."""

    def __init__(self, loop: Loop, client: socket.socket, guest: socket.socket, closed: Callable[[], None]) -> None:
        self._loop = loop
        self._closed = closed
        self._ends = (client, guest)
        self._pending = [b"", b""]  # to be written to that end
        self._reading = [True, True]  # that end has not sent its last
        self._writing = [True, True]  # that end has not been sent the last
        self._events = [select.EPOLLIN, select.EPOLLIN]
        for end, events in zip(self._ends, self._events, strict=True):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop.add(end.fileno(), self._move, events)

    def _move(self) -> None:
        try:
            for index, end in enumerate(self._ends):
                if error := end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(error, os.strerror(error))
                self._carry(index)
        except OSError:
            for end in self._ends:
                reset_by_closing(end)
            self._close()
            return
        if any(self._writing):
            self._wait()
        else:
            self._close()

    def _carry(self, index: int) -> None:
        """From one end to the other, as much as goes without waiting."""
        source, sink = self._ends[index], self._ends[1 - index]
        with contextlib.suppress(BlockingIOError):
            if self._reading[index] and not self._pending[1 - index]:
                self._pending[1 - index] = source.recv(_BUFFER)
                self._reading[index] = bool(self._pending[1 - index])
            if self._pending[1 - index]:
                sent = sink.send(self._pending[1 - index])
                self._pending[1 - index] = self._pending[1 - index][sent:]
            if not self._reading[index] and not self._pending[1 - index] and self._writing[1 - index]:
                self._writing[1 - index] = False
                sink.shutdown(socket.SHUT_WR)

    def _wait(self) -> None:
        for index, end in enumerate(self._ends):
            events = select.EPOLLOUT if self._pending[index] else 0
            if self._reading[index] and not self._pending[1 - index]:
                events |= select.EPOLLIN
            if not self._reading[index] and not self._writing[index]:
                events = -1  # nothing more of it; even when asked for nothing epoll would go on to tell of its end
            if events == self._events[index]:
                continue
            if events == -1:
                self._loop.remove(end.fileno())
            else:
                self._loop.change(end.fileno(), events)
            self._events[index] = events

    def _close(self) -> None:
        for end, events in zip(self._ends, self._events, strict=True):
            if events != -1:
                self._loop.remove(end.fileno())
            end.close()
        self._closed()


def _call(function: str, *arguments: object) -> None:
    """Call a function of libc that gives -1 on errors."""
    if getattr(_libc, function)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


_libc = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    main()
