"""Takes large directories apart for tar2sqfs, which looks at all that is in a directory whenever something is added.

So a directory of 80,000 files takes it half a minute, and minutes if they are in no order. What is beyond a number of
files goes into parts of the directory that lie elsewhere, until `merge` puts them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import BinaryIO

from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.tar import Member

# the directory of all parts; \x01 comes first in the packer's sorted list, so that the way to it is short
ROOT = b"\x01banger: parts of directories"
SMALL = 250  # files of a directory that never need a part, and of a part
# How many files of the same directory the packer may look at in all when it adds others: about 0.1 s, and a little for
# each file. Hardly any image needs parts then; they cost the start of `merge`, and 10 us for each file.
LOOKS = 10_000_000
LOOKS_EACH = 100
# tar2sqfs renumbers all files between a hard link and the file it leads to: 40,000 of them take it 0.4 s, 80,000 four
# times as long
LINKS_MAX = 20_000
_PARTS_OF_ROOT, _PARTS_EACH = 9999, 256


class Parts:
    """Says where the packer gets each file, and notes down what `merge` has to do.

    `records` gets that; while `used` is False there is nothing. Directories take about 100 bytes of memory each: their
    paths, which can be 4 KB long, are known by their hashes, which SipHash keeps apart (PEP 456).
    """

    def __init__(self, records: BinaryIO) -> None:
        self.used = False
        self._records = records
        self._children = {hash(b""): 0}  # how many are in each directory, by the hash of its path
        self._newest: dict[bytes, tuple[int, int]] = {}  # a directory's newest part, and how many more it takes
        self._moved: dict[bytes, bytes] = {}  # where directories are that lie in a part
        self._parts = 0
        self._looks = LOOKS
        self._links = 0

    def placed(self, member: Member) -> Member:
        """A member as the packer gets it; raises CORRUPT for a name that is used for parts."""
        path = member.path
        if member.kind == tar.DIRECTORY:
            place = self._enter(path)
        else:
            place = self._add(path)
            if member.kind == tar.HARD_LINK:
                self._links += 1
                if self.used or self._links > LINKS_MAX:
                    self._note(path, member.link)
                    return Member(place, tar.REGULAR, 0, 0, 0, 0)  # it keeps the link's place
        return member if place == path else dataclasses.replace(member, path=place)

    def _add(self, path: bytes) -> bytes:
        """The place of what is new in its directory."""
        parent, _, name = path.rpartition(b"/")
        if path == ROOT:
            raise BangerError(
                Code.CORRUPT, f"the archive has a member {tar.show(path)}, a name that banger uses itself"
            )
        there = self._enter(parent)
        count = self._children[hash(parent)]
        self._children[hash(parent)] = count + 1
        self._looks -= count - LOOKS_EACH
        if self._looks < 0 and count >= SMALL:
            there = self._part(parent)
        return there + b"/" + name if there else name

    def _part(self, directory: bytes) -> bytes:
        """The part that gets the next file of a directory."""
        number, left = self._newest.get(directory, (0, 0))
        if not left:
            number, left = self._parts, SMALL
            self._parts += 1
            self._note(directory, _place_of(number))
        self._newest[directory] = number, left - 1
        return _place_of(number)

    def _enter(self, directory: bytes) -> bytes:
        """The place of a directory, whether it has been seen or not."""
        unknown: list[bytes] = []
        above = directory
        while hash(above) not in self._children:
            unknown.append(above)
            above = above.rpartition(b"/")[0]
        for path in reversed(unknown):
            place = self._add(path)
            self._children[hash(path)] = 0
            if place != path:
                self._moved[path] = place
        return self._moved.get(directory, directory)

    def _note(self, path: bytes, source: bytes) -> None:
        self.used = True
        self._records.write(b"%b\0%b\0" % (path, source))


def _place_of(part: int) -> bytes:
    """The directory of a part; the last one comes first in the packer's lists."""
    group, number = divmod(part, _PARTS_EACH)
    return b"%b/%04d/%03d" % (ROOT, _PARTS_OF_ROOT - group, _PARTS_EACH - 1 - number)


def read_records(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """What `Parts` noted down, in order: a directory and a part of it, or a hard link and the file that it leads to."""
    words = stream.read().split(b"\0")
    return zip(words[0:-1:2], words[1:-1:2], strict=True)
