"""`banger update`."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

import click

from banger import __version__, config, minisign, releases
from banger.api.errors import BangerError, Code
from banger.cli.connect import is_older, stop_idle_daemon, version_key
from banger.cli.errors import UsageFault
from banger.cli.lazy import Command
from banger.cli.options import json_option
from banger.cli.render import print_json
from banger.config import Config
from banger.hostpackages import find_command
from banger.installation import DISTRIBUTION, PACKAGE, Owner, owner
from banger.paths import Layout, user_layout
from banger.system import write_file_atomically

_TOOLS = {Owner.UV: ["uv", "tool", "install", "--quiet", "--force"], Owner.PIPX: ["pipx", "install", "--force"]}


@click.command(
    cls=Command,
    epilog="""
    banger update --check                     whether there is a newer one
    banger update                             to the newest
    banger update --to 0.1.0                  to that one, also back
    banger update --from ./releases           to the newest in a directory, at a URL, or to one file
    """,
)
@click.option("--check", is_flag=True, help="Only say whether there is a newer version.")
@click.option("--to", "wanted", metavar="VERSION", help="Version to change to, also an older one.")
@click.option(
    "--from",
    "place",
    metavar="DIR|URL|FILE",
    help="Where released wheels are, each with its signature FILE.minisig. [default: releases of config.toml]",
)
@json_option
def update(check: bool, wanted: str | None, place: str | None, as_json: bool) -> None:
    """Update banger, or go back to an older version.

    This asks what installed banger, uv or pipx, to replace it. Released files must be signed by the release_key of
    config.toml. Nothing is changed while the daemon is busy; machines go on. The wheel that is replaced is kept, where
    it was a file.
    """
    if as_json and not check:
        raise UsageFault("--json needs --check")
    if check and wanted:
        raise UsageFault("--check and --to cannot be used together")
    layout, by = user_layout(), owner()
    settings = config.load(layout.config_file)
    place = settings.releases if place is None else place
    found = releases.find(place) if place else {}
    if place and not found:
        raise BangerError(Code.NOT_FOUND, f"there is no release of banger for this machine in {place}")
    if check:
        command = "banger update" if place == settings.releases else f"banger update --from {shlex.quote(place)}"
        _tell(max(found, key=version_key) if found else _newest(by), by, f"run '{command}'", as_json)
        return
    if by not in _TOOLS:
        message = f"banger was installed by {by.value}, which has to update it"
        raise BangerError(Code.UNSUPPORTED, message, hint=_advice(by, wanted))
    version = wanted or max(found, key=version_key, default="")
    if version == __version__ or (version and not wanted and not is_older(__version__, version)):
        print(f"banger is {__version__} already")
        return
    target = _target(layout, settings, by, version, place, found)
    tool = _tool(by)
    stop_idle_daemon(layout)
    _keep_current(layout)
    _replace([*tool, target])
    _forget(layout, {__version__, version})


def _target(layout: Layout, settings: Config, by: Owner, version: str, place: str, found: Mapping[str, str]) -> str:
    """What the tool is to install: a release that was checked, a wheel that was kept, else what it finds by itself."""
    kept = releases.find(str(_kept(layout))) if _kept(layout).is_dir() else {}
    if version in found:
        content = releases.fetch(found[version], version, _key(settings, found[version], by))
        return str(_keep(layout, Path(found[version]).name, content))
    if version in kept:
        return kept[version]
    if found:
        there = ", ".join(sorted(found, key=version_key))
        raise BangerError(Code.NOT_FOUND, f"there is no banger {version} in {place}", hint=f"there are {there}")
    if version:
        return f"{DISTRIBUTION}=={version}"
    # uv keeps to a version that was asked for before unless it is told otherwise
    return f"{DISTRIBUTION}@latest" if by is Owner.UV else DISTRIBUTION


def _tell(newest: str, by: Owner, cure: str, as_json: bool) -> None:
    is_newer = is_older(__version__, newest)
    if as_json:
        print_json({"version": __version__, "newest": newest, "newer": is_newer, "installed_by": by.value})
    elif is_newer:
        print(f"banger is {__version__}, and {newest} is available: {cure if by in _TOOLS else _advice(by, newest)}")
    else:
        print(f"banger is {__version__}, and there is none that is newer")


def _advice(by: Owner, version: str | None) -> str:
    match by:
        case Owner.CLONE:
            return f"in {PACKAGE.parents[1]}, run: git pull && make run"
        case Owner.DEB:
            return f"run: apt-get install ./{DISTRIBUTION}_{version or 'VERSION'}_ARCH.deb"
        case _:
            wanted = f"{DISTRIBUTION}=={version}" if version else DISTRIBUTION
            return f"run: {sys.executable} -m pip install --upgrade {wanted}"


def _newest(by: Owner) -> str:
    """The newest version that the tool that installed banger would install."""
    match by:
        case Owner.CLONE | Owner.DEB:
            raise BangerError(
                Code.UNSUPPORTED,
                f"banger was installed by {by.value}, which tells nothing of newer versions",
                hint=_advice(by, None),
            )
        case Owner.UV:
            pip = [*_tool(by)[:1], "pip", "install", "--python", sys.executable]
        case Owner.PIPX:
            pip = [*_tool(by)[:1], "runpip", DISTRIBUTION, "install"]
        case Owner.PIP:
            pip = [sys.executable, "-m", "pip", "install"]
    command = [*pip, "--dry-run", "--upgrade", "--no-deps", DISTRIBUTION]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise BangerError(
            Code.DOWNLOAD,
            f"{by.value} finds no {DISTRIBUTION}: {''.join(last)}",
            hint="give the directory or URL of releases with --from, or as 'releases' in config.toml",
        )
    # as pip says it, and as uv does
    would = re.search(rf"(?:Would install {DISTRIBUTION}-|\+ {DISTRIBUTION}==)(\S+)", done.stdout + done.stderr)
    return would[1] if would else __version__


def _key(settings: Config, wheel: str, by: Owner) -> minisign.PublicKey:
    if not settings.release_key:
        raise BangerError(
            Code.INVALID,
            f"nothing says whose signature {wheel} must have: config.toml has no release_key",
            hint="there is no official key of banger's: set release_key to that of whoever made the release and whom "
            f"you trust, or install the file yourself: {' '.join(_TOOLS[by])} FILE",
        )
    return minisign.PublicKey.parse(settings.release_key)


def _tool(by: Owner) -> list[str]:
    program, *words = _TOOLS[by]
    found = find_command(program) or find_command(program, str(Path.home() / ".local/bin"))
    if found is None:
        raise BangerError(
            Code.MISSING_TOOL, f"{program}, which installed banger, was not found", f"put {program} on your PATH"
        )
    return [found, *words]


def _replace(command: list[str]) -> None:
    print(f"running {' '.join(command)}", flush=True)
    program = [f"{sys.prefix}/bin/banger", "version"]
    if subprocess.run(command).returncode != 0:
        raise BangerError(Code.DOWNLOAD, f"{Path(command[0]).name} failed, and has said why", "banger is as it was")
    if subprocess.run(program).returncode != 0:
        raise BangerError(
            Code.CORRUPT,
            "the banger that was installed does not run",
            f"go back: {' '.join(command[:-1])} {DISTRIBUTION}=={__version__}, or a wheel in {_kept(user_layout())}",
        )


def _kept(layout: Layout) -> Path:
    return layout.state / "releases"


def _keep(layout: Layout, name: str, content: bytes) -> Path:
    _kept(layout).mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file_atomically(_kept(layout) / name, content)
    return _kept(layout) / name


def _keep_current(layout: Layout) -> None:
    """Keep the wheel that the running version was installed from, where it was a file that is still there (PEP 610)."""
    said = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    url = urllib.parse.urlsplit(json.loads(said).get("url", "") if said else "")
    wheel = Path(urllib.parse.unquote(url.path))
    if url.scheme == "file" and wheel.is_file() and wheel.parent != _kept(layout):
        _keep(layout, wheel.name, wheel.read_bytes())


def _forget(layout: Layout, versions: set[str]) -> None:
    """Remove what is kept of other versions."""
    if _kept(layout).is_dir():
        for version, wheel in releases.find(str(_kept(layout))).items():
            if version not in versions:
                Path(wheel).unlink()
