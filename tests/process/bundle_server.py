"""Small bundles, and a server on loopback that a test can stop in the middle of one."""

import hashlib
import http.server
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import zstandard

from tests.unit.kernelcat import builders


def bundle(version: str = builders.VERSION, marker: bytes = b"", padding: int = 0) -> bytes:
    """A bundle (tar.zst) of a kernel whose vmlinux ends in `marker`; `padding` incompressible bytes make it larger."""
    noise = hashlib.shake_256(b"noise").digest(padding)
    dependencies = "".join(f"{path}: {' '.join(needs)}\n" for path, needs in builders.VIRTIO.items())
    files = {
        "vmlinux": builders.elf(version, extra=marker),
        "modules/modules.dep": dependencies.encode(),
        "modules/modules.dep.bin": b"index",
        "modules/modules.builtin": "".join(f"kernel/{name}.ko\n" for name in builders.BUILTIN).encode(),
        **{f"modules/{path}": builders.module(path) for path in builders.VIRTIO},
        "modules/extra/noise.ko": builders.module("noise") + noise,
    }
    archive = builders.tar(builders.tar_member(name, data) for name, data in files.items())
    return zstandard.ZstdCompressor(level=1).compress(archive)


class BundleServer:
    """Serves `content` at /NAME; `gate` is waited for in the middle of each answer once `hold` is set."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.hold = False
        self.gate = threading.Event()
        self.half_sent = threading.Event()
        self.abandoned = threading.Event()
        self.address = ""


def _closed(connection: socket.socket) -> bool:
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""


@contextmanager
def bundle_server() -> Iterator[BundleServer]:
    """A BundleServer while the block runs."""
    state = BundleServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            data = state.content.get(self.path.removeprefix("/"))
            if data is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            middle = len(data) // 2
            try:
                self.wfile.write(data[:middle])
                if state.hold:
                    self.wfile.flush()
                    state.half_sent.set()
                    while not state.gate.wait(0.05):
                        if _closed(self.connection):
                            state.abandoned.set()
                            return
                self.wfile.write(data[middle:])
            except OSError:
                state.abandoned.set()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        state.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            state.gate.set()
            server.shutdown()
            thread.join()
