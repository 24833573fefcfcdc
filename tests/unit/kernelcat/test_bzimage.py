"""Kernel files are recognised and unpacked, and damaged ones refused."""

import gzip
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.kernelcat import bzimage
from banger.kernelcat.bzimage import embedded_config, read_kernel
from tests.unit.kernelcat import builders


@pytest.mark.parametrize("kind", builders.COMPRESSORS)
def test_bzimage_gives_its_elf_whatever_the_compression(kind: str) -> None:
    # more than one block of the legacy lz4 format
    image = builders.elf(extra=bytes(9 << 20) + b"the end")
    kernel = read_kernel(builders.bzimage(builders.COMPRESSORS[kind](image), len(image)), "vmlinuz")
    assert kernel.image == image
    assert (kernel.arch, kernel.bzimage, kernel.pvh, kernel.version) == ("amd64", True, True, builders.VERSION)


@pytest.mark.parametrize("kind", builders.COMPRESSORS)
def test_truncated_payload_is_refused(kind: str) -> None:
    image = builders.elf(extra=bytes(range(256)) * 64)
    payload = builders.COMPRESSORS[kind](image)
    with pytest.raises(BangerError) as caught:
        read_kernel(builders.bzimage(payload[:-8], len(image)), "vmlinuz")
    assert caught.value.code is Code.CORRUPT


def test_bzimage_cut_off_is_refused() -> None:
    image = builders.elf()
    data = builders.bzimage(gzip.compress(image), len(image))
    with pytest.raises(BangerError, match="ends early"):
        read_kernel(data[:-40], "vmlinuz")


def test_bare_elf_and_pvh_note() -> None:
    assert read_kernel(builders.elf(pvh=True), "vmlinux").pvh
    kernel = read_kernel(builders.elf(pvh=False), "vmlinux")
    assert not kernel.pvh
    assert not kernel.bzimage


@pytest.mark.parametrize("wrap", [bytes, gzip.compress, builders.zboot])
def test_arm64_images(wrap: Callable[[bytes], bytes]) -> None:
    image = builders.arm64_image()
    kernel = read_kernel(wrap(image), "Image")
    assert (kernel.image, kernel.arch, kernel.version) == (image, "arm64", builders.VERSION)


def test_other_machines_are_named() -> None:
    with pytest.raises(BangerError, match="machine type 183") as caught:
        read_kernel(builders.elf(machine=183), "vmlinux")
    assert caught.value.code is Code.UNSUPPORTED
    assert "Image" in caught.value.hint


def test_elf_that_is_no_kernel_is_refused() -> None:
    with pytest.raises(BangerError, match="no version"):
        read_kernel(builders.elf().replace(b"Linux version", b"Other version"), "vmlinux")


def test_unpacking_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bzimage, "UNPACKED_LIMIT", 1 << 20)
    for compress in builders.COMPRESSORS.values():
        with pytest.raises(BangerError, match="more than 1 MiB"):
            read_kernel(builders.bzimage(compress(bytes(5 << 20)), 5 << 20), "vmlinuz")


def test_embedded_config() -> None:
    config = b"CONFIG_OVERLAY_FS=y\n"
    image = builders.elf(extra=b"IKCFG_ST" + gzip.compress(config) + b"IKCFG_ED")
    assert embedded_config(image) == config.decode()
    assert embedded_config(builders.elf()) is None
    assert embedded_config(b"IKCFG_ST\x1f\x8b\x08 broken") is None


@given(st.data())
def test_damage_never_escapes_as_another_error(data: st.DataObject) -> None:
    image = builders.elf()
    whole = data.draw(
        st.sampled_from([image, builders.bzimage(builders.lz4_legacy(image), len(image)), builders.zboot(image)])
    )
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        kernel = read_kernel(bytes(damaged), "kernel")
    except BangerError:
        return
    assert kernel.version
