"""bangerd: `python -m banger.daemon`, started by the first banger command or by systemd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys

from banger import config, stdio
from banger.api.codec import encode_error
from banger.api.errors import BangerError
from banger.daemon.daemon import claim, serve
from banger.daemon.http import outcome
from banger.daemon.log_file import CappedHandler, LogFormatter
from banger.paths import user_layout


def main() -> int:
    """Run the daemon.

    BANGER_READY_FD names a descriptor that is told `ok`, or the error in JSON, once that is known.
    """
    stdio.complete()
    _log_to(logging.StreamHandler())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # one line for every request tells nobody anything
    ready_fd = int(os.environ.pop("BANGER_READY_FD", "-1"))

    def tell(line: str) -> None:
        nonlocal ready_fd
        if ready_fd >= 0:
            with contextlib.suppress(BrokenPipeError):  # whoever started us has gone
                os.write(ready_fd, line.encode() + b"\n")
            os.close(ready_fd)
            ready_fd = -1

    async def run() -> None:
        layout = user_layout()
        layout.create()
        claim(layout)
        _log_to(CappedHandler(layout.log_file))
        await serve(layout, config.load(layout.config_file), lambda: tell("ok"))

    async def outcome_of_run() -> object:
        return await outcome(run())

    failure = asyncio.run(outcome_of_run())
    if isinstance(failure, BangerError):
        logging.getLogger(__name__).error("%s", failure)
        tell(json.dumps(encode_error(failure)))
    try:
        sys.stderr.flush()
    except OSError:  # a full disk: what is left of the log would be tried again at the end, which then fails
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return 1 if isinstance(failure, BangerError) else 0


def _log_to(handler: logging.Handler) -> None:
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=os.environ.get("BANGER_LOG_LEVEL", "info").upper(), handlers=[handler], force=True)


if __name__ == "__main__":
    sys.exit(main())
