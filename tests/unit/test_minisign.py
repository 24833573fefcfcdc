"""Signatures: what the minisign command makes is accepted, and nothing else."""

import base64
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.minisign import PublicKey, verify

DATA = b'{"version": 1, "entries": []}\n'
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="

pytestmark = pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")


@dataclass(frozen=True)
class Signed:
    """A file with its signatures in both forms; `other` is a key that signed nothing here."""

    directory: Path
    key: PublicKey
    other: PublicKey
    prehashed: str
    legacy: str


def minisign(*arguments: str | Path) -> None:
    subprocess.run(["minisign", *arguments], check=True, stdin=subprocess.DEVNULL, capture_output=True)


def sign(directory: Path, *options: str) -> str:
    minisign("-S", "-s", directory / "key.sec", "-m", directory / "data", "-x", directory / "signature", *options)
    return (directory / "signature").read_text(errors="surrogateescape")


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    directory = tmp_path_factory.mktemp("minisign")
    (directory / "data").write_bytes(DATA)
    for name in ("key", "other"):
        minisign("-G", "-W", "-p", directory / f"{name}.pub", "-s", directory / f"{name}.sec")
    key, other = (PublicKey.parse((directory / f"{name}.pub").read_text()) for name in ("key", "other"))
    return Signed(directory, key, other, sign(directory, "-t", "of today"), sign(directory, "-l", "-t", "of old"))


def refused(data: bytes, signature: str, key: PublicKey) -> str:
    with pytest.raises(BangerError) as caught:
        verify(data, signature, key)
    assert caught.value.code is Code.CORRUPT
    return caught.value.message


def test_both_forms_and_their_comments(signed: Signed) -> None:
    assert verify(DATA, signed.prehashed, signed.key) == "of today"
    assert verify(DATA, signed.legacy, signed.key) == "of old"
    assert verify(DATA, signed.legacy.replace("\n", "\r\n"), signed.key) == "of old"


@pytest.mark.parametrize("comment", ["timestamp:1\tfile:x", "käse ✓", " padded ", "trusted comment: twice"])
def test_comments_come_back_as_they_were_given(signed: Signed, comment: str) -> None:
    assert verify(DATA, sign(signed.directory, "-t", comment), signed.key) == comment


def test_a_comment_that_is_not_utf8(signed: Signed) -> None:
    assert verify(DATA, sign(signed.directory, "-t", "caf\udce9"), signed.key) == "caf\udce9"
    assert "not text" in refused(DATA, signed.legacy.replace("of old", "\ud800"), signed.key)


def test_public_keys_as_file_and_as_line(signed: Signed) -> None:
    text = (signed.directory / "key.pub").read_text()
    assert PublicKey.parse(text.splitlines()[1]) == PublicKey.parse(f"  {text}\n") == signed.key
    assert str(signed.key) == text.splitlines()[1]


@pytest.mark.parametrize(
    "text",
    ["", "RW", "key.pub", "\0", "untrusted comment: x", "a\nb\nc", "RW" * 40_000, "RUQ" + "A" * 53, "é" * 56],
)
def test_what_is_no_public_key(text: str) -> None:
    with pytest.raises(BangerError, match="not a minisign public key") as caught:
        PublicKey.parse(text)
    assert caught.value.code is Code.INVALID
    assert len(caught.value.message) < 200


def test_secret_keys_are_not_taken_for_public_ones(signed: Signed) -> None:
    with pytest.raises(BangerError, match="not a minisign public key"):
        PublicKey.parse((signed.directory / "key.sec").read_text())


def test_another_key_is_named_with_the_right_one(signed: Signed) -> None:
    """By the numbers that minisign itself writes into the comments of its keys; before 0.12 without leading zeros."""
    ids = [
        (signed.directory / f"{name}.pub").read_text().splitlines()[0].rpartition(" ")[2].zfill(16)
        for name in ("key", "other")
    ]
    assert refused(DATA, signed.prehashed, signed.other).endswith(f"by the key {ids[0]}, not by {ids[1]}")


