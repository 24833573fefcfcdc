"""WWW-Authenticate as RFC 9110 has it, and as servers write it."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.oci.challenges import Challenge, parse_challenges

TOKENS = st.text(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~", min_size=1, max_size=12)
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
SPACES = st.sampled_from(["", " ", "\t", "  "])
COMMAS = st.sampled_from([",", ", ", " ,\t", ",,", ", , "])


@st.composite
def written(draw: st.DrawFn) -> tuple[str, list[Challenge]]:
    """A header and what it says."""
    parts, wanted = [], []
    for scheme in draw(st.lists(TOKENS, min_size=1, max_size=4)):
        kind = draw(st.sampled_from(["alone", "token68", "parameters"]))
        parameters = draw(st.dictionaries(TOKENS.map(str.lower), TEXTS, min_size=1, max_size=4))
        if kind == "parameters":
            said = []
            for name, value in parameters.items():
                # what is of = alone would be a token68 with the name
                token = value.strip("=") and not set(value) & set(' ,"')
                escaped = value.replace("\\", "\\\\").replace('"', '\\"')
                equals = f"{draw(SPACES)}={draw(SPACES)}"
                said.append(f"{name}{equals}{value}" if token and draw(st.booleans()) else f'{name}{equals}"{escaped}"')
            parts.append(f"{scheme} {draw(COMMAS).join(said)}")
        else:
            parts.append(scheme if kind == "alone" else f"{scheme} QWxh+/=")
        wanted.append(Challenge(scheme.lower(), parameters if kind == "parameters" else {}))
    return draw(SPACES) + draw(COMMAS).join(parts) + draw(st.sampled_from(["", ",", " "])), wanted


@given(written())
def test_what_is_written_is_read(case: tuple[str, list[Challenge]]) -> None:
    header, wanted = case
    assert parse_challenges(header) == wanted


@given(st.text(max_size=300))
def test_anything_else_ends_somewhere(header: str) -> None:
    assert all(challenge.scheme == challenge.scheme.lower() for challenge in parse_challenges(header))


@pytest.mark.parametrize(
    ("header", "schemes"),
    [
        ("", []),
        ("Bearer", ["bearer"]),
        ('Negotiate, Basic realm="a, Bearer realm=\\"b\\""', ["negotiate", "basic"]),
        ('Bearer realm="x" service="y"', ["bearer"]),  # without the comma between them
        ('Basic realm="x", Bearer realm="unfinished', ["basic", "bearer"]),
        ('="x", Basic', []),
        ("Basic realm=/, Bearer realm=https://host/token?a=b,service=x", ["basic", "bearer"]),
    ],
)
def test_schemes(header: str, schemes: list[str]) -> None:
    assert [challenge.scheme for challenge in parse_challenges(header)] == schemes


def test_long_ones_cost_little() -> None:
    for header in (
        'Bearer realm="' + "x" * 1_000_000,
        "Bearer realm=" + "x" * 1_000_000 + '"',
        "a " * 500_000,
        "Bearer " + "a=b," * 250_000,
        "a" + " " * 1_000_000,
        '\\"' * 500_000,
    ):
        assert len(parse_challenges(header)) <= 64
