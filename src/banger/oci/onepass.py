"""Merges layers in one pass over each, the highest first, where that gives the same tree as unpacking them in order.

Seen from above, what a layer adds is in the tree unless a layer over it has hidden or replaced it. That holds for
layers as build tools write them: each directory before what lies in it, each path once, hard links to files of their
own layer. For all else, which only the layers below can explain, OutOfOrder is raised, and `layers.Tree` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NoReturn

from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.squashfs import Files
from banger.disk.tar import Member
from banger.oci import layers
from banger.oci.layers import OPAQUE, RESERVED, WHITEOUT, OpenLayer


class OutOfOrder(Exception):
    """The layers do something that cannot be told from above."""


class _Kind(IntEnum):
    IMPLIED = 0  # a directory of the lowest layer that so far has only been part of names
    DIRECTORY = 1
    OTHER = 2
    GONE = 3  # a whiteout


class _Node:
    """What the layers above have at a path: `layer` put it there, and those below `closed` add nothing to it."""

    __slots__ = ("children", "closed", "kind", "layer", "link")

    def __init__(self, kind: _Kind, layer: int) -> None:
        self.kind = kind
        self.layer = layer
        self.closed = 0
        self.link = b""  # the path that a hard link leads to
        self.children: dict[bytes, _Node] = {}


def merged(openers: Sequence[OpenLayer], label: str) -> Files:
    """The files of the tree that layers (the lowest first) make; raises OutOfOrder, possibly after many of them."""
    view = _View()
    count = 0
    for number in range(len(openers), 0, -1):
        view.begin(number)
        with openers[number - 1]() as reader:
            for member in reader:
                count += 1
                if count > layers.MEMBERS_MAX:
                    raise BangerError(Code.EXHAUSTED, f"{label} has more than {layers.MEMBERS_MAX:,} files")
                if view.adds(member):
                    yield member, reader.data()


class _View:
    """The tree as it is seen from above, down to the layer that is being read."""

    def __init__(self) -> None:
        self._root = _Node(_Kind.IMPLIED, 0)
        self._layer = 0
        self._described: set[bytes] = set()  # the directories that the layer has had
        # most members lie in the same directory as the one before them
        self._last_path: bytes | None = None
        self._last: _Node | None = None

    def begin(self, layer: int) -> None:
        """Go down to the next layer."""
        self._layer = layer
        self._described = {b""}
        self._last_path = None

    def adds(self, member: Member) -> bool:
        """Whether the layer's next member is in the tree; a hard link may get another path to lead to."""
        parent, _, name = member.path.rpartition(b"/")
        self._require_described(parent)
        if name.startswith(WHITEOUT):
            self._white_out(parent, name)
            return False
        if member.kind == tar.DIRECTORY:
            self._described.add(member.path)
        else:
            self._described.discard(member.path)
        if not member.path:
            if member.kind != tar.DIRECTORY:
                _give_up()
            return self._add_directory(self._root)
        directory = self._enter(parent)
        if directory is None:
            return False
        node = directory.children.get(name)
        if node is None:
            kind = _Kind.DIRECTORY if member.kind == tar.DIRECTORY else _Kind.OTHER
            node = directory.children[name] = _Node(kind, self._layer)
            added = True
        elif member.kind == tar.DIRECTORY:
            added = self._add_directory(node)
        else:
            added = self._add_other(node)
        if added and member.kind == tar.HARD_LINK:
            node.link = member.link = self._target(member.link, node)
        return added

    def _add_directory(self, node: _Node) -> bool:
        if node.kind is _Kind.IMPLIED:
            node.kind, node.layer = _Kind.DIRECTORY, self._layer
            return True
        if node.layer != self._layer:
            return False
        if node.kind is not _Kind.GONE:
            _give_up()
        node.kind, node.closed = _Kind.DIRECTORY, self._layer
        return True

    def _add_other(self, node: _Node) -> bool:
        if node.kind is _Kind.IMPLIED:
            _give_up()
        if node.layer != self._layer:
            if node.kind is _Kind.DIRECTORY:  # made anew above: nothing from further down is in it
                node.closed = max(node.closed, self._layer)
            return False
        if node.kind is not _Kind.GONE:
            _give_up()
        node.kind = _Kind.OTHER
        return True

    def _target(self, path: bytes, link: _Node) -> bytes:
        """The path that a hard link is made to: that of a file of its own layer, which has been passed on."""
        parent, _, name = path.rpartition(b"/")
        self._require_described(parent)
        node: _Node | None = self._root
        for part in parent.split(b"/") if parent else ():
            node = node.children.get(part) if node else None
        target = node.children.get(name) if node else None
        if target is None or target is link or target.kind is not _Kind.OTHER or target.layer != self._layer:
            _give_up()
        return target.link or path

    def _white_out(self, parent: bytes, name: bytes) -> None:
        if name.startswith(RESERVED) and name != OPAQUE:
            return
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            _give_up()
        directory = self._enter(parent)
        if directory is None:
            return
        if name == OPAQUE:
            directory.closed = max(directory.closed, self._layer)
            return
        node = directory.children.get(hidden)
        if node is None:
            directory.children[hidden] = _Node(_Kind.GONE, self._layer)
            return
        if node.kind is _Kind.IMPLIED:
            _give_up()
        if node.kind is _Kind.DIRECTORY:
            node.closed = max(node.closed, self._layer)

    def _require_described(self, path: bytes) -> None:
        """A directory that the layer does not describe may be a symbolic link to another one in a layer below."""
        if self._layer > 1 and path not in self._described:
            _give_up()

    def _enter(self, path: bytes) -> _Node | None:
        """The directory that a member of the layer lies in, None when that is hidden."""
        if path != self._last_path:
            self._last_path, self._last = path, self._walk(path)
        return self._last

    def _walk(self, path: bytes) -> _Node | None:
        node = self._root
        for part in path.split(b"/") if path else ():
            if node.closed > self._layer:
                return None
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = _Node(_Kind.IMPLIED, self._layer)
            elif child.kind >= _Kind.OTHER:
                if child.layer == self._layer:
                    _give_up()
                return None
            node = child
        return None if node.closed > self._layer else node


def _give_up() -> NoReturn:
    raise OutOfOrder
