"""Debian packages for building guests: the host's own mirror, and downloads through a private apt, without root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from banger import hostpackages
from banger.api.errors import BangerError, Code
from banger.job import Job, command_failed

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_SCHEMES = ("http:", "https:", "file:", "copy:", "mirror:", "mirror+")
_PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")  # Debian Policy 5.6.1
_SUITE_NAME = re.compile(r"[a-z][a-z0-9-]*")
# the packages that a kernel's metapackage stands for; all else that it depends on is for installing it
_KERNEL_PART = re.compile(r"linux-(image|modules|binary|source)-.+")
_METAPACKAGES = 5  # that may stand for one another
# what apt says with gpgv and with sqv
_MISSING_KEY = re.compile(rb"\bNO_PUBKEY\b|\bMissing key\b")

# hooks of the host's configuration are not for us; options with a path go on the command line. Root's apt would drop to
# a user of its own, who cannot write into a private cache
_APT_CONF = """\
#clear APT::Update;
#clear DPkg;
#clear APT::Architectures;
Dir::State::status "/dev/null";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"""


@dataclass(frozen=True)
class Mirror:
    """Where Debian's archive is, and its security archive when known: addresses as in sources.list(5)."""

    main: str
    security: str | None = None


@dataclass(frozen=True)
class _Source:
    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str


def find_mirror(
    override: str = "",
    *,
    etc: Path = Path("/etc/apt"),
    lists: Path = Path("/var/lib/apt/lists"),
    host: Mapping[str, str] | None = None,
) -> Mirror:
    """The Debian mirror that this host's apt uses, or `override` (config.toml: debian_mirror) for the main archive.

    An entry is Debian's when it is signed with Debian's archive keys, or when its Release file says so. Where none is,
    as before the first "apt-get update", it is one that has the suite of the host, if that is Debian by its `host`
    (os-release(5)). Downloads are checked by Debian's keys in any case. Raises NOT_FOUND when there is none.
    """
    if override and (not override.startswith(_SCHEMES) or re.search(r"[\s\[\]]", override)):
        raise BangerError(
            Code.INVALID,
            f"debian_mirror is {override!r}, which is not an address of a package archive",
            hint="set it in config.toml as the address stands in apt's sources.list",
        )
    known = [source for source in _host_sources(etc) if source.uri.startswith(_SCHEMES)]
    sources = [source for source in known if _is_debian(source, lists)]
    if not any(not _is_security(source.suite) for source in sources):
        suites = _suites(hostpackages.read_os_release() if host is None else host)
        sources += [source for source in known if _may_be_debian(source, lists, suites)]
    security = next((source.uri for source in sources if _is_security(source.suite)), None)
    main = override or next((source.uri for source in sources if not _is_security(source.suite)), None)
    if main is None:
        raise BangerError(
            Code.NOT_FOUND,
            "this host's apt configuration names no Debian mirror",
            hint="set debian_mirror in config.toml to the address of one",
        )
    return Mirror(main, security)


