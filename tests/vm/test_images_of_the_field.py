"""Images as the field has them: what each is, what is done with it, what must come out.

A report of an image that does not work is one more line of `ROWS`. Images are made here, of Debian's packages or by
hand; a row that wants what no table can say is a test of its own at the end.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.field_images import (
    BUSYBOX,
    DISTROLESS,
    STATIC,
    Directory,
    File,
    HardLink,
    Layout,
    Link,
    Registry,
    Row,
    busybox_program,
    layer_of,
    lowest_layer,
    script,
    sh,
    try_image,
    users,
)
from tests.http_server import serving
from tests.images import INITS, MINIMAL, SYSVINIT
from tests.registry import Layer
from tests.vm.host import Host

CAP_NET_RAW = "\1\0\0\2\0\40\0\0" + "\0" * 12  # cap_net_raw+ep, struct vfs_cap_data in <linux/capability.h>
APP = users("app:x:1000:1000::/home/app:/bin/sh\n", "app:x:1000:\nwheel:x:10:app\n")
NO_PASSWORDS = "root::0:0::/root:/bin/sh\napp::1000:1000::/home/app:/bin/sh\n"
IDS = 'echo "$(id -u):$(id -g) $(id -G)"'
ONLY_PID_1 = 'test $$ = 1 || { echo "can only run as pid 1" >&2; exit 100; }'
# what the init of a container does: starts what it is given, waits for it, ends with its status
CONTAINER_INIT = script(f"{ONLY_PID_1}\ntrap 'kill $child' TERM\n\"$@\" & child=$!\nwait $child; exit $?")
SUPERVISED = """[supervisord]
nodaemon=true
user=root
logfile=/dev/null
logfile_maxbytes=0
[program:web]
command=sh -c 'echo serving >/run/served; exec sleep infinity'
"""
READY = "systemctl is-system-running --wait"

BASES = [
    Row(
        "scratch-with-one-static-program",
        STATIC,
        config={"Entrypoint": ["/report"]},
        out="0:0 / on {}, HOME=/root, 1 words\n",
    ),
    Row(
        "distroless-and-nobody",
        DISTROLESS,
        config={"Entrypoint": ["/app/report"], "User": "65532:65532", "WorkingDir": "/srv"},
        run=["--", "a", "b"],
        out="65532:65532 /srv on {}, HOME=/, 3 words\n",
    ),
    Row(
        "busybox-alone",
        BUSYBOX,
        run=sh("pwd; echo $PATH; id -u"),
        out="/\n/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n0\n",
    ),
    Row(
        "debian",
        MINIMAL,
        config={"Cmd": ["bash"]},
        run=["--", "sh", "-c", ". /etc/os-release; echo $ID $VERSION_ID; dpkg -s dash | grep ^Status"],
        out="debian 12\nStatus: install ok installed\n",
    ),
    Row(
        "nix-store-of-100000-links",
        BUSYBOX,
        [
            {
                "nix/store": Directory(),
                **{
                    f"nix/store/{number:032x}-link": Link(f"/nix/store/{number:032x}-nowhere")
                    for number in range(100_000)
                },
                "nix/store/0-users/passwd": File("app:x:1000:1000::/home:/bin/sh\n", 0o644),
                "etc/passwd": Link("/nix/store/0-users/passwd"),
            }
        ],
        {"User": "app"},
        run=sh("set -- /nix/store/*; echo $#; readlink /nix/store/000000000000000000000000000000ff-link; id -u"),
        out="100001\n/nix/store/000000000000000000000000000000ff-nowhere\n1000\n",
    ),
]

INIT_SYSTEMS = [
    Row(
        "systemd",
        INITS,
        config={"Cmd": ["/sbin/init"], "Env": ["FROM=image"]},
        run=["--memory", "768M", "-e", "MORE=given"],
        steps=[
            (READY, "running\n"),
            ("tr '\\0' '\\n' </proc/1/environ | grep -E '^(FROM|MORE)='", "FROM=image\nMORE=given\n"),
        ],
    ),
    Row(
        "script-that-ends-in-systemd",
        INITS,
        [{"entry": script('echo prepared >/run/entry\nexec /lib/systemd/systemd "$@"')}],
        {"Entrypoint": ["/entry"], "Cmd": ["--log-level=info"]},
        run=["--memory", "768M"],
        steps=[
            (READY, "running\n"),
            ("cat /run/entry; tr '\\0' ' ' </proc/1/cmdline", "prepared\n/lib/systemd/systemd --log-level=info "),
        ],
    ),
    Row(
        "sysvinit-and-openrc",
        SYSVINIT,
        config={"Cmd": ["/sbin/init"], "Env": ["FROM=image"]},
        steps=[
            (
                "ls /run/openrc/softlevel; readlink /proc/1/exe; tr '\\0' '\\n' </proc/1/environ | grep FROM",
                "/run/openrc/softlevel\n/usr/sbin/init\nFROM=image\n",
            )
        ],
    ),
    Row(
        "busybox-init",
        BUSYBOX,
        [
            {
                "sbin/init": Link("../bin/busybox"),
                "etc/inittab": File("::sysinit:/bin/touch /run/began\n::wait:/bin/sleep 0\n", 0o644),
            }
        ],
        {"Cmd": ["/sbin/init"]},
        steps=[("ls /run/began; readlink /proc/1/exe", "/run/began\n/bin/busybox\n")],
    ),
    Row(
        "init-that-must-be-pid-1",
        BUSYBOX,
        [{"init": CONTAINER_INIT}],
        {"Entrypoint": ["/init"]},
        run=["--", "sh", "-c", "echo $PPID; exit 3"],
        out="1\n",
        status=3,
    ),
    Row(
        "s6-svscan",
        INITS,
        [{"services/web/run": script("exec sleep infinity")}],
        {"Cmd": ["s6-svscan", "/services"]},
        steps=[("s6-svwait -u -t 20000 /services/web; s6-svstat -o up /services/web", "true\n")],
    ),
    Row(
        "runit",
        INITS,
        [{"services/web/run": script("exec sleep infinity")}],
        {"Cmd": ["runsvdir", "-P", "/services"]},
        steps=[("until sv status /services/web; do sleep 0.1; done | sed 's/:.*//'", "run\n")],
    ),
    Row(
        "tini",
        INITS,
        config={"Entrypoint": ["tini", "-s", "--"]},
        run=["--", "sh", "-c", "sleep 0.1 & exit 4"],
        status=4,
    ),
    Row(
        "dumb-init",
        INITS,
        config={"Entrypoint": ["dumb-init", "--"]},
        run=["--", "sh", "-c", "kill -TERM $$"],
        status=143,
    ),
    Row(
        "catatonit",
        INITS,
        config={"Entrypoint": ["catatonit", "--"]},
        run=["--", "sh", "-c", "echo here; exit 5"],
        out="here\n",
        status=5,
    ),
    Row(
        "supervisord",
        INITS,
        [{"etc/s.conf": File(SUPERVISED)}],
        {"Cmd": ["supervisord", "-c", "/etc/s.conf"]},
        steps=[("cat /run/served; tr '\\0' ' ' </proc/1/cmdline | grep -c supervisord", "serving\n0\n")],
    ),
    Row(
        "init-asked-for",
        BUSYBOX,
        [{"only": script(ONLY_PID_1 + "\necho first")}],
        {"Cmd": ["/only"]},
        run=["--init", "command"],
        out="first\n",
    ),
    Row("command-that-is-no-init", BUSYBOX, run=sh("test $$ != 1 && echo below the agent"), out="below the agent\n"),
]

USERS = [
    Row("number-without-entry", BUSYBOX, config={"User": "1000"}, run=sh(f"{IDS}; echo $HOME"), out="1000:0 0\n/\n"),
    Row(
        "number-with-entry",
        BUSYBOX,
        [APP],
        {"User": "1000"},
        run=sh(f"{IDS}; echo $HOME"),
        out="1000:1000 1000 10\n/home/app\n",
    ),
    Row("number-and-group", BUSYBOX, [APP], {"User": "1000:10"}, run=sh(IDS), out="1000:10 10\n"),
    Row("name-and-group", BUSYBOX, [APP], {"User": "app:wheel"}, run=sh(IDS), out="1000:10 10\n"),
    Row(
        "short-lines",
        BUSYBOX,
        [
            {
                "etc/passwd": File("\n# nobody knows\nroot:x:0:0\napp:x:1000:7", 0o644),
                "etc/group": File("root:x:0\n\nwheel:x:10:app", 0o644),
            }
        ],
        {"User": "app"},
        run=sh(IDS),
        out="1000:7 7 10\n",
    ),
    Row(
        "unknown-name",
        BUSYBOX,
        config={"User": "app"},
        run=sh("true"),
        status=125,
        error="there is no user 'app' in the guest's /etc/passwd",
    ),
    Row(
        "streams-of-a-user",
        BUSYBOX,
        [APP, {"log/out": Link("/dev/stdout"), "log/err": Link("/dev/stderr")}],
        {"User": "app"},
        run=sh("echo out >/log/out; echo more >>/proc/self/fd/1; echo err >/log/err"),
        out="out\nmore\n",
        error="err\n",
    ),
    Row(
        "setuid-program",
        BUSYBOX,
        [APP, {"bin/su": busybox_program(0o4755), "etc/passwd": File(NO_PASSWORDS, 0o644)}],
        {"User": "app"},
        run=sh("/bin/su root -c 'id -u'"),
        out="0\n",
    ),
]

ENTRYPOINTS = [
    Row(
        "relative-without-workdir",
        BUSYBOX,
        [{"start": script("echo ran in $PWD")}],
        {"Entrypoint": ["./start"]},
        out="ran in /\n",
    ),
    Row(
        "relative-to-the-workdir",
        BUSYBOX,
        [{"app/run": script("echo ran in $PWD")}],
        {"Entrypoint": ["./run"], "WorkingDir": "/app"},
        out="ran in /app\n",
    ),
    Row(
        "workdir-that-is-missing",
        BUSYBOX,
        config={"WorkingDir": "/srv/a/b"},
        run=sh("pwd; stat -c %u:%a ."),
        out="/srv/a/b\n0:755\n",
    ),
    Row(
        "workdir-through-a-dangling-link",
        BUSYBOX,
        [{"app": Link("/srv/real")}],
        {"WorkingDir": "/app/data"},
        run=sh("pwd -P"),
        out="/srv/real/data\n",
    ),
    Row("entrypoint-and-cmd", BUSYBOX, config={"Entrypoint": ["echo", "a"], "Cmd": ["b", "c d"]}, out="a b c d\n"),
    Row("words-replace-cmd", BUSYBOX, config={"Entrypoint": ["echo", "a"], "Cmd": ["b"]}, run=["--", "z"], out="a z\n"),
    Row(
        "found-in-the-path-of-the-image",
        BUSYBOX,
        [{"opt/bin/tool": script("echo found")}],
        {"Env": ["PATH=/opt/bin:/bin"], "Cmd": ["tool"]},
        out="found\n",
    ),
    Row("not-found", BUSYBOX, config={"Cmd": ["missing"]}, status=127, error="missing"),
    Row("not-executable", BUSYBOX, [{"plain": File("text\n", 0o644)}], {"Cmd": ["/plain"]}, status=126, error="/plain"),
    Row(
        "interpreter-that-is-missing",
        BUSYBOX,
        [{"dos": File("#!/bin/sh\r\necho\r\n")}],
        {"Cmd": ["/dos"]},
        status=126,
        error="/dos",
    ),
    Row(
        "argument-of-100-KiB",
        BUSYBOX,
        config={"Entrypoint": ["sh", "-c", "echo ${#1}", "sh"], "Cmd": ["x" * 100_000]},
        out="100000\n",
    ),
]

ENVIRONMENTS = [
    Row(
        "one-of-40-KB-and-path-after-it",
        BUSYBOX,
        [{"opt/tool": script("echo ${#BIG} $LAST")}],
        {"Env": ["BIG=" + "x" * 40_000, "PATH=/opt:/bin", "LAST=there"], "Cmd": ["tool"]},
        out="40000 there\n",
    ),
    Row(
        "many-of-them",
        BUSYBOX,
        config={"Env": [f"V{number}={'x' * 100}" for number in range(3000)]},
        run=sh("env | grep -c ^V"),
        out="3000\n",
    ),
    Row(
        "twice-and-given",
        BUSYBOX,
        config={"Env": ["A=1", "A=2", "B=image", "C=a=b", "D="]},
        run=["-e", "B=given", *sh('echo "$A $B $C ${D-unset}"')],
        out="2 given a=b \n",
    ),
    Row(
        "lines-in-a-value", BUSYBOX, config={"Env": ["KEY=first\nsecond"]}, run=sh('echo "$KEY"'), out="first\nsecond\n"
    ),
    Row("home-of-its-own", BUSYBOX, config={"Env": ["HOME=/srv"], "User": "1000"}, run=sh("echo $HOME"), out="/srv\n"),
]

VOLUMES = [
    Row(
        "content-and-owner",
        BUSYBOX,
        [{"data": Directory(0o750, 7, 8), "data/file": File("kept\n", 0o600, 7, 8)}],
        {"Volumes": {"/data": {}}},
        run=sh("stat -c %u:%g:%a /data /data/file; cat /data/file; grep -c ' /data ext4 ' /proc/mounts"),
        out="7:8:750\n7:8:600\nkept\n1\n",
    ),
    Row(
        "behind-a-link",
        BUSYBOX,
        [{"var/lib/real": Directory(), "var/lib/real/file": File("kept\n"), "data": Link("/var/lib/real")}],
        {"Volumes": {"/data": {}}},
        run=sh("cat /data/file /var/lib/real/file"),
        out="kept\nkept\n",
    ),
    Row(
        "that-nothing-is-at",
        BUSYBOX,
        config={"Volumes": {"/new/volume": {}}},
        run=sh("touch /new/volume/file; ls /new/volume"),
        out="file\n",
    ),
    Row(
        "over-a-file",
        BUSYBOX,
        [{"data": File("a file\n", 0o644)}],
        {"Volumes": {"/data": {}}},
        run=sh("cat /data"),
        out="a file\n",
    ),
]

SIGNALS = [
    Row(
        "stop-signal",
        BUSYBOX,
        config={
            "StopSignal": "SIGUSR1",
            "Cmd": ["sh", "-c", "trap 'echo usr1; exit 0' USR1; echo ready; while :; do sleep 0.1; done"],
        },
        steps=[("true", "")],
        logs="ready\nusr1\n",
    ),
    Row(
        "stop-signal-by-number",
        BUSYBOX,
        config={
            "StopSignal": "3",
            "Cmd": ["sh", "-c", "trap 'echo quit; exit 0' QUIT; echo ready; while :; do sleep 0.1; done"],
        },
        logs="ready\nquit\n",
    ),
    Row("ended-by-a-signal", BUSYBOX, run=sh("kill -SEGV $$"), status=139),
    Row(
        "orphans-are-reaped",
        BUSYBOX,
        run=sh("(sleep 0.1 &) ; (true &) ; sleep 1; ps -o stat | grep -c Z"),
        out="0\n",
        status=1,
    ),
]

LAYERS = [
    Row(
        "whiteouts",
        BUSYBOX,
        [
            {"a/one": File("1"), "a/two": File("2"), "b/one": File("1")},
            {"a/.wh.one": File(), "b/.wh..wh..opq": File(), "b/new": File("3")},
        ],
        run=sh("echo a/* b/*"),
        out="a/two b/new\n",
    ),
    Row(
        "names-of-aufs",
        BUSYBOX,
        [{".wh..wh.aufs": File(), ".wh..wh.plnk/1.2": File("x"), ".wh..wh.orph": Directory(), "kept": File("kept\n")}],
        run=sh("cat /kept; ls -a / | grep -c wh"),
        out="kept\n0\n",
        status=1,
    ),
    Row(
        "dots-that-stay-inside",
        BUSYBOX,
        [{"a/b": Directory(), "a/b/../c": File("inside\n"), "./d/./e": File("too\n")}],
        run=sh("cat /a/c /d/e"),
        out="inside\ntoo\n",
    ),
    Row(
        "hard-link-to-a-lower-layer",
        BUSYBOX,
        [{"one": File("first\n")}, {"two": HardLink("one"), "one": File("second\n")}],
        run=sh("cat /one /two"),
        out="second\nfirst\n",
    ),
    Row(
        "owner-and-mode-of-the-root",
        BUSYBOX,
        [{"./": Directory(0o711, 5, 6)}],
        run=sh("stat -c %u:%g:%a /"),
        out="5:6:711\n",
    ),
    Row("layer-of-nothing", BUSYBOX, [{}, {"there": File("there\n")}, {}], run=sh("cat /there"), out="there\n"),
    Row(
        "two-hundred-layers",
        BUSYBOX,
        [{f"l/{number}": File(str(number)), "last": File(f"{number}\n")} for number in range(200)],
        run=sh("cat /last; set -- /l/*; echo $#"),
        out="199\n200\n",
    ),
    Row("long-names", BUSYBOX, [{f"{'d' * 200}/{'n' * 255}": File("long\n")}], run=sh("cat /dd*/n*"), out="long\n"),
    Row(
        "capability-of-a-file",
        INITS,
        [
            APP,
            {"bin/tool": File(Path("/bin/true").read_bytes(), xattrs={"security.capability": CAP_NET_RAW})},
        ],
        run=["--", "getcap", "/bin/tool"],
        out="/bin/tool cap_net_raw=ep\n",
    ),
]

PLACES = [
    Row(
        "tmp-is-an-absolute-link",
        BUSYBOX,
        [{"var/tmp": Directory(0o1777), "tmp": Link("/var/tmp")}],
        run=sh("readlink /tmp; touch /tmp/file; ls /var/tmp"),
        out="/var/tmp\nfile\n",
    ),
    Row(
        "everything-behind-absolute-links",
        BUSYBOX,
        [
            {
                "usr/lib": Directory(),
                "lib": Link("/usr/lib"),
                "var/run": Link("/run"),
                "var/real": Directory(0o700),
                "root": Link("/var/real"),
                "dev": Link("/var/dev"),
                "proc": Link("/nowhere"),
            }
        ],
        run=sh(
            "ls -d /usr/lib/modules; test -c /dev/null && test -d /proc/1 && touch /root/file /var/run/file && echo all"
        ),
        out="/usr/lib/modules\nall\n",
    ),
    Row(
        "links-that-climb",
        BUSYBOX,
        [{"tmp": Link("../../../../var/t"), "var": Directory(), "mnt/a": Link("../../..")}],
        run=sh("touch /tmp/file && ls /var/t && ls -d /mnt/a/bin"),
        out="file\n/mnt/a/bin\n",
    ),
    Row(
        "no-etc-at-all",
        STATIC,
        [{"etc": Link("nowhere")}],
        {"Entrypoint": ["/report"]},
        out="0:0 / on {}, HOME=/root, 1 words\n",
    ),
    Row(
        "hosts-is-a-directory",
        BUSYBOX,
        [{"etc/hosts": Directory(), "etc/resolv.conf": Directory(), "etc/hostname": Directory()}],
        run=sh("hostname"),
        out="{}\n",
    ),
    Row(
        "resolver-of-systemd",
        BUSYBOX,
        [{"etc/resolv.conf": Link("../run/systemd/resolve/stub-resolv.conf")}],
        run=sh("grep -c ^nameserver /etc/resolv.conf"),
        out="1\n",
    ),
    Row(
        "files-where-directories-belong",
        BUSYBOX,
        [{"etc": File("text\n", 0o644), "tmp": File("text\n", 0o644), "run": File("text\n", 0o644)}],
        run=sh("cat /etc; hostname"),
        out="text\n{}\n",
    ),
    Row(
        "devices",
        BUSYBOX,
        run=sh(
            "for each in net/tun fuse loop-control; do (: <>/dev/$each) && echo $each; done; "
            "grep -c ' /dev/mqueue mqueue ' /proc/mounts"
        ),
        out="net/tun\nfuse\nloop-control\n1\n",
    ),
    Row(
        "home-of-root-is-a-file",
        BUSYBOX,
        [{"root": File("mine\n", 0o644)}],
        run=sh("stat -c %a:%F /root; cat /root.replaced"),
        out="700:directory\nmine\n",
    ),
    Row(
        "etc-behind-a-dangling-link",
        BUSYBOX,
        [{"etc": Link("/conf")}],
        run=sh("cat /conf/hostname"),
        out="{}\n",
    ),
    Row(
        "modules-are-a-file",
        BUSYBOX,
        [{"lib/modules": File("text\n", 0o644)}],
        run=sh(": <>/dev/net/tun && echo tun"),
        out="tun\n",
    ),
    Row(
        "tun-and-fuse-of-a-user",
        BUSYBOX,
        config={"User": "1000"},
        run=sh("for each in net/tun fuse; do (: <>/dev/$each) && echo $each; done"),
        out="net/tun\nfuse\n",
    ),
    Row(
        "wireguard-without-kmod",
        MINIMAL,
        run=sh("test ! -e /sbin/modprobe && ip link add wg0 type wireguard && echo made"),
        out="made\n",
    ),
    Row(
        "30000-files-in-one-directory",
        BUSYBOX,
        [{"many": Directory(), **{f"many/{i}": File() for i in range(30000)}}],
        run=sh("ls /many | wc -l"),
        out="30000\n",
    ),
    Row(
        "25000-pairs-of-hard-links",
        BUSYBOX,
        [
            {
                "one": Directory(),
                "two": Directory(),
                **{f"one/{i}": File() for i in range(25000)},
                **{f"two/{i}": HardLink(f"one/{i}") for i in range(25000)},
            }
        ],
        run=sh("stat -c %h /one/0 /two/24999; test /one/77 -ef /two/77 && echo same"),
        out="2\n2\nsame\n",
    ),
]

ROWS = [*BASES, *INIT_SYSTEMS, *USERS, *ENTRYPOINTS, *ENVIRONMENTS, *VOLUMES, *SIGNALS, *LAYERS, *PLACES]


REGISTRIES = [
    Registry("two-challenges", challenge='Negotiate, Basic realm="x", Bearer realm="{realm}", service="s"'),
    Registry("login-at-the-base", challenge='Bearer realm="{realm}"', hidden=True),
    Registry("no-quotes", challenge="Basic realm=/, Bearer realm={realm},service=s"),
    Registry("time-as-text", challenge='Bearer realm="{realm}"', token='{"token": "good", "expires_in": "300"}'),
    Registry("scope-of-its-own", challenge='Bearer realm="{realm}",scope="repository:elsewhere/app:pull"'),
    Registry("token-with-null", challenge='Bearer realm="{realm}"', token='{"token": null, "access_token": "good"}'),
    Registry("blobs-called-gzip", headers={"Content-Encoding": "gzip"}),
    Registry("json-as-gzip", challenge='Bearer realm="{realm}"', encoded=True),
    Registry("index-without-platform", entry={}),
    Registry("index-with-null", entry={"platform": None, "annotations": None, "urls": None}),
    Registry("artifact-beside", artifact=True),
]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return Layout(tmp_path_factory.mktemp("field") / "layout")


@pytest.fixture(scope="module")
def lowest() -> dict[str, Layer]:
    """The lowest layers that there are already, by their names: large ones are made when a row asks for them."""
    return {}


@pytest.mark.timeout(900)  # the larger bases take minutes to build, once on a machine
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_an_image(host: Host, layout: Layout, lowest: dict[str, Layer], tmp_path: Path, row: Row) -> None:
    if row.base not in lowest:
        lowest[row.base] = lowest_layer(row.base, tmp_path)
    layout.add(row.name, [lowest[row.base], *(layer_of(tree) for tree in row.layers)], row.config)
    try_image(host, row, layout.reference(row.name))


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.name)
def test_a_registry(host: Host, tmp_path: Path, registry: Registry) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add("1", [lowest_layer(STATIC, tmp_path)], {"Entrypoint": ["/report"]})
    row = Row(registry.name, STATIC, out="0:0 / on {}, HOME=/root, 1 words\n")
    with serving() as server:
        try_image(host, row, registry.serve(server, layout, "1"))
