"""References to images: the grammar of distribution's reference package, with its own examples and arbitrary ones."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.oci.reference import Reference, split_mirror

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag"),
    [
        ("debian", "docker.io", "library/debian", "latest"),
        ("debian:12", "docker.io", "library/debian", "12"),
        ("weaveworks/ignite-kernel:5.10.51", "docker.io", "weaveworks/ignite-kernel", "5.10.51"),
        ("docker.io/debian", "docker.io", "library/debian", "latest"),
        ("index.docker.io/debian", "docker.io", "library/debian", "latest"),
        ("index.docker.io/docker/docker", "docker.io", "docker/docker", "latest"),
        ("registry-1.docker.io/debian", "docker.io", "library/debian", "latest"),
        ("test.com:tag", "docker.io", "library/test.com", "tag"),
        ("test.com:5000", "docker.io", "library/test.com", "5000"),
        ("192.168.1.1:5000", "docker.io", "library/192.168.1.1", "5000"),
        ("lowercase:Uppercase", "docker.io", "library/lowercase", "Uppercase"),
        ("foo/foo_bar.com:8080", "docker.io", "foo/foo_bar.com", "8080"),
        ("foo_bar.com:8080", "docker.io", "library/foo_bar.com", "8080"),
        ("dock__er/docker---x", "docker.io", "dock__er/docker---x", "latest"),
        ("localhost/debian", "localhost", "debian", "latest"),
        ("LOCALDOMAIN/library/debian", "LOCALDOMAIN", "library/debian", "latest"),
        ("Uppercase/lowercase:tag", "Uppercase", "lowercase", "tag"),
        ("test:5000/repo:tag", "test:5000", "repo", "tag"),
        ("ghcr.io/org/kernel:6.12", "ghcr.io", "org/kernel", "6.12"),
        ("192.168.1.1:5000/repo:5050", "192.168.1.1:5000", "repo", "5050"),
        ("[2001:db8::1]/repo", "[2001:db8::1]", "repo", "latest"),
        ("[2001:db8::1]:5000/repo:tag", "[2001:db8::1]:5000", "repo", "tag"),
        ("xn--7o8h.com/myimage:xn--7o8h.com", "xn--7o8h.com", "myimage", "xn--7o8h.com"),
        ("sub-dom1.foo.com/bar/baz/quux:some-long-tag", "sub-dom1.foo.com", "bar/baz/quux", "some-long-tag"),
        ("docker.io/" + "1a" * 32, "docker.io", "library/" + "1a" * 32, "latest"),
        ("a/" * 120 + "a:" + "t" * 128, "docker.io", "a/" * 120 + "a", "t" * 128),
    ],
)
def test_parts(text: str, registry: str, repository: str, tag: str) -> None:
    assert Reference.parse(text) == Reference(registry, repository, tag, "")
    at_digest = Reference.parse(f"{text}@{DIGEST}")
    written = tag if text.endswith(f":{tag}") else ""
    assert at_digest == Reference(registry, repository, written, DIGEST)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "'library/' is not a repository"),
        (":justtag", "is not a repository"),
        (f"@{DIGEST}", "is not a repository"),
        ("debian:", "'' is not a tag"),
        ("debian:-x", "'-x' is not a tag"),
        ("debian:" + "t" * 129, "is not a tag"),
        ("debian:12\n", "'12\\n' is not a tag"),
        ("Uppercase:tag", "is not a repository"),
        ("docker/Docker", "'docker/Docker' is not a repository"),
        ("test:5000/Uppercase/lowercase:tag", "is not a repository"),
        ("https://github.com/docker/docker", "leave out the https://"),
        ("docker://debian:12", "leave out the docker://"),
        ("-docker/docker", "is not a repository"),
        ("-docker.io/docker/docker", "'-docker.io' is not a registry"),
        ("docker///docker", "is not a repository"),
        ("docker/", "is not a repository"),
        ("aa/asdf$$^/aa", "is not a repository"),
        ("../../etc/passwd", "'..' is not a registry"),
        ("a/../b", "is not a repository"),
        ("dock..er/docker", "'dock..er' is not a registry"),
        ("fc00::1:5000/debian", "'fc00::1:5000' is not a registry"),
        ("[fe80::1%eth0]:5000/debian", "is not a registry"),
        ("[2001:db8::1]", "is not a tag"),
        ("user:password@example.com/kernel", "the digest must be sha256:"),
        ("example.com:99999999/kernel", "is not a registry"),
        ("1a" * 32, "it is an identifier"),
        ("example.com/" + "a" * 256, "is not a repository"),
        ("repo@sha256:" + "f" * 34, "the digest must be sha256:"),
        ("repo@sha256:" + "F" * 64, "the digest must be sha256:"),
        ("repo@sha512:" + "f" * 128, "the digest must be sha256:"),
        ("repo@" + DIGEST + "\n", "the digest must be sha256:"),
        ("b\x1b[31mad", "'b\\x1b[31mad' is not a reference"),
    ],
)
def test_what_is_wrong_is_said(text: str, wrong: str) -> None:
    with pytest.raises(BangerError) as caught:
        Reference.parse(text)
    assert caught.value.code is Code.INVALID
    assert wrong in caught.value.message
    assert repr(text)[:100] in caught.value.message
    assert caught.value.message.isprintable()
    assert "for example" in caught.value.hint


component = st.from_regex(r"[a-z0-9]{1,9}(?:(?:[._]|__|-+)[a-z0-9]{1,9}){0,3}", fullmatch=True)
host = st.from_regex(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9]+)+(?::[0-9]{1,5})?", fullmatch=True)
registries = host | st.sampled_from(["localhost", "localhost:1", "[::1]:5000", "docker.io", "A"])
repositories = st.lists(component, min_size=1, max_size=4).map("/".join).filter(lambda path: len(path) < 240)
tags = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", fullmatch=True)


@given(registries, repositories, st.just("") | tags, st.sampled_from(["", DIGEST]))
def test_all_of_the_grammar_is_read(registry: str, repository: str, tag: str, digest: str) -> None:
    text = f"{registry}/{repository}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    reference = Reference.parse(text)
    assert reference.registry == registry
    assert reference.repository == (
        repository if "/" in repository or registry != "docker.io" else f"library/{repository}"
    )
    assert (reference.tag, reference.digest) == (tag or ("" if digest else "latest"), digest)
    assert Reference.parse(str(reference)) == reference


@given(st.text() | st.text(alphabet="aA0.:/@[]-_ \n%" + DIGEST[:7]))
def test_anything_is_read_or_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except BangerError as error:
        refusal = error
    else:
        assert Reference.parse(str(reference)) == reference
        return
    assert refusal.code is Code.INVALID
    assert refusal.message.isprintable()


@pytest.mark.parametrize("text", ["a" * 1_000_000, "a." * 500_000 + "!/x", "A-" * 500_000 + "/x", "x" + "/a" * 500_000])
def test_long_nonsense_is_refused_at_once(text: str) -> None:
    with pytest.raises(BangerError) as caught:
        Reference.parse(text)
    assert len(caught.value.message) < 1000


def test_default_registry() -> None:
    for text, registry, repository in (
        ("debian", "example.org:5000", "debian"),
        ("org/debian", "example.org:5000", "org/debian"),
        ("docker.io/debian", "docker.io", "library/debian"),
        ("ghcr.io/debian", "ghcr.io", "debian"),
    ):
        reference = Reference.parse(text, "example.org:5000")
        assert (reference.registry, reference.repository) == (registry, repository)
    assert Reference.parse("debian", "index.docker.io") == Reference.parse("debian")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mirror.example.org", ("", "mirror.example.org", "")),
        ("https://mirror.example.org/", ("https", "mirror.example.org", "")),
        ("http://[::1]:5000/a/b", ("http", "[::1]:5000", "a/b/")),
    ],
)
def test_mirror(text: str, parts: tuple[str, str, str]) -> None:
    assert split_mirror(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "http://",
        "ftp://a",
        "a//b",
        "a/B",
        "a?b",
        "://a",
        "user@a",
        "a/../b",
        "https://a:b@c",
        "http://http://a",
    ],
)
def test_what_is_no_mirror(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        split_mirror(text)
