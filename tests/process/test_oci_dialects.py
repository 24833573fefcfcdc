"""The registry client against servers that write HTTP in other ways than the usual one, as many in the field do."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api.errors import Code
from tests.http_server import Reply, Server, serving
from tests.process.registry_client import (
    AMD64,
    PLAIN,
    clean_environment,
    failure,
    login,
    opened,
    pull,
    serve,
)
from tests.registry import INDEX, PASSWORD, USER, digest_of, image, layer

NOISE = random.Random(1).randbytes(2_000_000)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from clean_environment(tmp_path / "home", monkeypatch)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


# logins


def served_with_login(server: Server, challenge: str, *replies: Reply) -> str:
    """An image behind a challenge in which {realm} is a token server with these replies."""
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    realm = server.serve("/token", *replies or (Reply(b'{"token": "good"}'),))
    wanted = Reply(status=401, headers={"WWW-Authenticate": challenge.format(realm=realm)})
    server.serve("/v2/kernel/manifests/1", wanted, Reply(built.manifest))
    return address


@pytest.mark.parametrize(
    "challenge",
    [
        'Negotiate, Basic realm="x", Bearer realm="{realm}",service="s"',
        'Bearer realm="{realm}", service="s", Basic realm="x"',
        'bearer  REALM = "{realm}" , service=s',
        'Bearer error="invalid_token", error_description="no \\"token\\", yet", realm="{realm}"',
        'Negotiate YIIJvwYGKwYBBQUC==, Bearer realm="{realm}"',
        'Bearer realm="ftp://127.0.0.1/", Bearer realm="{realm}"',
        ', Digest realm="a, b", nonce="c=d",, Bearer realm="{realm}"',
        'Bearer realm="{realm}#there"',
        'Bearer realm="{realm}"service="s"',
        "Basic realm=/, Bearer realm={realm},service=s",  # without the quotes that the grammar wants
    ],
)
def test_the_challenge_that_is_known_is_chosen(server: Server, environment: Path, challenge: str) -> None:
    address = served_with_login(server, challenge)
    login(environment, address)
    pull(address, "kernel:1")
    assert server.asked("/v2/kernel/manifests/1")[-1].headers["authorization"] == "Bearer good"


def test_a_password_where_no_token_is_to_be_had(server: Server, environment: Path) -> None:
    address = served_with_login(server, 'Negotiate, Bearer realm="file:///token", Basic realm="x"')
    login(environment, address)
    pull(address, "kernel:1")
    assert server.requests[-1].user == f"{USER}:{PASSWORD}"
    assert server.asked("/token") == []


def test_several_headers(server: Server) -> None:
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    realm = server.serve("/token", Reply(b'{"token": "good"}'))
    lines = ["Negotiate", 'Basic realm="x"', f'Bearer realm="{realm}"']
    head = "".join(f"WWW-Authenticate: {line}\r\n" for line in lines)
    refusal = Reply(raw=f"HTTP/1.1 401 Unauthorized\r\n{head}Content-Length: 0\r\n\r\n".encode())
    server.serve("/v2/kernel/manifests/1", refusal, Reply(built.manifest))
    assert len(pull(address, "kernel:1")[1]) == 1


def test_the_scope_is_that_of_the_challenge(server: Server, environment: Path) -> None:
    scope = "repository:local/team/kernel:pull repository:base:pull"
    address = served_with_login(server, f'Bearer realm="{{realm}}",scope="{scope}"')
    pull(address, "kernel:1")
    assert server.asked("/token")[0].path == (
        "/token?scope=repository%3Alocal%2Fteam%2Fkernel%3Apull&scope=repository%3Abase%3Apull"
    )


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_a_wider_scope(server: Server, status: int) -> None:
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    realm = server.serve("/token", Reply(b'{"token": "narrow"}'), Reply(b'{"token": "wide"}'))
    first = Reply(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}",scope="a"'})
    wider = f'Bearer realm="{realm}",scope="a b",error="insufficient_scope"'
    second = Reply(status=status, headers={"WWW-Authenticate": wider})
    server.serve("/v2/kernel/manifests/1", first, second, Reply(built.manifest))
    assert len(pull(address, "kernel:1")[1]) == 1
    said = [request.headers.get("authorization") for request in server.asked("/v2/kernel/manifests/1")]
    assert said == [None, "Bearer narrow", "Bearer wide"]


def test_a_server_that_wants_ever_wider_scopes(server: Server) -> None:
    realm = server.serve("/token", *(Reply(f'{{"token": "{number}"}}'.encode()) for number in range(20)))
    challenges = [
        Reply(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}",scope="{number}"'})
        for number in range(20)
    ]
    server.serve("/v2/kernel/manifests/1", *challenges)
    assert failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1")).code is Code.DOWNLOAD
    assert len(server.asked("/v2/kernel/manifests/1")) == 4


@pytest.mark.parametrize("status", [401, 403])
def test_a_login_that_only_blobs_ask_for(server: Server, status: int) -> None:
    each = layer({"vmlinux": b"first"})
    address = serve(server, image([each]))
    realm = server.serve("/token", Reply(b'{"token": "good"}'))
    wanted = Reply(status=status, headers={"WWW-Authenticate": f'Bearer realm="{realm}",error="insufficient_scope"'})
    path = f"/v2/kernel/blobs/{digest_of(each.data)}"
    server.serve(path, wanted, Reply(each.data))
    assert pull(address, "kernel:1")[1] == [each.data]
    assert [request.headers.get("authorization") for request in server.asked(path)] == [None, "Bearer good"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_login_that_only_the_base_asks_for(server: Server, environment: Path, status: int) -> None:
    """As docker and skopeo begin there, registries exist that tell nowhere else how to log in."""
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    login(environment, address)
    realm = server.serve("/token", Reply(b'{"token": "good"}'))
    server.serve("/v2/", Reply(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'}))
    server.serve("/v2/kernel/manifests/1", Reply(status=status), Reply(built.manifest))
    assert len(pull(address, "kernel:1")[1]) == 1
    assert server.asked("/token")[0].user == f"{USER}:{PASSWORD}"
    assert server.asked("/token")[0].path == "/token?scope=repository%3Akernel%3Apull"
    assert len(server.asked("/v2/")) == 1


def test_a_hidden_image_that_no_login_shows(server: Server, environment: Path) -> None:
    address = f"127.0.0.1:{server.port}"
    server.serve("/v2/", Reply(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'}))
    server.serve("/v2/kernel/manifests/1", Reply(status=404))
    for password in ("", "guessed"):
        if password:
            login(environment, address, password=password)
        error = failure(lambda: pull(address, "kernel:1"))
        assert error.code is Code.NOT_FOUND
        assert f"check the name, or log in: docker login {address}" in error.hint


@pytest.mark.parametrize(("status", "code"), [(401, Code.DOWNLOAD), (403, Code.DOWNLOAD), (404, Code.NOT_FOUND)])
@pytest.mark.parametrize("base", [200, 401, 404, 500])
def test_a_refusal_that_nothing_explains(server: Server, status: int, code: Code, base: int) -> None:
    server.serve("/v2/", Reply(b"{}", status=base))
    server.serve("/v2/kernel/manifests/1", Reply(status=status))
    error = failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1"))
    assert error.code is code
    assert "does not let you read" in error.message or status == 404
    assert len(server.asked("/v2/kernel/manifests/1")) == 1


def test_a_token_that_is_refused_without_a_challenge(server: Server) -> None:
    each = layer({"vmlinux": NOISE}, "")
    built = image([each])
    address = serve(server, built)
    realm = server.serve("/token", Reply(b'{"token": "first"}'), Reply(b'{"token": "second"}'))
    challenge = Reply(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'})
    server.serve("/v2/kernel/manifests/1", challenge, Reply(built.manifest))
    path = f"/v2/kernel/blobs/{digest_of(each.data)}"
    server.serve(path, Reply(each.data, cut=1_000_000), Reply(status=401), Reply(each.data))
    assert pull(address, "kernel:1")[1] == [each.data]
    assert server.asked(path)[-1].headers["authorization"] == "Bearer second"


ODD_TIMES: tuple[object, ...] = ("300", "soon", "", 3599.5, -1, float("nan"), float("inf"), 10**400, True, [], {})


@pytest.mark.parametrize(
    "token",
    [
        {"token": None, "access_token": "good"},
        {"token": "good", "access_token": None, "expires_in": None, "issued_at": None, "refresh_token": None},
        {"token": "", "access_token": "good", "expires_in": 0},
        *({"token": "good", "expires_in": odd} for odd in ODD_TIMES),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_tokens_with_null_and_encoded(server: Server, token: dict[str, object], packed: bool) -> None:
    body = json.dumps(token).encode()
    reply = Reply(gzip.compress(body), headers={"Content-Encoding": "gzip"}) if packed else Reply(body)
    address = served_with_login(server, 'Bearer realm="{realm}"', reply)
    assert len(pull(address, "kernel:1")[1]) == 1


# encodings


ENCODED = {"Content-Encoding": "gzip"}


@pytest.mark.parametrize("packed", ["gzip", "zstd", ""])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("on_the_way", [False, True])
def test_blobs_with_a_content_encoding(server: Server, packed: str, framing: str, on_the_way: bool) -> None:
    """What object stores only call so, and what proxies do: the digest decides."""
    each = layer({"vmlinux": NOISE}, packed)
    address = serve(server, image([each]))
    path = f"/v2/kernel/blobs/{digest_of(each.data)}"
    data = gzip.compress(each.data) if on_the_way else each.data
    server.serve(path, Reply(data, headers=ENCODED, framing=framing))
    assert pull(address, "kernel:1")[1] == [each.data]


@pytest.mark.parametrize("label", ["zstd", "br", "aws-chunked", "gzip, gzip", "IDENTITY", "x-gzip"])
def test_blobs_under_any_label(server: Server, label: str) -> None:
    each = layer({"vmlinux": NOISE})
    address = serve(server, image([each]))
    server.serve(f"/v2/kernel/blobs/{digest_of(each.data)}", Reply(each.data, headers={"Content-Encoding": label}))
    assert pull(address, "kernel:1")[1] == [each.data]


@pytest.mark.parametrize("on_the_way", [False, True])
def test_blobs_with_a_content_encoding_that_break_off(server: Server, on_the_way: bool) -> None:
    each = layer({"vmlinux": NOISE})
    address = serve(server, image([each]))
    data = gzip.compress(each.data) if on_the_way else each.data
    path = f"/v2/kernel/blobs/{digest_of(each.data)}"
    server.serve(path, Reply(data, headers=ENCODED, cut=1_000_000), Reply(data, headers=ENCODED))
    assert pull(address, "kernel:1")[1] == [each.data]
    # what was encoded on its way has no bytes to be asked for
    assert [request.headers.get("range") for request in server.asked(path)] == [
        None,
        None if on_the_way else "bytes=1000000-",
    ]


def test_an_encoding_that_unpacks_to_more(server: Server) -> None:
    each = layer({"vmlinux": b"first"})
    address = serve(server, image([each]))
    path = f"/v2/kernel/blobs/{digest_of(each.data)}"
    server.serve(path, Reply(gzip.compress(each.data + bytes(1 << 30), 1), headers=ENCODED))
    assert failure(lambda: pull(address, "kernel:1")).code is Code.CORRUPT
    server.serve("/v2/kernel/manifests/1", Reply(gzip.compress(bytes(1 << 30), 1), headers=ENCODED))
    assert failure(lambda: pull(address, "kernel:1")).code is Code.CORRUPT


@pytest.mark.parametrize("damage", [slice(0, -20), slice(0, 40)])
def test_an_encoding_that_is_damaged(server: Server, damage: slice) -> None:
    address = serve(server, image([layer({"vmlinux": b"first"})]))
    data = gzip.compress(json.dumps(PLAIN).encode())[damage]
    server.serve("/v2/kernel/manifests/1", Reply(data, headers=ENCODED))
    assert failure(lambda: pull(address, "kernel:1")).code is Code.DOWNLOAD


def test_manifests_that_are_encoded(server: Server) -> None:
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    typed = {"Content-Type": "application/json; charset=utf-8"}
    for reply in (
        Reply(gzip.compress(built.manifest), headers={**ENCODED, **typed}),
        Reply(gzip.compress(built.manifest), headers=ENCODED, framing="chunked"),
        Reply(built.manifest, headers=ENCODED),  # which only says so
        Reply(built.manifest, headers={"Content-Encoding": "br"}),
    ):
        server.serve("/v2/kernel/manifests/1", reply)
        assert pull(address, "kernel:1")[0].digest == built.digest
    server.serve("/v2/kernel/manifests/1", Reply(b"\x0b\x02\x80{}\x03", headers={"Content-Encoding": "br"}))
    assert "encoded as 'br'" in failure(lambda: pull(address, "kernel:1")).message


def test_content_of_several_gzip_members(server: Server) -> None:
    built = image([layer({"vmlinux": NOISE}, "zstd")])
    address = serve(server, built)
    data = built.layers[0].data
    for path, content in (("manifests/1", built.manifest), (f"blobs/{digest_of(data)}", data)):
        half = len(content) // 2
        packed = gzip.compress(content[:half]) + gzip.compress(content[half:])
        server.serve(f"/v2/kernel/{path}", Reply(packed, headers=ENCODED))
    assert pull(address, "kernel:1")[1] == [data]


@pytest.mark.parametrize("what", ["manifest", "blob"])
def test_gzip_that_nothing_comes_out_of(server: Server, what: str) -> None:
    """Empty members without an end: what is unpacked never gets too large."""
    each = layer({"vmlinux": b"first"}, "")
    address = serve(server, image([each]))
    path = "manifests/1" if what == "manifest" else f"blobs/{digest_of(each.data)}"
    server.serve(f"/v2/kernel/{path}", Reply(gzip.compress(b"") * 4096, headers=ENCODED, framing="endless"))
    error = failure(lambda: pull(address, "kernel:1"))
    assert error.code is Code.CORRUPT
    assert "more gzip data than" in error.message
    server.left.get(timeout=30)


@pytest.mark.parametrize("label", ["deflate", "br", "zstd"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_blobs_that_are_encoded_in_a_way_that_is_not_known(server: Server, label: str, framing: str) -> None:
    each = layer({"vmlinux": NOISE}, "")
    address = serve(server, image([each]))
    path = f"/v2/kernel/blobs/{digest_of(each.data)}"
    server.serve(path, Reply(zlib.compress(each.data), headers={"Content-Encoding": label}, framing=framing))
    error = failure(lambda: pull(address, "kernel:1"))
    assert error.code in (Code.CORRUPT, Code.DOWNLOAD)
    assert f"encoded as {label!r}" in error.message


# answers


@pytest.mark.parametrize(
    "refusal",
    [
        Reply(status=400),
        Reply(status=416),
        Reply(NOISE[:10], status=206),
        Reply(NOISE[:10], status=206, headers={"Content-Range": f"bytes 0-9/{len(NOISE)}"}),
        Reply(NOISE[:10], status=206, headers={"Content-Type": "multipart/byteranges; boundary=x"}),
    ],
)
def test_ranges_that_are_refused(server: Server, refusal: Reply) -> None:
    """By servers that only know ranges with an end, or none at all: the whole comes again."""
    each = layer({"vmlinux": NOISE}, "")
    address = serve(server, image([each]))
    path = f"/v2/kernel/blobs/{digest_of(each.data)}"
    server.serve(path, Reply(each.data, cut=1_000_000), refusal, Reply(each.data))
    assert pull(address, "kernel:1")[1] == [each.data]
    assert [request.headers.get("range") for request in server.asked(path)] == [None, "bytes=1000000-", None]


def test_a_request_that_took_too_long_for_the_server(server: Server) -> None:
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    server.serve("/v2/kernel/manifests/1", Reply(status=408), Reply(built.manifest))
    assert len(pull(address, "kernel:1")[1]) == 1


@pytest.mark.parametrize(
    "page",
    [
        Reply(bytes((4 << 20) + 1), status=404),
        Reply(bytes(1 << 16), status=404, framing="endless"),
        Reply(b"what is cut off", status=404, cut=3),
        Reply(gzip.compress(NOISE)[:-9], status=404, headers=ENCODED),
        Reply(b'{"errors": null}', status=404, headers={"Content-Encoding": "br"}),
    ],
    ids=["huge", "endless", "cut", "damaged", "encoded"],
)
def test_error_pages_are_of_no_matter(server: Server, page: Reply) -> None:
    server.serve("/v2/kernel/manifests/1", page)
    assert failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1")).code is Code.NOT_FOUND


def test_a_digest_that_is_told_twice(server: Server) -> None:
    data = json.dumps(PLAIN).encode()

    def answer(*digests: str) -> Reply:
        lines = "".join(f"Docker-Content-Digest: {digest}\r\n" for digest in digests)
        return Reply(raw=f"HTTP/1.1 200 OK\r\n{lines}Connection: close\r\n\r\n".encode() + data)

    address = f"127.0.0.1:{server.port}"
    server.serve("/v2/kernel/manifests/1", answer(digest_of(data), digest_of(data)))
    assert opened(address, "kernel:1").resolve(AMD64).digest == digest_of(data)
    for wrong in (answer(digest_of(data), digest_of(b"")), answer(digest_of(b""), digest_of(data))):
        server.serve("/v2/kernel/manifests/1", wrong)
        assert failure(lambda: pull(address, "kernel:1")).code is Code.CORRUPT


def test_lists_that_are_null(server: Server) -> None:
    """So Go writes lists that nothing was put into."""
    address = f"127.0.0.1:{server.port}"
    server.serve("/v2/kernel/manifests/1", Reply(json.dumps({**PLAIN, "layers": None}).encode()))
    assert pull(address, "kernel:1")[1] == []
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": None, "annotations": None, "subject": None}
    server.serve("/v2/kernel/manifests/1", Reply(json.dumps(index).encode()))
    assert failure(lambda: pull(address, "kernel:1")).code is Code.NOT_FOUND
