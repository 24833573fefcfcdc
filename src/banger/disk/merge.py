"""Puts together, in a squashfs that tar2sqfs has written, what `parts.Parts` took apart: a program of its own.

The data, fragments, owners and xattrs in the file stay as they are; the tables of inodes and directories are written
anew, with directories of any size and all hard links. Format: "Squashfs Binary Format" (doc/format.adoc of
squashfs-tools-ng), Documentation/filesystems/squashfs.rst and fs/squashfs/squashfs_fs.h of Linux. Names of fields are
those of the latter.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from banger.disk import parts

_SUPER = struct.Struct("<5I6H8Q")  # struct squashfs_super_block
_MAGIC = 0x73717368
_LZ4, _ZSTD = 5, 6
_NO_TABLE = 2**64 - 1
_METADATA = 8192  # bytes of a block of metadata, unpacked
_STORED = 1 << 15  # in the length of a block of metadata: it is not compressed
_PER_BLOCK = {"fragment": _METADATA // 16, "id": _METADATA // 4, "xattr": _METADATA // 16}  # entries in a block
_DEVICE_BLOCK = 4096  # what the file's size is a multiple of

_COMMON = struct.Struct("<4H2I")  # what all inodes begin with: inode_type, mode, uid, guid, mtime, inode_number
_DIRECTORY = struct.Struct("<2I2HI")  # start_block, nlink, file_size, offset, parent_inode
_LONG_DIRECTORY = struct.Struct("<4I2HI")  # nlink, file_size, start_block, parent_inode, i_count, offset, xattr
_FILE = struct.Struct("<4I")  # start_block, fragment, offset, file_size
_LONG_FILE = struct.Struct("<3Q4I")  # start_block, file_size, sparse, nlink, fragment, offset, xattr
_INDEX = struct.Struct("<3I")  # of a directory: index, start_block, size
_HEADER = struct.Struct("<3I")  # of entries of a directory: count, start_block, inode_number
_ENTRY = struct.Struct("<HhHH")  # offset, inode_number, type, size
_NUMBER = struct.Struct("<I")

_DIR_TYPE, _FILE_TYPE, _SYMLINK_TYPE, _LONG = 1, 2, 3, 7  # an inode with all fields has a type 7 above the short one's
_NONE = 0xFFFFFFFF  # no fragment, no xattrs
_LISTING_EXTRA = 3  # by how much a directory's size is above that of its entries, for "." and ".."
_RUN_MAX = 256  # entries after one header
_DIFFERENCE_MAX = 32767  # of the number of an inode to the one in the header
_INDEX_MAX = 65535  # entries of an index, 16 bits

Decompress = Callable[[bytes], bytes]


class Damaged(Exception):
    """What is to be put together does not fit together."""


class _Table:
    """A table of metadata, unpacked."""

    def __init__(self, packed: bytes, decompress: Decompress) -> None:
        self._starts: dict[int, int] = {}  # of blocks: where they are packed, and unpacked
        data = bytearray()
        position = 0
        while position < len(packed):
            self._starts[position] = len(data)
            length = int.from_bytes(packed[position : position + 2], "little")
            end = position + 2 + length % _STORED
            block = packed[position + 2 : end]
            data += block if length & _STORED else decompress(block)
            position = end
        self.data = bytes(data)

    def locate(self, start: int, offset: int = 0) -> int:
        """Where in `data` that is what `offset` in the block that begins at `start` names."""
        return self._starts[start] + offset


class _TableWriter:
    """A table of metadata that is written."""

    def __init__(self, compress: Callable[[bytes], bytes] | None) -> None:
        self.packed = bytearray()
        self._open = bytearray()
        self._compress = compress

    def position(self) -> tuple[int, int]:
        """The start of the block and the offset in it of what is written next."""
        return len(self.packed), len(self._open)

    def write(self, data: bytes) -> None:
        """Append some bytes."""
        self._open += data
        while len(self._open) >= _METADATA:
            self._flush(bytes(self._open[:_METADATA]))
            del self._open[:_METADATA]

    def finish(self) -> bytes:
        """The whole table."""
        if self._open:
            self._flush(bytes(self._open))
        return bytes(self.packed)

    def _flush(self, block: bytes) -> None:
        packed = self._compress(block) if self._compress else block
        stored = len(packed) >= len(block)
        self.packed += (len(block) | _STORED if stored else len(packed)).to_bytes(2, "little")
        self.packed += block if stored else packed


class _Tree:
    """The tree of a squashfs: inodes are named by where they are in their table, unpacked."""

    def __init__(self, inodes: _Table, directories: _Table, block_size: int, root: int) -> None:
        self.inodes = inodes.data
        self.root = inodes.locate(root >> 16, root & 0xFFFF)
        self.added_links: dict[int, int] = {}  # to inodes, beside those that they have
        self._locate = inodes.locate
        self._directories = directories
        self._block_size = block_size
        self._changed: dict[int, dict[bytes, int]] = {}

    def put_together(self, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Do what `parts.Parts` has noted down."""
        for path, source in records:
            if source.startswith(parts.ROOT + b"/"):
                self._open(path).update(self.children(self._find(source)))
                continue
            target = self._find(source)
            if self.is_directory(target):
                raise Damaged(f"hard link to {source!r}, which is a directory")
            parent, _, name = path.rpartition(b"/")
            self._open(parent)[name] = target
            self.added_links[target] = self.added_links.get(target, 0) + 1
        self._open(b"").pop(parts.ROOT, None)

    def is_directory(self, inode: int) -> bool:
        """Whether an inode is a directory's."""
        return self.inodes[inode] in (_DIR_TYPE, _DIR_TYPE + _LONG)

    def directory(self, inode: int) -> tuple[int, int, int, int, int]:
        """Of a directory: start_block, offset, file_size, parent_inode, xattr."""
        if self.inodes[inode] == _DIR_TYPE:
            start, _, size, offset, parent = _DIRECTORY.unpack_from(self.inodes, inode + _COMMON.size)
            return start, offset, size, parent, _NONE
        _, size, start, parent, _, offset, xattr = _LONG_DIRECTORY.unpack_from(self.inodes, inode + _COMMON.size)
        return start, offset, size, parent, xattr

    def children(self, inode: int) -> dict[bytes, int]:
        """What is in a directory, by name."""
        if inode in self._changed:
            return self._changed[inode]
        start, offset, size, _, _ = self.directory(inode)
        found: dict[bytes, int] = {}
        if size <= _LISTING_EXTRA:
            return found
        data = self._directories.data
        position = self._directories.locate(start, offset)
        end = position + size - _LISTING_EXTRA
        while position < end:
            count, block, _ = _HEADER.unpack_from(data, position)
            base = self._locate(block)
            position += _HEADER.size
            for _ in range(count + 1):
                offset, _, _, length = _ENTRY.unpack_from(data, position)
                position += _ENTRY.size
                found[data[position : position + length + 1]] = base + offset
                position += length + 1
        return found

    def inode(self, inode: int, number: int) -> tuple[bytes, int]:
        """An inode that is no directory, with another number and all its links, and how many these are."""
        kind, mode, uid, gid, mtime, _ = _COMMON.unpack_from(self.inodes, inode)
        added = self.added_links.get(inode, 0)
        rest = inode + _COMMON.size
        if kind == _FILE_TYPE:
            start, fragment, offset, size = _FILE.unpack_from(self.inodes, rest)
            blocks_at = rest + _FILE.size
            blocks = self.inodes[blocks_at : blocks_at + self._blocks_size(size, fragment)]
            if not added:
                body, links = self.inodes[rest:blocks_at] + blocks, 1
            else:
                kind, links = kind + _LONG, 1 + added
                body = _LONG_FILE.pack(start, size, 0, links, fragment, offset, _NONE) + blocks
        elif kind == _FILE_TYPE + _LONG:
            start, size, sparse, links, fragment, offset, xattr = _LONG_FILE.unpack_from(self.inodes, rest)
            links += added
            blocks_at = rest + _LONG_FILE.size
            blocks = self.inodes[blocks_at : blocks_at + self._blocks_size(size, fragment)]
            body = _LONG_FILE.pack(start, size, sparse, links, fragment, offset, xattr) + blocks
        else:
            links = _NUMBER.unpack_from(self.inodes, rest)[0] + added
            short = kind - _LONG if kind > _LONG else kind
            length = 4  # nlink
            if short == _SYMLINK_TYPE:
                length += 4 + int(_NUMBER.unpack_from(self.inodes, rest + 4)[0])  # symlink_size, symlink
            elif short < 6:  # rdev of devices; fifos and sockets have none
                length += 4
            if kind > _LONG:
                length += 4  # xattr
            body = _NUMBER.pack(links) + self.inodes[rest + 4 : rest + length]
        return _COMMON.pack(kind, mode, uid, gid, mtime, number) + body, links

    def _blocks_size(self, size: int, fragment: int) -> int:
        """Bytes of the list of a file's blocks; without a fragment the last one may be a short one."""
        return (size if fragment != _NONE else size + self._block_size - 1) // self._block_size * 4

    def _find(self, path: bytes) -> int:
        inode = self.root
        for name in path.split(b"/") if path else ():
            if not self.is_directory(inode):
                raise Damaged(f"no directory on the way to {path!r}")
            if inode not in self._changed:
                self._changed[inode] = self.children(inode)
            found = self._changed[inode].get(name)
            if found is None:
                raise Damaged(f"no {path!r}")
            inode = found
        return inode

    def _open(self, path: bytes) -> dict[bytes, int]:
        """The children of a directory, to be changed."""
        inode = self._find(path)
        if not self.is_directory(inode):
            raise Damaged(f"{path!r} is no directory")
        if inode not in self._changed:
            self._changed[inode] = self.children(inode)
        return self._changed[inode]