def test_a_key_is_named_with_its_leading_zeros(signed: Signed) -> None:
    key = PublicKey(b"\x08\x07\x06\x05\x04\x03\x2d\x00", signed.other.key)
    message = refused(DATA, signed.prehashed, key)
    assert message.endswith("not by 002D030405060708")


def test_a_key_that_only_claims_the_id(signed: Signed) -> None:
    assert "signed" in refused(DATA, signed.prehashed, PublicKey(signed.key.id, signed.other.key))


def test_changed_comments(signed: Signed) -> None:
    assert "comment has been changed" in refused(DATA, signed.prehashed.replace("of today", "of then"), signed.key)
    lines = signed.prehashed.splitlines()
    assert verify(DATA, "\n".join(["untrusted comment: anything", *lines[1:]]), signed.key) == "of today"


def test_signatures_do_not_change_places(signed: Signed) -> None:
    """Neither the form nor the signature of the comment can be taken from another signature of the same file."""
    new, old = signed.prehashed.splitlines(), signed.legacy.splitlines()
    refused(DATA, "\n".join([*new[:2], *old[2:]]), signed.key)
    relabelled = ["RW" + new[1][2:] if new[1].startswith("RU") else new[1]]
    assert relabelled != [new[1]]
    refused(DATA, "\n".join([new[0], *relabelled, *new[2:]]), signed.key)


@given(data=st.binary(max_size=100))
@example(data=DATA[:-1])
@example(data=DATA + b"\n")
def test_other_data_is_refused(signed: Signed, data: bytes) -> None:
    for signature in (signed.prehashed, signed.legacy):
        assert data == DATA or "signed" in refused(data, signature, signed.key)


@given(st.data())
def test_changed_signatures_are_refused(signed: Signed, draw: st.DataObject) -> None:
    """Any change outside the untrusted comment; one of bits that base64 leaves unused is none."""
    signature = draw.draw(st.sampled_from([signed.prehashed, signed.legacy]))
    position = draw.draw(st.integers(signature.index("\n") + 1, len(signature) - 1))
    inserted = draw.draw(st.one_of(st.sampled_from(["", "\n", " ", "\0", *ALPHABET]), st.text(max_size=3)))
    changed = signature[:position] + inserted + signature[position + draw.draw(st.integers(0, 3)) :]
    code: Code | None = None
    try:
        verify(DATA, changed, signed.key)
    except BangerError as error:
        code = error.code
    assert code is Code.CORRUPT or (code is None and decoded(changed) == decoded(signature))


def decoded(signature: str) -> tuple[bytes, str, bytes]:
    """The content of the lines that count."""
    lines = signature.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return base64.b64decode(lines[1]), lines[2], base64.b64decode(lines[3])


@given(st.text())
def test_any_text_is_refused_cleanly(signed: Signed, text: str) -> None:
    refused(DATA, text, signed.key)
    refused(DATA, f"untrusted comment: x\n{text}\ntrusted comment: y\n{text}", signed.key)


@pytest.mark.parametrize("option", [[], ["-l"]])
def test_the_command_agrees(signed: Signed, option: list[str]) -> None:
    """What is refused here, minisign refuses too, and the other way round."""
    signature = sign(signed.directory, *option)
    lines = signature.splitlines()
    for index in range(1, 4):
        for changed in (lines[index][:-1], lines[index].swapcase(), ""):
            text = "\n".join([*lines[:index], changed, *lines[index + 1 :]]) + "\n"
            (signed.directory / "changed").write_text(text)
            with pytest.raises(subprocess.CalledProcessError):
                minisign(
                    "-V",
                    "-p",
                    signed.directory / "key.pub",
                    "-m",
                    signed.directory / "data",
                    "-x",
                    signed.directory / "changed",
                )
            refused(DATA, text, signed.key)
