"""Request and response for what listens in a guest."""

from __future__ import annotations

from banger.api.models.base import Model
from banger.api.models.vms import PublishedPort


class VmPortsRequest(Model):
    """`probe`: connect to TCP ports, as a browser would, to see what they speak."""

    vm: str
    probe: bool = True


class GuestPort(Model):
    """A port that something in the guest listens on, or one that is published.

    `addresses` it listens on; none where a published port leads to nothing. `process` is '' and `pid` None where they
    are not known. `reachable`: it listens where published ports lead. `published` are the ports of the host that lead
    to it, `urls` where it is found there if it speaks HTTP. `speaks` is http, https, tls (but not HTTP in it), or ''
    for what is not known.
    """

    protocol: str
    port: int
    addresses: list[str]
    process: str
    pid: int | None
    reachable: bool
    published: list[PublishedPort]
    speaks: str
    urls: list[str]


class VmPorts(Model):
    """The ports of a guest in their order; `unprobed` TCP ports were too many to be asked what they speak."""

    name: str
    net: str
    ports: list[GuestPort]
    unprobed: int
