"""Values of options and arguments: parsed and checked before any daemon is asked, and completed from live state."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from banger.api.errors import BangerError
from banger.cli.errors import UsageFault
from banger.paths import expand_home
from banger.system import validate_name, without_latest

_MOST_DIGITS = 9
_SHOWN = 60  # characters of a value in a message
# compiled where they are used: every command imports this module
_ARCHIVE = r".*\.(?:tar|gz|xz|zst|bz2|tgz|txz|qcow2|vmdk|vdi|vhdx|iso|img|raw|ext4|squashfs|deb|rpm)"


def resolve_env(entries: tuple[str, ...]) -> list[str]:
    """NAME=VALUE for each entry; a NAME alone takes its value from this process, and is left out when unset."""
    resolved = []
    for entry in entries:
        name, equals, _ = entry.partition("=")
        if not name or "\0" in entry:
            raise UsageFault(f"{entry!r} is not an environment variable", "use --env NAME=VALUE or --env NAME")
        if equals:
            resolved.append(entry)
        elif name in os.environ:
            resolved.append(f"{name}={os.environ[name]}")
    return resolved


class Whole(click.ParamType[int]):
    """A whole number of at least `least`."""

    name = "number"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if not re.fullmatch(r"-?[0-9]+", text):
            raise UsageFault(f"{_where(param)}: {shown(text)} is not a whole number", f"use {self._least} or more")
        digits = text.lstrip("0")
        if len(digits) > _MOST_DIGITS and not text.startswith("-"):
            raise UsageFault(f"{_where(param)}: {shown(text)} is too large", f"use at most {_MOST_DIGITS} digits")
        if len(digits) > _MOST_DIGITS or int(text) < self._least:
            raise UsageFault(f"{_where(param)}: at least {self._least} is needed, not {shown(text)}")
        return int(text)


class SizeType(click.ParamType[int]):
    """A size such as 512M or 1.5GiB."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from banger.sizes import EXAMPLES, parse_size

        try:
            return parse_size(str(value))
        except ValueError as error:
            raise UsageFault(f"{_where(param)}: {error}", EXAMPLES) from error


class PublishType(click.ParamType[str]):
    """A port to publish."""

    name = "[[addr:]host:]guest"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from banger.net.publish import parse_publish

        try:
            parse_publish(str(value))
        except BangerError as error:
            raise UsageFault(f"{_where(param)}: {error.message}", error.hint) from error
        return str(value)


class SignalType(click.ParamType[str]):
    """A signal by its name or number."""

    name = "signal"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from banger.signals import signal_number

        try:
            signal_number(str(value))
        except ValueError as error:
            raise UsageFault(f"{_where(param)}: {error}", "for example SIGQUIT, 3 or RTMIN+3") from error
        return str(value)


class DurationType(click.ParamType[float]):
    """A length of time such as 30m, or a word for none."""

    name = "time"

    def __init__(self, none: str = "") -> None:
        self._none = none

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from banger.durations import parse_duration

        if self._none and value == self._none:
            return 0.0
        try:
            return parse_duration(str(value))
        except ValueError as error:
            examples = ", ".join(filter(None, ("45s", "30m", "1h30m", self._none)))
            raise UsageFault(f"{_where(param)}: {error}", f"for example {examples}") from error


class LabelType(click.ParamType[tuple[str, str]]):
    """A label, NAME=VALUE."""

    name = "name=value"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        from banger.labels import parse_label

        try:
            return parse_label(str(value))
        except ValueError as error:
            raise UsageFault(f"{_where(param)}: {error}", "for example --label tier=web") from error


class ConditionType(click.ParamType[str]):
    """When a guest is ready, or one of the states of a VM that are given."""

    name = "what"

    def __init__(self, states: Sequence[str] = ()) -> None:
        self._states = states

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from banger.api.vm_conditions import GRAMMAR, parse_condition

        if value in self._states:
            return str(value)
        try:
            return parse_condition(str(value)).text
        except BangerError as error:
            states = f"wait for {', '.join(self._states)}, or: {GRAMMAR}" if self._states else ""
            raise UsageFault(f"{_where(param)}: {error.message}", states or error.hint) from error

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        words = (*self._states, "health", "http://:", "log:", "exec:")
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]