def download(
    packages: Sequence[str],
    suite: str,
    arch: str,
    job: Job,
    *,
    into: Path,
    cache: Path,
    mirror: Mirror,
    keyring: Path = KEYRING,
) -> list[Path]:
    """Download packages of kernels or their source, signatures checked; a metapackage stands for what it depends on.

    `cache` keeps the package lists for the next time. Returns the .deb files, named <package>_<version>_<arch>.deb.
    Raises DOWNLOAD when the archive cannot be reached or verified, NOT_FOUND for an unknown package.
    """
    for name, pattern in ((suite, _SUITE_NAME), *((package, _PACKAGE_NAME) for package in packages)):
        if not pattern.fullmatch(name):
            raise BangerError(Code.INVALID, f"{name!r} is not a name in a Debian archive")
    if not keyring.is_file():
        raise BangerError(
            Code.MISSING_TOOL,
            f"Debian's archive keys {keyring} are not installed",
            hint="install the package debian-archive-keyring",
        )
    root = cache / "apt" / f"{suite}-{arch}"
    for directory in ("lists/partial", "archives/partial"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    with _locked(root, job):
        apt = _configure(root, suite, arch, mirror, keyring)
        _fetch(job, "package lists", ["apt-get", *apt, "update"], root, suite)
        names = _resolve(packages, apt, job)
        _fetch(job, "packages", ["apt-get", *apt, "download", *names], into, suite)
    return [_downloaded(into, name) for name in names]


def archive_failed(argv: Sequence[str | Path], status: int, said: bytes, complaints: bytes, suite: str) -> BangerError:
    """The error of a command that could not get packages of a suite; `complaints` is the part of `said` to show."""
    if _MISSING_KEY.search(said):
        return BangerError(
            Code.DOWNLOAD,
            f"the archive keys on this host do not have those that sign Debian's {suite}: they are older than it",
            hint="upgrade the package debian-archive-keyring",
        )
    error = command_failed(argv, status, complaints, Code.DOWNLOAD)
    error.hint = "check the network and the mirror, then try again; debian_mirror in config.toml names another mirror"
    return error


def candidate(package: str, suite: str, arch: str, cache: Path) -> str:
    """The kernel package that `download` would take for `package` by the lists at hand, as `name=version`.

    '' when there are no lists yet or they do not have it. Nothing is fetched.
    """
    root = cache / "apt" / f"{suite}-{arch}"
    if not _SUITE_NAME.fullmatch(suite) or not (root / "apt.conf").is_file():
        return ""
    for _ in range(_METAPACKAGES):
        if not _PACKAGE_NAME.fullmatch(package):
            return ""
        try:
            # 10 ms; "show" and "depends" read the lists themselves, 250 ms
            output = Job().run(["apt-cache", *_options(root, arch), "showpkg", package], env=_environment())
        except BangerError:  # another apt may be renewing the lists
            return ""
        text = output.decode(errors="replace")
        newest = re.search(r"(?m)^Versions: *\n(\S+) ", text)
        if newest is None:
            return ""
        version = newest[1]
        dependencies = re.search(rf"(?m)^{re.escape(version)} - (.*)", text)
        # "(5 VERSION)": apt's number for "="; metapackages say so, while conflicts are listed here too
        image = re.search(r"(linux-image-\S+) \(5 ", dependencies[1]) if dependencies else None
        if image is None:
            return f"{package}={version}"
        package = image[1]
    return ""


def _host_sources(etc: Path) -> Iterator[_Source]:
    parts = etc / "sources.list.d"
    for file in [etc / "sources.list", *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))]:
        with contextlib.suppress(OSError):
            text = file.read_text(errors="replace")
            yield from _deb822(text) if file.suffix == ".sources" else _one_line(text)


