"""Merges the layers of an image into one tree, as if each were unpacked over those below it, without unpacking any.

Rules: OCI Image Specification 1.1, "Image Layer Filesystem Changeset"; where it is silent, what umoci does, which the
tests compare with. Layers are read twice: once to see which of their members are in the tree in the end, and once to
pass just those on. `onepass` does it faster where that gives the same tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.squashfs import Files, with_paths
from banger.disk.tar import Member, TarReader, show
from banger.job import Job

MEMBERS_MAX = 1_000_000  # of all layers together; each file takes about 140 bytes of memory

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
RESERVED = b".wh..wh."  # of AUFS, whose own files are no part of a tree, though hard links may lead to them
_LINKS_MAX = 40  # on one way, as Linux has it (path_resolution(7))

OpenLayer = Callable[[], AbstractContextManager[TarReader]]


class _Directory:
    """A directory of the tree: `number` is that of its last member, -1 without one; `layer` last touched it.

    `emptied` is the last layer that removed from it what is older. `children` are directories, or the numbers of
    members that are none.
    """

    __slots__ = ("children", "emptied", "layer", "number")

    def __init__(self, layer: int, number: int = -1) -> None:
        self.layer = layer
        self.number = number
        self.emptied = -1
        self.children: dict[bytes, _Directory | int] = {}


class Tree:
    """The tree that layers make. Members are numbered through all of them, in the order in which they come."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._root = _Directory(0)
        self._layer = -1
        self._first = 0  # number of the layer's first member
        self._next = 0
        self._symlinks: dict[int, bytes] = {}
        self._links: dict[int, int] = {}  # hard links: their own number to that of the file
        self._linked: set[int] = set()  # files that have any
        self._moved: set[int] = set()  # members whose path led through a symbolic link
        # most members lie in the same directory as the one before them
        self._last_path: bytes | None = None
        self._last: tuple[_Directory, bool] = (self._root, False)

    def add_layer(self, members: Iterator[Member], job: Job) -> None:
        """Unpack the next layer over what is there.

        Raises CORRUPT for members that cannot be where they say, EXHAUSTED for too many, and what `members` raises.
        """
        self._layer += 1
        self._first = self._next
        self._last_path = None
        for member in members:
            number = self._next
            if number % 1000 == 0:
                job.check()
                if number >= MEMBERS_MAX:
                    raise BangerError(Code.EXHAUSTED, f"{self._label} has more than {MEMBERS_MAX:,} files")
            self._next += 1
            path = member.path
            parent, _, name = path.rpartition(b"/")
            if name.startswith(WHITEOUT):
                self._white_out(parent, name)
            elif member.kind == tar.DIRECTORY:
                self._add_directory(path, parent, name, number)
            elif not path:
                raise self._corrupt("has a root that is no directory")
            else:
                if member.kind == tar.HARD_LINK:
                    self._link(member, number)
                elif member.kind == tar.SYMLINK:
                    self._symlinks[number] = member.link
                directory, moved = self._enter(parent, path)
                if moved:
                    self._moved.add(number)
                self._replace(directory, name, number)

    def plan(self) -> Plan:
        """What becomes of each member."""
        plan = Plan(self._next)
        stack = [(self._root, b"")]
        while stack:
            directory, prefix = stack.pop()
            if directory.number >= 0:
                self._place(plan, directory.number, prefix[:-1])
            for name, node in directory.children.items():
                if name.startswith(RESERVED):
                    continue
                if isinstance(node, _Directory):
                    stack.append((node, prefix + name + b"/"))
                else:
                    self._place(plan, node, prefix + name)
        return plan

    def _place(self, plan: Plan, number: int, path: bytes) -> None:
        file = self._links.get(number, number)
        plan.kept[file] = 1
        if file in self._linked or file in self._moved:
            plan.paths.setdefault(file, []).append(path)

    def _add_directory(self, path: bytes, parent: bytes, name: bytes, number: int) -> None:
        if not path:
            self._root.number = number
            return
        directory, moved = self._enter(parent, path)
        if moved:
            self._moved.add(number)
        node = directory.children.get(name)
        if isinstance(node, _Directory):
            node.number, node.layer = number, self._layer
        else:
            self._replace(directory, name, _Directory(self._layer, number))

    def _replace(self, directory: _Directory, name: bytes, node: _Directory | int) -> None:
        old = directory.children.get(name)
        if old is not None and (isinstance(node, _Directory) or isinstance(old, _Directory) or old in self._symlinks):
            self._last_path = None
        directory.children[name] = node

    def _link(self, member: Member, number: int) -> None:
        """Resolve a hard link: it keeps the content that its target has now, whatever becomes of the target."""
        parent, _, name = member.link.rpartition(b"/")
        found = self._walk(parent, member.path, make=False)
        target = found[0].children.get(name) if found else None
        goes = (member.link + b"/").startswith(member.path + b"/")  # it makes room for the link first
        if target is None or isinstance(target, _Directory) or goes:
            raise self._corrupt(
                f"has a hard link {show(member.path)} to {show(member.link)}, which is no file before it"
            )
        file = self._links.get(target, target)
        self._links[number] = file
        self._linked.add(file)
        if file in self._symlinks:
            self._symlinks[number] = self._symlinks[file]

    def _white_out(self, parent: bytes, name: bytes) -> None:
        """Remove what layers below have there; what the same layer adds stays."""
        if name.startswith(RESERVED) and name != OPAQUE:
            return
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise self._corrupt(f"has a whiteout {show(name)}, which names nothing")
        found = self._walk(parent, parent + b"/" + name, make=False)
        if found is None:
            return
        directory = found[0]
        self._last_path = None
        if name == OPAQUE:
            self._remove_older(directory)
            return
        node = directory.children.get(hidden)
        if isinstance(node, _Directory):
            if not self._remove_older(node):
                del directory.children[hidden]
        elif node is not None and node < self._first:
            del directory.children[hidden]

    def _remove_older(self, directory: _Directory) -> bool:
        """Empty a directory of what layers below put there; whether it belongs to this layer itself."""
        if directory.layer != self._layer:  # nothing in it is of this layer
            directory.children.clear()
            return False
        stack = [directory]
        while stack:
            current = stack.pop()
            if current.emptied == self._layer:  # a layer may say it any number of times
                continue
            current.emptied = self._layer
            for name, node in list(current.children.items()):
                if isinstance(node, _Directory):
                    if node.layer == self._layer:
                        stack.append(node)
                    else:
                        del current.children[name]
                elif node < self._first:
                    del current.children[name]
        return True

    def _enter(self, path: bytes, child: bytes) -> tuple[_Directory, bool]:
        """The directory that a member's name lies in, made when missing; whether a symbolic link led there."""
        if path != self._last_path:
            found = self._walk(path, child, make=True)
            assert found is not None
            self._last_path, self._last = path, found
        return self._last

    def _walk(self, path: bytes, child: bytes, make: bool) -> tuple[_Directory, bool] | None:
        """Follow a path from the root, symbolic links inside the tree only, as chroot(2) would have it.

        None when something is missing that need not be made.
        """
        trail, links = [self._root], 0
        parts = path.split(b"/")[::-1] if path else []
        while parts:
            part = parts.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            siblings = trail[-1].children
            node = siblings.get(part)
            if node is None and make:
                node = siblings[part] = _Directory(self._layer)
            if isinstance(node, _Directory):
                trail.append(node)
                continue
            target = self._symlinks.get(node) if node is not None else None
            if target is None:
                if not make:
                    return None
                raise self._corrupt(f"has a member {show(child)}, but {show(part)} in it is no directory")
            links += 1
            if links > _LINKS_MAX:
                raise self._corrupt(f"has a member {show(child)} behind more than {_LINKS_MAX} symbolic links")
            if target.startswith(b"/"):
                del trail[1:]
            parts += target.split(b"/")[::-1]
        if make:
            for directory in trail:
                directory.layer = self._layer
        return trail[-1], links > 0

    def _corrupt(self, what: str) -> BangerError:
        return BangerError(Code.CORRUPT, f"layer {self._layer + 1} of {self._label} {what}")


class Plan:
    """What becomes of the members of all layers, by number: `kept` is 1 for those that are passed on.

    `paths` has all names of those that have other ones than their own.
    """

    def __init__(self, members: int) -> None:
        self.kept = bytearray(members)
        self.paths: dict[int, list[bytes]] = {}


def merged(layers: Sequence[OpenLayer], plan: Plan) -> Files:
    """The files of the tree: the kept members of the layers, the lowest layer first, under all their names."""
    kept, paths = plan.kept, plan.paths
    number = 0
    for open_layer in layers:
        with open_layer() as reader:
            for member in reader:
                if number < len(kept) and kept[number]:  # else the reader's check of the digest fails: it has changed
                    names = paths.get(number)
                    if names is None:
                        yield member, reader.data()
                    else:
                        yield from with_paths(member, reader.data(), names)
                number += 1