class FilterType(click.ParamType[str]):
    """A condition that picks VMs or their events, completed by its keys."""

    name = "key=value"

    def __init__(self, events: bool = False) -> None:
        self._events = events

    def _keys(self) -> tuple[str, ...]:
        from banger.api.vm_filters import EVENT_KEYS, VM_KEYS

        return EVENT_KEYS if self._events else VM_KEYS

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from banger.api.vm_filters import parse_filters

        try:
            parse_filters([str(value)], self._keys())
        except BangerError as error:
            raise UsageFault(f"{_where(param)}: {error.message}", error.hint) from error
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(f"{key}=") for key in self._keys() if key.startswith(incomplete)]


class RestartType(click.ParamType[str]):
    """A restart policy."""

    name = "no|on-failure[:n]|always"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, colon, limit = str(value).partition(":")
        good = re.fullmatch(r"0*[1-9][0-9]{0,8}", limit) is not None if colon else True
        if kind not in ("no", "on-failure", "always") or not good or (colon and kind != "on-failure"):
            raise UsageFault(
                f"{_where(param)}: {str(value)!r} is not a restart policy",
                "use no, on-failure, on-failure:5 or always, which holds until you stop it",
            )
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in ("no", "on-failure", "always") if name.startswith(incomplete)]


class NameType(click.ParamType[str]):
    """The name of a kernel, catalog, image or VM, completed from those that exist: `listed` when that is not all."""

    def __init__(self, noun: str, listed: str = "") -> None:
        self.name = noun
        self._listed = listed or noun

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if self.name == "image":
            text = without_latest(text)
        try:
            if "/" in text and self.name in ("image", "kernel"):
                self._refuse_file(text)
            return validate_name(text, self.name)
        except BangerError as error:
            tag = re.fullmatch(r"([A-Za-z0-9._-]+):([A-Za-z0-9._-]+)", text) if self.name == "image" else None
            here = f"it is called {tag[1]}-{tag[2]} here, if there is one: see 'banger image list'" if tag else ""
            raise UsageFault(error.message, here or error.hint) from error

    def _refuse_file(self, text: str) -> None:
        from banger.recognise import refuse_path

        with contextlib.suppress(OSError):  # what cannot be looked at is no name either
            if _absolute(text).exists():
                refuse_path(str(_absolute(text)), f"{'an' if self.name == 'image' else 'a'} {self.name}")

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from banger.cli.completion import complete_names

        return complete_names(self._listed, incomplete)


class FileName(click.ParamType[str]):
    """Something that may be the name of a file, and is completed as one."""

    name = "file"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class LocalPath(FileName):
    """An existing file or directory of this host, made absolute for the daemon."""

    name = "path"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        path = _given_path(value, param)
        try:
            path.lstat()  # any error but that it is not there is one of the path
        except FileNotFoundError as error:
            raise UsageFault(f"{_where(param)}: there is no {path}") from error
        except (OSError, ValueError) as error:
            from banger.reasons import in_words

            raise UsageFault(f"{_where(param)}: {shown(str(value))} cannot be read: {in_words(error)}") from error
        return str(path)


class KernelSource(LocalPath):
    """An existing file or directory, or `host` for the running kernel."""

    name = "path|host"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return "host" if value == "host" else super().convert(value, param, ctx)


class NewPath(FileName):
    """A file or directory to write, made absolute for the daemon; the directory that it is to lie in exists."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        path = _given_path(value, param)
        if not path.parent.is_dir():
            raise UsageFault(f"{_where(param)}: there is no directory {path.parent}")
        return str(path)


class NewFile(NewPath):
    """A file to write, made absolute for the daemon; its directory exists."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        path = super().convert(value, param, ctx)
        if Path(path).is_dir():
            raise UsageFault(f"{_where(param)}: {path} is a directory", "give the name of the file")
        return path


