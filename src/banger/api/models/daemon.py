"""Requests and responses of the operations on the daemon."""

from __future__ import annotations

from dataclasses import field

from banger.api.models.base import Model


class DaemonStatus(Model):
    """`uptime` in seconds; `resident_bytes` is the daemon's own memory; `warnings` is what it had to mend.

    `installation` is the directory of the package whose code runs, `executable` the Python that runs it; `activated`
    says that systemd holds the socket and starts the daemon.
    """

    pid: int
    socket: str
    version: str
    uptime: float
    resident_bytes: int
    state_directory: str
    log_file: str
    vms_running: int
    busy: int
    driver: str
    driver_reason: str
    warnings: list[str] = field(default_factory=list)
    installation: str = ""
    executable: str = ""
    activated: bool = False


class DaemonLogs(Model):
    """`tail` lines from the end (None: all), then what comes."""

    follow: bool = False
    tail: int | None = None


class Check(Model):
    """One line of `banger doctor`: `status` is ok, warn or fail; `package` is what a tool that is missing comes in."""

    name: str
    status: str
    message: str
    fix: str = ""
    package: str = ""


class Doctor(Model):
    """`install` is the command for all packages that are missing and needed, `install_more` for the others; or ''."""

    checks: list[Check]
    install: str = ""
    install_more: str = ""
