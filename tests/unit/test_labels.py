"""Names and values of labels."""

import pytest

from banger.labels import parse_label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("tier=web", ("tier", "web")),
        ("a=b=c", ("a", "b=c")),
        ("com.example/team=x y", ("com.example/team", "x y")),
        ("keep", ("keep", "")),
        ("keep=", ("keep", "")),
    ],
)
def test_parse(text: str, label: tuple[str, str]) -> None:
    assert parse_label(text) == label


@pytest.mark.parametrize("text", ["", "=x", "a b=c", "-a=b", "a-=b", "ä=b", f"{'n' * 64}=b", "a=\n", f"a={'v' * 1025}"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="label"):
        parse_label(text)