def _one_line(text: str) -> Iterator[_Source]:
    """sources.list(5), ONE-LINE-STYLE FORMAT."""
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)([^#]*)", line)
        if match:
            signed_by = re.search(r"signed-by=(\S+)", match[1] or "")
            yield _Source(match[2], match[3], tuple(match[4].split()), signed_by[1] if signed_by else "")


def _deb822(text: str) -> Iterator[_Source]:
    """sources.list(5), DEB822-STYLE FORMAT."""
    for stanza in re.split(r"\n\s*\n", re.sub(r"(?m)^#.*\n?", "", text)):
        pairs = re.findall(r"(?m)^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza)
        fields = {name.lower(): value for name, value in pairs}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        components = tuple(fields.get("components", "").split())
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield _Source(uri, suite, components, fields.get("signed-by", "").strip())


def _is_debian(source: _Source, lists: Path) -> bool:
    if "debian-archive" in source.signed_by:
        return True
    try:
        return re.search(r"(?m)^Origin: Debian$", _release(source, lists).read_text(errors="replace")) is not None
    except OSError:
        return False


def _may_be_debian(source: _Source, lists: Path, suites: set[str]) -> bool:
    """Whether nothing speaks against it: whoever else uses these suites names a key, or has other components."""
    if source.signed_by or "main" not in source.components or _release(source, lists).exists():
        return False
    return source.suite in suites


def _suites(host: Mapping[str, str]) -> set[str]:
    """Those of Debian that a Debian host may use; derivatives, Ubuntu too, have another ID."""
    if host.get("ID") != "debian":
        return set()
    names = {host.get("VERSION_CODENAME", ""), "oldstable", "stable", "testing", "unstable", "sid"} - {""}
    return {f"{name}{part}" for name in names for part in ("", "-updates", "-security", "/updates")}


def _release(source: _Source, lists: Path) -> Path:
    """Where apt keeps the signed Release file of a source."""
    stem = re.sub(r"^[\w+]+:/*", "", source.uri).strip("/").replace("/", "_")
    return lists / f"{stem}_dists_{source.suite.replace('/', '_')}_InRelease"


def _is_security(suite: str) -> bool:
    return suite.endswith(("-security", "/updates"))


def _configure(root: Path, suite: str, arch: str, mirror: Mirror, keyring: Path) -> list[str | Path]:
    """Write the private configuration; returns the options that make apt use it."""
    lines = [f"deb [signed-by={keyring}] {mirror.main} {suite} main"]
    if mirror.security and suite not in ("sid", "unstable", "experimental"):
        lines.append(f"deb [signed-by={keyring}] {mirror.security} {suite}-security main")
    (root / "sources.list").write_text("\n".join(lines) + "\n")
    (root / "apt.conf").write_text(_APT_CONF)
    return _options(root, arch)


def _options(root: Path, arch: str) -> list[str | Path]:
    """What makes apt use a private configuration."""
    return [
        "--config-file",
        root / "apt.conf",
        f"--option=Dir::State={root}",
        f"--option=Dir::Cache={root}",
        f"--option=Dir::Etc::sourcelist={root / 'sources.list'}",
        f"--option=APT::Architecture={arch}",
        f"--option=APT::Architectures::={arch}",
    ]


def _resolve(packages: Sequence[str], apt: Sequence[str | Path], job: Job) -> list[str]:
    """Follow metapackages to the packages with the files."""
    names: list[str] = []
    waiting = list(packages)
    while waiting:
        package = waiting.pop(0)
        try:
            output = job.run(
                ["apt-cache", *apt, "--important", "depends", package], env=_environment(), code=Code.NOT_FOUND
            )
        except BangerError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            message = f"the Debian archive has no package {package!r}: {error.message}"
            raise BangerError(Code.NOT_FOUND, message, hint="the catalog may be older than the archive") from error
        needed = re.findall(r"(?m)^ *\|?(?:Pre)?Depends: (\S+)", output.decode())
        parts = [name for name in needed if _KERNEL_PART.fullmatch(name)]
        waiting += [name for name in parts if name not in names and name not in waiting]
        is_metapackage = any(name.startswith(("linux-image-", "linux-source-")) for name in parts)
        if not is_metapackage and package not in names:
            names.append(package)
    return names


def _fetch(job: Job, stage: str, argv: Sequence[str | Path], cwd: Path, suite: str) -> None:
    """Run an apt command that downloads, reporting what it writes to its status descriptor."""
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(os.fdopen(reader, errors="replace"))
        errors = stack.enter_context(tempfile.TemporaryFile())
        command = [argv[0], f"--option=APT::Status-Fd={writer}", *argv[1:]]
        try:
            child = stack.enter_context(
                job.popen(command, stdout=errors, stderr=errors, env=_environment(), cwd=cwd, pass_fds=(writer,))
            )
        finally:
            os.close(writer)
        for line in status:
            match = re.match(r"dlstatus:\d+:(\d+)[.\d]*:(.*)", line)
            if match:
                job.progress(stage, match[2], int(match[1]), 100, "%")
        if child.wait() != 0:
            job.check()
            errors.seek(0)
            said = errors.read(1 << 20)
            complaints = b"\n".join(line for line in said.splitlines() if line.startswith(b"E:"))
            raise archive_failed(argv, child.returncode, said, complaints or said, suite)


def _environment() -> dict[str, str]:
    """The caller's, with messages that can be parsed, and with its proxies in the one spelling that apt reads."""
    proxies = {
        name.lower(): os.environ[name] for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY") if name in os.environ
    }
    return {**proxies, **os.environ, "LC_ALL": "C"}


def _downloaded(directory: Path, package: str) -> Path:
    matches = sorted(directory.glob(f"{package}_*.deb"))
    if not matches:
        raise BangerError(Code.DOWNLOAD, f"apt reported success, but there is no package {package!r}")
    return matches[-1]


@contextlib.contextmanager
def _locked(root: Path, job: Job) -> Iterator[None]:
    """Only one apt at a time may use a root; waits for another to finish."""
    with open(root / "lock-banger", "wb") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                job.progress("package lists", "waiting for another download")
                time.sleep(0.1)
        yield
