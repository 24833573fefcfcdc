"""Becomes a program that has no more than it needs: run as a script, which imports nothing of banger.

    confined.py [uid=N] [group=N]... [low-ports] [no-network] [show=PATH]... [lend=FD:PATH]... -- PROGRAM ...

The program gets the inherited descriptors, a few resource limits, no_new_privs, no capabilities (but that for ports
below 1024, with `low-ports`), and runs as `uid`. Where the system lets us, also namespaces of its own: of mounts, with
a read-only root that holds nothing but the system's programs and libraries, the paths named by `show` (devices), and
the file at PATH under the name of its descriptor in /proc (`lend`); of System V objects and host names; and of
networks, with `no-network`. Where not, it says so on standard error and goes on: all the rest still confines it.

Without root this takes a user namespace, in which the user's own id stays what it is, so that devices that the user, or
a group of theirs, may open can still be opened.
"""

import ctypes
import errno
import os
import resource
import signal
import sys

# where programs and their libraries are: file hierarchy standard, Nix and Guix
PROGRAMS = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/nix",
    "/gnu",
)
KEPT_VARIABLES = ("XDG_STATE_HOME",)  # tells whose program it is; the others may hold secrets
OPEN_FILES = 4096
_BUILD = "/tmp"  # any directory of the system: it is covered in our own namespace alone

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/capability.h>
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWNET = 0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x40000000
_MS_NOSUID, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_MOUNT_SETATTR = 442  # the same number on every architecture since Linux 5.12
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID = 1, 2
_PR_SET_KEEPCAPS, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 8, 24, 38, 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_NET_BIND_SERVICE = 10
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class Options:
    """What the words before `--` say."""

    def __init__(self, words: list[str]) -> None:
        self.uid = -1
        self.groups: list[int] = []
        self.low_ports = self.no_network = False
        self.show: list[str] = []
        self.lend: list[tuple[str, str]] = []
        for word in words:
            key, _, value = word.partition("=")
            match key:
                case "uid":
                    self.uid = int(value)
                case "group":
                    self.groups.append(int(value))
                case "low-ports":
                    self.low_ports = True
                case "no-network":
                    self.no_network = True
                case "show":
                    self.show.append(value)
                case "lend":
                    descriptor, _, path = value.partition(":")
                    self.lend.append((descriptor, path))
                case _:
                    raise ValueError(f"{word!r} is no option")


def main() -> None:
    end = sys.argv.index("--")
    options, argv = Options(sys.argv[1:end]), sys.argv[end + 1 :]
    try:
        enter_namespaces(options)
    except OSError as error:
        print(f"without namespaces of its own: {error.strerror}", file=sys.stderr, flush=True)
    limit_resources()
    drop_privileges(options)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python
        signal.signal(number, signal.SIG_DFL)
    os.execve(argv[0], argv, {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ})


def enter_namespaces(options: Options) -> None:
    """Part from the host. Raises OSError where that is not permitted."""
    flags = _NEWNS | _NEWUTS | _NEWIPC | (_NEWNET if options.no_network else 0)
    uid, gid = os.geteuid(), os.getegid()
    _check("unshare", _libc.unshare(flags | (_NEWUSER if uid else 0)))
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    # opened before the directory that we build in covers what may lie in it
    shown = [(path, os.open(path, os.O_PATH)) for path in (*PROGRAMS, *options.show) if os.path.exists(path)]
    lent = [(f"/proc/self/fd/{name}", os.open(path, os.O_PATH)) for name, path in options.lend]
    _mount("tmpfs", _BUILD, "tmpfs", _MS_NOSUID | _MS_NOEXEC, b"mode=0755,size=256k,nr_inodes=256")
    for path, descriptor in (*shown, *lent):
        if os.path.islink(path) and path in PROGRAMS:
            os.symlink(os.readlink(path), _BUILD + path)  # /lib of a system whose /usr is all there is
        else:
            _bind(descriptor, _BUILD + path)
        os.close(descriptor)
    _read_only(_BUILD)
    os.chdir(_BUILD)
    # pivot_root(2), "pivot_root(".", ".")": the old root lies on the new one, and is taken away
    _check("pivot_root", _libc.pivot_root(b".", b"."))
    _check("umount", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def _bind(descriptor: int, target: str) -> None:
    """Let an open file or directory appear at a path that does not exist yet."""
    source = f"/proc/self/fd/{descriptor}"
    if os.path.isdir(source):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(source, target, "", _MS_BIND | _MS_REC)


def _read_only(path: str) -> None:
    """Nothing below can be changed or gives privileges; older systems have but the permissions of files for that."""
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)  # struct mount_attr
    directory = os.open(path, os.O_PATH | os.O_DIRECTORY)
    flags = _AT_EMPTY_PATH | _AT_RECURSIVE
    result = _libc.syscall(_MOUNT_SETATTR, directory, b"", flags, attributes, ctypes.sizeof(attributes))
    os.close(directory)
    if result < 0 and ctypes.get_errno() == errno.ENOSYS:
        return
    _check("mount_setattr", result)


def limit_resources() -> None:
    """No image of the guest's memory in a core file, and no more files than it can need."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


def drop_privileges(options: Options) -> None:
    """Become the unprivileged user, for good; keep at most the right to listen on ports below 1024."""
    kept = (_CAP_NET_BIND_SERVICE,) if options.low_ports else ()
    for capability in range(64):
        if capability not in kept:
            _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails beyond the last, and where none are held
    if options.uid >= 0:
        _check("prctl", _libc.prctl(_PR_SET_KEEPCAPS, 1 if kept else 0, 0, 0, 0))
        os.setgroups(options.groups)
        os.setresgid(options.uid, options.uid, options.uid)
        os.setresuid(options.uid, options.uid, options.uid)
        if kept:
            _keep_only(_CAP_NET_BIND_SERVICE)
    _check("prctl", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _keep_only(capability: int) -> None:
    """Have one capability, which the program that is executed gets too; capset(2), capabilities(7)."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(*[1 << capability] * 3, 0, 0, 0)  # effective, permitted, inheritable; low word, high
    _check("capset", _libc.capset(header, sets))
    _check("prctl", _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0))


def _mount(source: str, target: str, kind: str, flags: int, data: bytes | None = None) -> None:
    result = _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data)
    _check(f"mount {target}", result)


def _check(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
