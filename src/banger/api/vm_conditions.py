"""When a guest is ready: `80`, `http://:8080/health`, `log:listening on`, `exec:pg_isready` or `health`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from banger.api.errors import BangerError, Code

PORT, URL, LOG, EXEC, HEALTH = "port", "url", "log", "exec", "health"
GRAMMAR = "PORT, http[s]://:PORT/PATH, log:TEXT, exec:COMMAND or health"
_URL = re.compile(r"(https?)://(?:localhost|127\.0\.0\.1)?(?::([0-9]{1,5}))?(/[!-~]*)?", re.ASCII)
_USUAL_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Condition:
    """`text` is the whole of what was asked for; `value` the path of a URL, the text of a log or a shell's command."""

    kind: str
    text: str
    port: int = 0
    value: str = ""

    @property
    def unmet(self) -> str:
        """Half a sentence on a guest that is not ready."""
        return {
            PORT: f"nothing listens on port {self.port}",
            URL: f"{self.text} does not answer with success",
            LOG: f"it has not printed {self.value!r}",
            EXEC: f"{self.value!r} does not succeed",
            HEALTH: "its health check does not succeed",
        }[self.kind]


def parse_condition(text: str) -> Condition:
    """What a text of the GRAMMAR stands for; raises BangerError(INVALID)."""
    kind, colon, value = text.partition(":")
    url = _URL.fullmatch(text)
    if text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65535:
        return Condition(PORT, text, int(text))
    if url is not None and 1 <= (port := int(url[2] or _USUAL_PORTS[url[1]])) <= 65535:
        return Condition(URL, text, port, url[3] or "/")
    if kind in (LOG, EXEC) and colon and value.strip() and "\0" not in value:
        return Condition(kind, text, value=value)
    if text == HEALTH:
        return Condition(HEALTH, text)
    raise BangerError(
        Code.INVALID,
        f"{text!r} is not a condition to wait for",
        hint=f"write {GRAMMAR}; a URL's host is the guest itself",
    )
