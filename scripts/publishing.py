"""Publishes local kernels and images: exports one as a bundle, enters it in a catalog, signs that, and puts all where
others pull from.

What readers can see is whole at every moment: the bundle comes first, under a name that holds its digest, then the
catalog, then its signature. The catalog file of this host changes last. Needs banger, and minisign for signatures.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Generic, Protocol

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT / "src"))

from banger import system
from banger.api.errors import BangerError
from banger.catalogs.format import VERSION, E, Format

_READABLE = 0o644
_URL = "https://example.org/"  # stands for where a catalog will be, to resolve its relative addresses


class Put(Protocol):
    """Makes a file visible to readers under a name, whole or not at all."""

    def __call__(self, file: Path, name: str) -> None: ...


@dataclass(frozen=True)
class Noun(Generic[E]):
    """What is published: `options` of `banger <noun> export` that make a bundle, `told` of an entry when it is done."""

    format: Format[E]
    told: str
    options: tuple[str, ...] = ()


class PublishError(Exception):
    """What went wrong, for one line."""


def main(noun: Noun[E]) -> int:
    """Publish what the arguments of the script say; its exit status."""
    arguments = parse_arguments(noun.format.noun)
    try:
        entry = publish(noun, arguments)
    except (PublishError, BangerError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    else:
        print(f"published {entry['name']}: {entry[noun.told]} {entry['arch']} as {entry['tarball_url']}")
        return 0
    return 1


def parse_arguments(noun: str) -> argparse.Namespace:
    script = f"publish-{noun}"
    parser = argparse.ArgumentParser(
        description=f"Publish a local {noun} in a catalog of your own.",
        epilog=f"examples:\n  {script} NAME --to /srv/www/{noun}s --sign ~/.minisign/minisign.key\n"
        f"  {script} NAME --catalog catalog.json --command 'aws s3 cp {{file}} s3://bucket/{noun}s/{{name}}'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help=f"the {noun}, as 'banger {noun} list' shows it")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", type=Path, metavar="DIR", help="put the files into this directory")
    target.add_argument("--command", help="run this for each file; {file} is its path, {name} what it is to be called")
    parser.add_argument("--catalog", type=Path, metavar="FILE", help="the catalog to change (DIR/catalog.json)")
    parser.add_argument("--sign", type=Path, metavar="SECRET_KEY", help="sign the catalog with this key of minisign's")
    parser.add_argument("--url", default="", metavar="BASE", help="where the bundle will be (beside the catalog)")
    parser.add_argument("--description", help="what the catalog says of it (what it said before)")
    arguments = parser.parse_args()
    if arguments.catalog is None:
        if arguments.to is None:
            parser.error("--command needs --catalog FILE")
        arguments.catalog = arguments.to / "catalog.json"
    if arguments.command is not None and "{file}" not in arguments.command:
        parser.error("--command needs {file} where the path of the file belongs")
    if arguments.to is not None and not arguments.to.is_dir():
        parser.error(f"there is no directory {arguments.to}")
    return arguments


def publish(noun: Noun[E], arguments: argparse.Namespace) -> dict[str, object]:
    """Do all of it; returns the new entry of the catalog."""
    put = putter(arguments.command) if arguments.command else copier(arguments.to)
    file = arguments.catalog.absolute()
    if not arguments.sign and file.with_name(f"{file.name}.minisig").exists():
        raise PublishError(f"{file} is signed; name the secret key with --sign")
    with locked(file.parent), tempfile.TemporaryDirectory(prefix=".publish-", dir=arguments.to) as directory:
        bundle, entry = export(noun, arguments.name, Path(directory))
        name = f"{entry['name']}-{entry['arch']}-{str(entry['tarball_sha256'])[:16]}.tar.zst"
        entry["tarball_url"] = f"{arguments.url.rstrip('/')}/{name}" if arguments.url else name
        staged = Path(directory) / file.name
        staged.write_text(updated(noun.format, read(noun.format, file), entry, arguments.description, str(file)))
        signature = staged.with_name(f"{staged.name}.minisig")
        if arguments.sign:
            sign(staged, signature, arguments.sign)

        put(bundle, name)
        put(staged, staged.name)
        if arguments.sign:
            put(signature, signature.name)
        if arguments.to is None or not file.parent.samefile(arguments.to):
            for path in (staged, signature) if arguments.sign else (staged,):
                system.write_file_atomically(file.with_name(path.name), path.read_bytes(), _READABLE)
    return entry


def export(noun: Noun[E], name: str, directory: Path) -> tuple[Path, dict[str, object]]:
    """The bundle of a kernel or image and its catalog entry."""
    bundle = directory / "bundle.tar.zst"
    program = shutil.which("banger") or str(_ROOT / ".venv/bin/banger")
    what = noun.format.noun
    output = run([program, what, "export", name, "-o", str(bundle), "--json", *noun.options])
    document = f'{{"version": {VERSION}, "entries": [{output}]}}'
    noun.format.parse(document, f"what 'banger {what} export' printed", location=_URL)
    entry: dict[str, object] = json.loads(output)
    if bundle.stat().st_size != entry["size_bytes"]:
        raise PublishError(f"the bundle has {bundle.stat().st_size} bytes, its entry says {entry['size_bytes']}")
    bundle.chmod(_READABLE)
    return bundle, entry


def read(format: Format[E], file: Path) -> dict[str, object]:
    """The catalog as it is, or a new one."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return {"version": VERSION, "entries": []}
    format.parse(text, str(file), location=_URL)  # raises for what is none
    document: dict[str, object] = json.loads(text)
    return document


