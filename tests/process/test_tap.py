"""The network of a VM with taps, for real: all of tap_checks in a world of its own, as root and as another user."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

USER = 54321
# the only neighbours: addresses of a device that leads nowhere, one of them with a DNS server behind it
_WORLD = """
set -e
mount --make-rprivate /
ip link set lo up
ip link add up0 type veth peer name down0
ip link set up0 up
ip link set down0 up
for address in 192.0.2.2 192.0.2.53 192.0.2.80; do ip addr add $address/24 dev up0; done
ip route add default via 192.0.2.1
mount -t tmpfs -o mode=755 tmpfs /dev/net
mknod /dev/net/tun c 10 200
chmod "$DEVICE_MODE" /dev/net/tun
mknod /dev/net/open c 10 200
chmod 666 /dev/net/open
echo nameserver 192.0.2.53 > "$PLACE/resolv.conf"
mount --bind "$PLACE/resolv.conf" /etc/resolv.conf
python3 "$SERVERS" 192.0.2.53 > "$PLACE/ready" &
trap "kill $!" EXIT
while ! grep -q ready "$PLACE/ready"; do kill -0 $!; done
"$@"
"""

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="a world of its own needs root"),
    pytest.mark.skipif(shutil.which("pasta") is None, reason="pasta is not installed"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users reach too, as pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="banger-test-tap-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.mark.parametrize("user", [0, USER])
def test_all_checks(place: Path, user: int) -> None:
    here = Path(__file__).parent
    base = place / "base"
    base.mkdir(mode=0o700)
    os.chown(base, user, user)
    checks = [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-ra"),
        *("--basetemp", str(base / "t"), "--rootdir", str(here.parent.parent), str(here / "tap_checks.py")),
    ]
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"] if user else []
    environment = {
        **os.environ,
        "HOME": str(base),
        "TMPDIR": str(base),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PLACE": str(place),
        "SERVERS": str(here.parent / "vm" / "servers.py"),
        # as root, the device is closed to the user that the helper becomes
        "DEVICE_MODE": "666" if user else "600",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    world = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", _WORLD, "sh", *drop, *checks],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert world.returncode == 0, f"{world.stdout}\n{world.stderr}"
    assert " passed" in world.stdout
