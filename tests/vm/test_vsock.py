"""The agent over vsock, as under Firecracker: inside a guest, where the kernel's loopback transport carries it."""

import base64
import json
from pathlib import Path

from banger.guest.binary import agent_binary
from banger.guest.protocol import (
    MAX_FRAME,
    NONCE_SIZE,
    PROTOCOL_VERSION,
    VSOCK_AGENT_PORT,
    VSOCK_LOG_PORT,
    ExecFlags,
    Frame,
    FrameParser,
    FrameType,
    OpenKind,
    Tag,
    decode_hello,
    encode_fields,
    encode_frame,
    encode_hello,
)
from banger.vmm.detect import host_arch
from tests.vm.host import Host

_LOCAL = 1  # VMADDR_CID_LOCAL
# what the host does, by hand: a listener for the log, then a session of which all is read until its channel is closed
_HOST = f"""
import base64, json, socket, sys, time
said, end = (base64.b64decode(text) for text in json.load(sys.stdin))
listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
listener.bind((socket.VMADDR_CID_ANY, {VSOCK_LOG_PORT}))
listener.listen()
for second in range(100):
    session = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    session.settimeout(30)
    try:
        session.connect(({_LOCAL}, {VSOCK_AGENT_PORT}))
        break
    except OSError:
        session.close()
        time.sleep(0.1)
session.sendall(said)
listener.settimeout(30)
log, peer = listener.accept()
log.settimeout(30)
heard = b""
while end not in heard:
    data = session.recv(65536)
    assert data, "the agent hung up"
    heard += data
logged = b""
while not logged.endswith(b"over vsock\\n"):
    data = log.recv(65536)
    assert data, "the log has ended"
    logged += data
print(json.dumps([base64.b64encode(part).decode() for part in (heard, logged)]))
"""


def test_a_session_and_the_log(host: Host, development_image: Path) -> None:
    host.daemon.link([development_image])
    host.ok("vm", "run", "-d", "--name", "vsock", "--image", development_image.name, "--", "sleep", "infinity")
    host.ok("vm", "cp", str(agent_binary(host_arch())), "vsock:/usr/local/bin/agent")
    host.ok("vm", "exec", "vsock", "--", "modprobe", "vsock_loopback")
    log = f"vsock:{_LOCAL}:{VSOCK_LOG_PORT}"
    host.ok("vm", "exec", "-d", "vsock", "--", "agent", "--listen", f"vsock:{VSOCK_AGENT_PORT}", "--log", log)
    nonce = bytes(range(NONCE_SIZE))
    run = encode_fields([(Tag.ARG, "echo"), (Tag.ARG, "over vsock"), (Tag.FLAGS, int(ExecFlags.LOG))])
    said = bytes(MAX_FRAME) + encode_hello(nonce, PROTOCOL_VERSION, PROTOCOL_VERSION)
    said += encode_frame(FrameType.OPEN, 1, int(OpenKind.EXEC).to_bytes(2, "little") + run)
    end = encode_frame(FrameType.CLOSE, 1)
    host.daemon.layout.state.joinpath("host.py").write_text(_HOST)
    host.ok("vm", "cp", str(host.daemon.layout.state / "host.py"), "vsock:/tmp/host.py")
    input = json.dumps([base64.b64encode(text).decode() for text in (said, end)]).encode()
    answer = host.ok("vm", "exec", "-i", "vsock", "--", "python3", "/tmp/host.py", input=input)
    heard, logged = (base64.b64decode(text) for text in json.loads(answer))
    parser = FrameParser()
    frames: list[Frame] = [*parser.feed(heard)]
    assert decode_hello(frames[0].payload) == (nonce, PROTOCOL_VERSION, PROTOCOL_VERSION)
    assert b"".join(frame.payload for frame in frames if frame.type is FrameType.DATA) == b"over vsock\n"
    assert logged == bytes([1, len("over vsock\n"), 0, 0]) + b"over vsock\n"
    host.ok("vm", "rm", "--force", "vsock")