def updated(
    format: Format[E], document: dict[str, object], entry: dict[str, object], description: str | None, where: str
) -> str:
    """The text of a catalog with an entry added, or in place of the one with its name and architecture."""
    entries = document["entries"]
    assert isinstance(entries, list)  # parsing it has seen to it
    kept = []
    known_entries = format.parse(json.dumps(document), where, location=_URL).entries
    for item, known in zip(entries, known_entries, strict=True):
        if (known.name, known.arch) != (entry["name"], entry["arch"]):
            kept.append(item)
        elif description is None:
            description = known.description
    if description is not None:
        entry["description"] = description
    now = datetime.now(UTC).replace(microsecond=0)
    before = document.get("updated")
    if isinstance(before, str) and before:
        # readers refuse a signed catalog that changes without growing newer
        now = max(now, datetime.fromisoformat(before).replace(microsecond=0) + timedelta(seconds=1))
    changed = {
        **document,
        "updated": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "entries": sorted([*kept, entry], key=lambda item: (item["name"], item["arch"])),
    }
    text = json.dumps(changed, indent=2) + "\n"
    format.parse(text, f"the new {where}", location=_URL)
    return text


def sign(file: Path, signature: Path, secret_key: Path) -> None:
    """Sign a file; minisign asks for the password of the key, if it has one."""
    run(["minisign", "-S", "-s", str(secret_key), "-m", str(file), "-x", str(signature)])


def copier(directory: Path) -> Put:
    def put(file: Path, name: str) -> None:
        file.chmod(_READABLE)
        with tempfile.TemporaryDirectory(prefix=".publish-", dir=directory) as beside:
            copy = Path(beside) / name
            system.link_or_copy(file, copy)
            with open(copy, "rb") as stream:
                os.fsync(stream.fileno())
            copy.replace(directory / name)
        system.fsync_directory(directory)

    return put


def putter(command: str) -> Put:
    words = shlex.split(command)

    def put(file: Path, name: str) -> None:
        values = {"{file}": str(file), "{name}": name}
        run([re.sub(r"\{(file|name)\}", lambda match: values[match[0]], word) for word in words], sys.stderr.fileno())

    return put


def run(command: list[str], stdout: int = subprocess.PIPE) -> str:
    """Run a command whose messages the user sees; its standard output, unless that goes elsewhere."""
    try:
        ended = subprocess.run(command, stdout=stdout, text=True)
    except OSError as error:
        raise PublishError(f"{command[0]} cannot be run: {error.strerror}; install it first") from error
    if ended.returncode != 0:
        raise PublishError(f"{shlex.join(command)} failed with status {ended.returncode}")
    return ended.stdout or ""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One publisher at a time for the catalogs of a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
