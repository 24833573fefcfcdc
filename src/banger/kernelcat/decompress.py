"""The name under which `banger.decompress` was known; it goes when nothing imports it any more."""

from banger.decompress import PieceReader, chunks, compression, decompress

__all__ = ["PieceReader", "chunks", "compression", "decompress"]
