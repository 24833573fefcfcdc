"""What VMMs say in their own words, for people: a guest may have taken over the one that runs it."""

from __future__ import annotations

from banger.guest.agent import printable

_LIMIT = 400  # characters


def own_words(text: object) -> str:
    """A VMM's words on one line, cut when long, with nothing in them that a terminal might act on."""
    return printable(" ".join(str(text)[:_LIMIT].split()))
