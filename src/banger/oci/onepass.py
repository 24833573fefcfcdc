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
    GONE = 2  # a whiteout


class _Node:
    """What the layers above have at a path: `layer` put it there, and those below `closed` add nothing to it.

    `children` are such nodes, or the layers that put something there that is no directory.
    """

    __slots__ = ("children", "closed", "kind", "layer")

    def __init__(self, kind: _Kind, layer: int) -> None:
        self.kind = kind
        self.layer = layer
        self.closed = 0
        self.children: dict[bytes, _Node | int] = {}


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
        # of the layer itself, whatever is hidden of it from above:
        self._directories: set[bytes] = {b""}  # those that it has had, and in the lowest layer also those it implies
        self._others: set[bytes] = set()  # what is no directory, and hidden
        self._links: dict[bytes, bytes] = {}  # hard links, and where they lead
        # most members lie in the same directory as the one before them
        self._last_path: bytes | None = None
        self._last: _Node | None = None

    def begin(self, layer: int) -> None:
        """Go down to the next layer."""
        self._layer = layer
        self._directories = {b""}
        self._others = set()
        self._links = {}
        self._last_path = None

    def adds(self, member: Member) -> bool:
        """Whether the layer's next member is in the tree; a hard link may get another path to lead to."""
        path = member.path
        parent, _, name = path.rpartition(b"/")
        directory = self._enter(parent)
        if name.startswith(WHITEOUT):
            self._white_out(directory, name)
            return False
        if member.kind == tar.DIRECTORY:
            added = self._add_directory(self._root if not path else directory, name)
            if path in self._others:
                _give_up()
            self._directories.add(path)
            return added
        if path in self._directories:
            _give_up()
        target = self._target(member.link, path) if member.kind == tar.HARD_LINK else b""
        if not self._add_other(directory, name):
            self._others.add(path)
            return False
        if target:
            if target in self._others:
                _give_up()
            self._links[path] = member.link = target
        return True

    def _add_directory(self, directory: _Node | None, name: bytes) -> bool:
        if directory is None:
            return False
        node = directory.children.get(name) if name else directory
        if node is None:
            directory.children[name] = _Node(_Kind.DIRECTORY, self._layer)
            return True
        if isinstance(node, int):
            if node == self._layer:
                _give_up()
            return False
        if node.kind is _Kind.IMPLIED:
            node.kind, node.layer = _Kind.DIRECTORY, self._layer
            return True
        if node.layer != self._layer:
            return False
        if node.kind is not _Kind.GONE:
            _give_up()
        node.kind, node.closed = _Kind.DIRECTORY, self._layer
        return True

    def _add_other(self, directory: _Node | None, name: bytes) -> bool:
        if directory is None:
            return False
        node = directory.children.get(name)
        if isinstance(node, _Node):
            if node.kind is _Kind.IMPLIED:
                _give_up()
            if node.layer != self._layer:
                if node.kind is _Kind.DIRECTORY:  # made anew above: nothing from further down is in it
                    node.closed = max(node.closed, self._layer)
                return False
            if node.kind is not _Kind.GONE:
                _give_up()
        elif node is not None:
            if node == self._layer:
                _give_up()
            return False
        directory.children[name] = self._layer
        return True

    def _target(self, path: bytes, link: bytes) -> bytes:
        """The path that a hard link is made to: that of a file of its own layer, hidden or passed on before."""
        if path == link:
            _give_up()
        node: _Node | int | None = self._root
        for part in path.split(b"/"):
            node = node.children.get(part) if isinstance(node, _Node) else None
        if path.rpartition(b"/")[0] not in self._directories or (node != self._layer and path not in self._others):
            _give_up()
        return self._links.get(path, path)

    def _white_out(self, directory: _Node | None, name: bytes) -> None:
        if name.startswith(RESERVED) and name != OPAQUE:
            return
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            _give_up()
        if directory is None:
            return
        if name == OPAQUE:
            directory.closed = max(directory.closed, self._layer)
            return
        node = directory.children.get(hidden)
        if node is None:
            directory.children[hidden] = _Node(_Kind.GONE, self._layer)
        elif isinstance(node, _Node):
            if node.kind is _Kind.IMPLIED:
                _give_up()
            if node.kind is _Kind.DIRECTORY:
                node.closed = max(node.closed, self._layer)

    def _enter(self, path: bytes) -> _Node | None:
        """The directory that a member of the layer lies in, None when that is hidden."""
        if path != self._last_path:
            self._last_path, self._last = path, self._walk(path)
        return self._last

    def _walk(self, path: bytes) -> _Node | None:
        if path.startswith(RESERVED) or b"/" + RESERVED in path:
            _give_up()
        self._require_directory(path)
        node = self._root
        for part in path.split(b"/") if path else ():
            if node.closed > self._layer:
                return None
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = _Node(_Kind.IMPLIED, self._layer)
            elif isinstance(child, int) or child.kind is _Kind.GONE:
                if (child if isinstance(child, int) else child.layer) == self._layer:
                    _give_up()
                return None
            node = child
        return None if node.closed > self._layer else node

    def _require_directory(self, path: bytes) -> None:
        """A directory that the layer does not have itself may be a symbolic link to another one in a layer below."""
        while path not in self._directories:
            if self._layer > 1 or path in self._others:
                _give_up()
            self._directories.add(path)
            path = path.rpartition(b"/")[0]
        # those above it were there when it was added, and what has become no directory since has made us give up


def _give_up() -> NoReturn:
    raise OutOfOrder
