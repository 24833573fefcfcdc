"""The name under which `banger.decompress` was known; it goes when nothing imports it any more."""

from banger.decompress import open_decompressed

__all__ = ["open_decompressed"]