class _Open:
    """A directory that is being written: first those in it, then the inodes of all that is in it, then its entries."""

    def __init__(self, tree: _Tree, inode: int, number: int, parent: int) -> None:
        self.inode = inode
        self.number = number
        self.parent = parent
        self.entries = sorted(tree.children(inode).items())
        self.directories = iter([child for _, child in self.entries if tree.is_directory(child)])
        self.written: dict[int, tuple[int, bytes]] = {}  # those in it: their numbers and inodes


class _Writer:
    """Writes a tree. The numbers of inodes follow the names, so that a run of entries needs one header."""

    def __init__(self, tree: _Tree, compress: Callable[[bytes], bytes] | None) -> None:
        self.inodes = _TableWriter(compress)
        self.directories = _TableWriter(compress)
        self.count = 0
        self._tree = tree
        self._linked: dict[int, tuple[int, int, int, int]] = {}  # files with several names that have been written

    def write(self) -> int:
        """Write it all; the reference to the root's inode."""
        tree = self._tree
        stack = [_Open(tree, tree.root, self._next(), tree.directory(tree.root)[3])]
        while True:
            current = stack[-1]
            child = next(current.directories, None)
            if child is not None:
                stack.append(_Open(tree, child, self._next(), current.number))
                continue
            inode = self._finish(current)
            stack.pop()
            if not stack:
                start, offset = self.inodes.position()
                self.inodes.write(inode)
                return start << 16 | offset
            stack[-1].written[current.inode] = current.number, inode

    def _next(self) -> int:
        self.count += 1
        return self.count

    def _finish(self, directory: _Open) -> bytes:
        """Write what is in a directory; its own inode."""
        entries = [(name, *self._place(child, directory)) for name, child in directory.entries]
        start, offset = self.directories.position()
        size, index = self._write_entries(entries)
        size += _LISTING_EXTRA
        kind, mode, uid, gid, mtime, _ = _COMMON.unpack_from(self._tree.inodes, directory.inode)
        xattr = self._tree.directory(directory.inode)[4]
        links = len(entries) + 2  # as tar2sqfs counts them
        if index or xattr != _NONE or size > 0xFFFF:
            kind = _DIR_TYPE + _LONG
            body = _LONG_DIRECTORY.pack(links, size, start, directory.parent, len(index), offset, xattr)
            body += b"".join(index)
        else:
            kind = _DIR_TYPE
            body = _DIRECTORY.pack(start, links, size, offset, directory.parent)
        return _COMMON.pack(kind, mode, uid, gid, mtime, directory.number) + body

    def _place(self, child: int, directory: _Open) -> tuple[int, int, int, int]:
        """Write an inode if it has not been; its start_block, offset, number and type."""
        if child in self._linked:
            return self._linked[child]
        if child in directory.written:
            number, inode = directory.written[child]
            links = 1
        else:
            number = self._next()
            inode, links = self._tree.inode(child, number)
        start, offset = self.inodes.position()
        self.inodes.write(inode)
        placed = start, offset, number, inode[0] - _LONG if inode[0] > _LONG else inode[0]
        if links > 1:
            self._linked[child] = placed
        return placed

    def _write_entries(self, entries: list[tuple[bytes, int, int, int, int]]) -> tuple[int, list[bytes]]:
        """Write the entries of a directory; their bytes, and an index of where in them blocks of the table begin."""
        index: list[bytes] = []
        size = done = 0
        block = self.directories.position()[0]
        while done < len(entries):
            first, start, _, base, _ = entries[done]
            here = self.directories.position()[0]
            if here != block:
                block = here
                index.append(_INDEX.pack(size, here, len(first) - 1) + first)
            run: list[bytes] = []
            length = 0
            for name, at, offset, number, kind in entries[done : done + _RUN_MAX]:
                if at != start or abs(number - base) > _DIFFERENCE_MAX or length > _METADATA:
                    break
                run.append(_ENTRY.pack(offset, number - base, kind, len(name) - 1) + name)
                length += len(run[-1])
            self.directories.write(_HEADER.pack(len(run) - 1, start, base) + b"".join(run))
            size += _HEADER.size + length
            done += len(run)
        return size, index[:: -(-len(index) // _INDEX_MAX) or 1]


def merge(image: BinaryIO, records: Iterable[tuple[bytes, bytes]]) -> None:
    """Put together in the squashfs `image`, in place, what `records` (see `parts.read_records`) say.

    Raises Damaged for what does not fit together. The result follows from what is given alone, to the byte.
    """
    fields = list(_SUPER.unpack(image.read(_SUPER.size)))
    magic, _, _, block_size, fragments, compression, _, _, ids = fields[:9]
    root, used, id_table, xattr_table, inode_table, directory_table, fragment_table, export_table = fields[11:]
    if magic != _MAGIC or compression not in (_LZ4, _ZSTD) or export_table != _NO_TABLE:
        raise Damaged("not a squashfs as tar2sqfs writes it")
    pointers = _Pointers(image, used)
    if fragments and fragment_table != _NO_TABLE:
        pointers.add(fragment_table, -(-fragments // _PER_BLOCK["fragment"]))
    pointers.add(id_table, -(-ids // _PER_BLOCK["id"]))
    if xattr_table != _NO_TABLE:
        pointers.add(xattr_table, 1)  # xattr_table_start
        count = pointers.number(xattr_table + 8)
        pointers.add(xattr_table + 16, -(-count // _PER_BLOCK["xattr"]))
    tables = [table for table in (fragment_table, id_table, xattr_table) if table != _NO_TABLE]
    rest_begins = min([*tables, *pointers.values()])
    decompress, compress = _codec(compression)
    tree = _Tree(
        _Table(pointers.read(inode_table, directory_table), decompress),
        _Table(pointers.read(directory_table, rest_begins), decompress),
        block_size,
        root,
    )
    tree.put_together(records)
    writer = _Writer(tree, compress)
    fields[11] = writer.write()
    inodes, directories = writer.inodes.finish(), writer.directories.finish()
    moved = inode_table + len(inodes) + len(directories) - rest_begins
    rest = pointers.moved(rest_begins, moved)
    fields[1] = writer.count
    fields[12] = used + moved
    for field in (13, 14, 17):
        if fields[field] != _NO_TABLE:
            fields[field] += moved
    fields[16] = inode_table + len(inodes)
    image.seek(inode_table)
    image.write(inodes + directories + rest)
    image.write(bytes(-(used + moved) % _DEVICE_BLOCK))
    image.truncate()
    image.seek(0)
    image.write(_SUPER.pack(*fields))


class _Pointers:
    """The numbers in the tables of a squashfs that say where in the file something is."""

    def __init__(self, image: BinaryIO, used: int) -> None:
        self._image = image
        self._used = used
        self._at: list[int] = []

    def add(self, position: int, count: int) -> None:
        """There are `count` of them at a place."""
        self._at += range(position, position + 8 * count, 8)

    def number(self, position: int) -> int:
        """A number of 32 bits."""
        return int.from_bytes(self.read(position, position + 4), "little")

    def values(self) -> Iterator[int]:
        """What they say."""
        return (int.from_bytes(self.read(at, at + 8), "little") for at in self._at)

    def read(self, begin: int, end: int) -> bytes:
        """The file from `begin` to `end`; raises Damaged when it is shorter."""
        self._image.seek(begin)
        data = self._image.read(end - begin)
        if len(data) != end - begin:
            raise Damaged("the squashfs is cut off")
        return data

    def moved(self, begin: int, distance: int) -> bytes:
        """The file from `begin` to its end with all these numbers changed by `distance`."""
        data = bytearray(self.read(begin, self._used))
        for at in self._at:
            place = slice(at - begin, at - begin + 8)
            data[place] = (int.from_bytes(data[place], "little") + distance).to_bytes(8, "little")
        return bytes(data)


def _codec(compression: int) -> tuple[Decompress, Callable[[bytes], bytes] | None]:
    if compression == _ZSTD:
        decompressor = zstandard.ZstdDecompressor()
        compressor = zstandard.ZstdCompressor(level=1)
        return lambda block: decompressor.decompress(block, max_output_size=_METADATA), compressor.compress
    # what tar2sqfs itself packs with; what is written is not compressed, since tar2sqfs 1.2 itself makes blocks longer
    # than their data that way, which unsquashfs refuses
    library = ctypes.CDLL("liblz4.so.1")
    buffer = ctypes.create_string_buffer(_METADATA)

    def decompress(block: bytes) -> bytes:
        length = library.LZ4_decompress_safe(block, buffer, len(block), _METADATA)
        if length < 0:
            raise Damaged("a block of metadata cannot be decompressed")
        return buffer.raw[:length]

    return decompress, None


def main() -> None:
    """`merge IMAGE`, with the records on standard input."""
    try:
        with open(Path(sys.argv[1]), "r+b") as image:
            merge(image, parts.read_records(sys.stdin.buffer))
    except (Damaged, OSError, KeyError, struct.error, zstandard.ZstdError) as error:
        sys.exit(f"the squashfs cannot be put together: {error}")


if __name__ == "__main__":
    main()
