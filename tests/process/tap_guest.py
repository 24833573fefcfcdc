"""Stands in for a VMM and its guest on a network of taps; run by tap_checks as a script.

`tap_guest.py NETNS_FD UID SCRIPT`: enters the network namespace as root would and becomes UID (NETNS_FD -1: it is there
already), opens the taps as Firecracker does, with offloads, and joins them with taps of a namespace of its own. There
the kernel is the guest: it has the guest's addresses, and SCRIPT runs as its program.
"""

import ctypes
import encodings.idna  # noqa: F401 -- what looking up names loads later, when it may not be readable
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x1, 0x2, 0x4
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000

_MODULES = {
    "os": os,
    "signal": signal,
    "socket": socket,
    "struct": struct,
    "subprocess": subprocess,
    "threading": threading,
}
_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_tap(device: int, name: str) -> None:
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)


def relay(source: int, sink: int) -> None:
    while True:
        frame = os.read(source, 70000)
        try:
            os.write(sink, frame)
        except OSError as error:
            print(f"a frame of {len(frame)} bytes is lost: {error}", file=sys.stderr)


def main() -> None:
    network, uid, script = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if network >= 0:
        check(_libc.setns(network, _CLONE_NEWNET))
    devices = [os.open("/dev/net/tun", os.O_RDWR) for _ in range(2)]
    if network >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        check(_libc.prctl(4, 1, 0, 0, 0))  # PR_SET_DUMPABLE: the maps below are files of this user's then
    vmm_ends = dict(zip(["net0", "net1"], devices, strict=True))
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    for name, device in list(vmm_ends.items()):
        if f" {name}: " in links:
            open_tap(device, name)
        else:
            del vmm_ends[name]
    maps = {"setgroups": "deny", "gid_map": f"0 {os.getegid()} 1", "uid_map": f"0 {os.geteuid()} 1"}
    check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET))
    for file, text in maps.items():
        with open(f"/proc/self/{file}", "w") as map_file:
            map_file.write(text)
    for name, address in (("net0", "10.0.2.15/24"), ("net1", "10.0.3.15/24")):
        if name not in vmm_ends:
            continue
        guest_end = os.open("/dev/net/open", os.O_RDWR)  # the same device, open to all
        open_tap(guest_end, name)
        subprocess.run(["ip", "addr", "add", address, "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        for ends in ((guest_end, vmm_ends[name]), (vmm_ends[name], guest_end)):
            threading.Thread(target=relay, args=ends, daemon=True).start()
    subprocess.run(["ip", "route", "add", "default", "via", "10.0.2.2"], check=True)
    # this user may not be able to read the modules of this Python
    exec(compile(script, "script", "exec"), {"__name__": "script", **_MODULES})


if __name__ == "__main__":
    main()