class Pullable(click.ParamType[str]):
    """What can be pulled: anything, completed from the catalogs or from what is there."""

    name = "name|ref|url"

    def __init__(self, noun: str, completed: str) -> None:
        self._noun = noun
        self._completed = completed

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            raise UsageFault(f"{_where(param)} is empty", f"see 'banger {self._noun} list --available'")
        # images in files, docs/oci-import.md: the daemon has no working directory
        text = str(value)
        transport, _, rest = text.partition(":")
        if transport in ("oci", "oci-archive", "docker-archive") and rest:
            path, other, name = rest.partition(":")
            return f"{transport}:{_absolute(path)}{other}{name}"
        if text.startswith(("./", "../", "~")) or text in (".", "..") or _is_archive(text):
            return str(_absolute(text))  # which is no image, but the daemon knows what it is
        return text

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from banger.cli.completion import complete_names

        return complete_names(self._completed, incomplete)


def _is_archive(text: str) -> bool:
    """Whether it is the name of a file in the working directory and that of hardly any image."""
    return re.fullmatch(_ARCHIVE, text) is not None and Path(text).is_file()


def _given_path(value: object, param: click.Parameter | None) -> Path:
    if not value:
        raise UsageFault(f"{_where(param)} is empty", "give the path of a file or a directory, or . for this one")
    return _absolute(str(value))


def _absolute(text: str) -> Path:
    return expand_home(text).absolute()


def shown(text: str) -> str:
    """A value of the user's as messages have it: quoted, and not longer than a line."""
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


def _where(param: click.Parameter | None) -> str:
    return (
        max(param.opts, key=len)
        if isinstance(param, click.Option)
        else (param.human_readable_name if param else "value")
    )


SIZE, PUBLISH, SIGNAL = SizeType(), PublishType(), SignalType()
DURATION, AUTO_STOP, LABEL, RESTART = DurationType(), DurationType("never"), LabelType(), RestartType()
CONDITION = ConditionType()
FILTER, EVENT_FILTER = FilterType(), FilterType(events=True)
LOCAL_PATH, NEW_FILE, NEW_PATH = LocalPath(), NewFile(), NewPath()
KERNEL_SOURCE = KernelSource()
PULLABLE_KERNEL, PULLABLE_IMAGE = Pullable("kernel", "pullable kernel"), Pullable("image", "pullable image")
USED_IMAGE = Pullable("image", "image")  # one that is there is taken, any other is pulled
ARCHITECTURES = ("amd64", "arm64")
KERNEL, IMAGE, VM = NameType("kernel"), NameType("image"), NameType("VM")
RUNNING = NameType("operation")

Decorated = Callable[..., object]
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
interactive_option = click.option(
    "-i", "--interactive", is_flag=True, expose_value=False, help="No effect: input always reaches the command."
)
filter_option = click.option(
    "--filter",
    "filters",
    type=FILTER,
    multiple=True,
    help="Only VMs that meet it, such as state=running, label=tier=web, image=debian*, name!=web. Can be given several "
    "times.",
)
label_option = click.option(
    "-l", "--label", "labels", type=LABEL, multiple=True, help="Label to find it by. Can be given several times."
)
auto_stop_option = click.option(
    "--auto-stop",
    type=AUTO_STOP,
    metavar="TIME|never",
    help="Stop it when untouched for so long: no command, copy or connection through banger.",
)
balloon_option = click.option(
    "--balloon/--no-balloon",
    default=None,
    help="Take memory from its guest that this leaves idle, and give it back when the guest needs it.",
)


def configured(builtin: str, key: str) -> str:
    """The end of the help of an option that `key` of config.toml decides when it is not given."""
    return f"  [default: {builtin}, or {key} of config.toml]"


def restart_option(more: str = "") -> Callable[[Decorated], Decorated]:
    """--restart, with the end of its help."""
    return click.option(
        "--restart",
        type=RESTART,
        help="Start it again when it fails (its VMM, its kernel, or CMD with another status than 0), or whenever "
        f"nobody has stopped it.{more}",
    )
