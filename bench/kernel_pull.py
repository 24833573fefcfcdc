"""kernel pull: a bundle of a 146 MB tree over loopback, against a shell pipeline of the same stages; and its memory."""

from __future__ import annotations

import functools
import hashlib
import http.server
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import KERNEL, Host, empty_host, in_turn, load, pull_kernel, report, seconds

from banger.api import models as m
from banger.api import operations as op
from banger.kernelcat import manifest as kernels

ROUNDS = 7
NAME = "bundle"


def make_bundle(host: Host, directory: Path) -> tuple[Path, int]:
    """Debian's cloud kernel and its modules as other tools pack them; the bundle, and the bytes of its tree."""
    pull_kernel(host.client)
    entry, tree = host.layout.kernels / KERNEL, directory / "tree"
    (tree / "modules").mkdir(parents=True)
    shutil.copyfile(entry / kernels.VMLINUX, tree / kernels.VMLINUX)
    subprocess.run(["rdsquashfs", "-q", "-u", "/", "-p", tree / "modules", entry / kernels.MODULES], check=True)
    bundle = directory / f"{NAME}.tar.zst"
    subprocess.run(["tar", "-C", tree, "-I", "zstd -19 -T0 -q", "-cf", bundle, "vmlinux", "modules"], check=True)
    size = sum(file.stat().st_size for file in tree.rglob("*") if file.is_file())
    shutil.rmtree(tree)
    return bundle, size


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without telling so."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """The address of a directory on loopback."""
    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def pipeline(url: str, digest: str, target: Path) -> None:
    """The stages of a pull by ordinary tools: download, hash, decompress, extract."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    script = f"curl -fsS {url} | tee >(sha256sum > {target}.sum) | zstd -dcq | tar -x -C {target}; wait"
    subprocess.run(["bash", "-o", "pipefail", "-c", script], check=True)
    if not Path(f"{target}.sum").read_text().startswith(digest):
        raise SystemExit("the pipeline downloaded something else")


def resident(pid: int, field: str) -> int:
    """A memory size of a process in bytes: VmRSS, or VmHWM for its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    with empty_host(("kernels", KERNEL)) as host, tempfile.TemporaryDirectory(prefix="banger-bench-") as scratch:
        bundle, tree_bytes = make_bundle(host, Path(scratch))
        digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
        pid = host.client.call(op.DAEMON_STATUS, m.Empty()).pid
        with served(bundle.parent) as address:
            url = f"{address}/{bundle.name}"
            pull = m.KernelPull(url, sha256=digest, force=True)

            def ours() -> float:
                return seconds(lambda: host.client.call(op.KERNEL_PULL, pull))

            def theirs() -> float:
                return seconds(lambda: pipeline(url, digest, Path(scratch, "target")))

            before = resident(pid, "VmRSS")
            measured, floor = in_turn(ROUNDS, ours, theirs)
            sizes = f"{bundle.stat().st_size / 1e6:.0f} MB, unpacked {tree_bytes / 1e6:.0f} MB"
            report(f"pull of {sizes}", measured, "curl | tee >(sha256sum) | zstd -d | tar x", floor)
            extra = resident(pid, "VmHWM") - before
            print(f"{'daemon: peak above its size before':<44} {extra / 1e6:9.1f} MB")
    print(load())


if __name__ == "__main__":
    main()
