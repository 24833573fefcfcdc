"""Generated VM names: adjective-noun."""

from __future__ import annotations

import secrets
from collections.abc import Container

# fmt: off
_ADJECTIVES = (
    "agile", "amber", "ample", "balmy", "bold", "brave", "breezy", "bright", "brisk", "calm", "candid", "clever",
    "cosmic", "crisp", "dapper", "daring", "deft", "eager", "early", "fair", "fancy", "fleet", "fond", "frosty",
    "gentle", "glad", "golden", "grand", "happy", "hardy", "humble", "jolly", "keen", "kind", "lively", "loyal",
    "lucid", "lucky", "mellow", "merry", "mighty", "modest", "neat", "nimble", "noble", "patient", "plucky",
    "polite", "proud", "quick", "quiet", "rapid", "ready", "rosy", "rustic", "serene", "sharp", "silent",
    "smooth", "snug", "solid", "spry", "steady", "stout", "subtle", "sunny", "swift", "tidy", "tranquil",
    "trusty", "vivid", "warm", "wise", "witty",
)
_NOUNS = (
    "ant", "badger", "bat", "bear", "beaver", "bee", "bison", "bobcat", "buck", "camel", "cat", "crane", "crow",
    "deer", "dingo", "dove", "eagle", "eel", "elk", "ermine", "falcon", "ferret", "finch", "fox", "frog", "gecko",
    "goat", "goose", "hare", "hawk", "heron", "horse", "ibex", "ibis", "jackal", "jay", "kite", "koala", "lark",
    "lemur", "lion", "llama", "lynx", "magpie", "marmot", "marten", "mole", "moose", "newt", "ocelot", "orca",
    "oriole", "osprey", "otter", "owl", "panda", "parrot", "pika", "pony", "puffin", "puma", "quail", "rabbit",
    "raven", "robin", "salmon", "seal", "shrew", "skunk", "sloth", "sparrow", "stork", "swan", "tapir", "tern",
    "tiger", "toad", "trout", "turtle", "viper", "vole", "walrus", "weasel", "whale", "wolf", "wombat", "wren",
    "yak", "zebra",
)
# fmt: on


def generate(taken: Container[str]) -> str:
    """A free name; with a number behind it once the plain ones are scarce."""
    for attempt in range(1000):
        name = f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}"
        if attempt >= 20:
            name += f"-{secrets.randbelow(10_000)}"
        if name not in taken:
            return name
    raise RuntimeError("no free VM name found")
