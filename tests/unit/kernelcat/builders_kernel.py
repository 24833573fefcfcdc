"""Kernel files that are rarer than those of `builders`: EFI programs, old and foreign kernels."""

import struct

# real banners, as they were posted in bug reports and logs, and the distributions that built these kernels
BANNERS = {
    "Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0, "
    "GNU ld (GNU Binutils for Debian) 2.40) # SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-16)": "debian",
    "Linux version 4.19.0-9-amd64 (debian-kernel@lists.debian.org) (gcc version 8.3.0 (Debian 8.3.0-6)) "
    "#1 SMP Debian 4.19.118-2+deb10u1 (2020-06-07)": "debian",
    "Linux version 6.8.0-50-generic (buildd@lcy02-amd64-020) (x86_64-linux-gnu-gcc-13 (Ubuntu 13.3.0-6ubuntu2~24.04) "
    "13.3.0, GNU ld (GNU Binutils for Ubuntu) 2.42) #51-Ubuntu SMP PREEMPT_DYNAMIC Sat Nov 9 17:58:29 UTC 2024": (
        "ubuntu"
    ),
    "Linux version 5.18.5-200.fc36.x86_64 (mockbuild@bkernel01.iad2.fedoraproject.org) (gcc (GCC) 12.1.1 20220507 "
    "(Red Hat 12.1.1-1), GNU ld version 2.37-27.fc36) #1 SMP PREEMPT_DYNAMIC Thu Jun 16 14:51:11 UTC 2022": "fedora",
    "Linux version 5.14.0-427.47.1.el9_4.x86_64 (mockbuild@x86-64-01.build.eng.rdu2.redhat.com) (gcc (GCC) 11.4.1 "
    "20231218 (Red Hat 11.4.1-3), GNU ld version 2.35.2-43.el9) #1 SMP PREEMPT_DYNAMIC Mon Nov 25 2024": "rhel",
    "Linux version 5.14.0-505.el9.x86_64 (mockbuild@x86-05.stream.rdu2.redhat.com) (gcc (GCC) 11.5.0 20240719 "
    "(Red Hat 11.5.0-2), GNU ld version 2.35.2-54.el9) #1 SMP PREEMPT_DYNAMIC Thu Sep 5 07:54:07 UTC 2024": "centos",
    "Linux version 3.10.0-1160.71.1.el7.x86_64 (mockbuild@kbuilder.bsys.centos.org) (gcc version 4.8.5 20150623 "
    "(Red Hat 4.8.5-44) (GCC) ) #1 SMP Tue Jun 28 15:37:28 UTC 2022": "centos",
    "Linux version 5.14.0-570.26.1.el9_6.x86_64 (mockbuild@x64-builder03.almalinux.org) (gcc (GCC) 11.5.0 20240719 "
    "(Red Hat 11.5.0-5), GNU ld version 2.35.2-63.el9) #1 SMP PREEMPT_DYNAMIC Wed Jul 16 2025": "almalinux",
    "Linux version 5.14.0-427.18.1.el9_4.x86_64 (mockbuild@iad1-prod-build001.bld.equ.rockylinux.org) (gcc (GCC) "
    "11.4.1 20231218 (Red Hat 11.4.1-3)": "rocky",
    "Linux version 5.15.0-206.153.7.1.el8uek.x86_64 (mockbuild@host-100-100-224-14) (gcc (GCC) 11.4.1 20230605 "
    "(Red Hat 11.4.1-2.1.0.1), GNU ld version 2.36.1-4.0.2.el8_6) #2 SMP Wed May 22 20:49:34 PDT 2024": "ol",
    "Linux version 4.14.55-84.37.amzn2.x86_64 (mockbuild@ip-10-0-1-79) (gcc version 7.3.1 20180303 (Red Hat 7.3.1-5) "
    "(GCC)) #1 SMP Wed Jul 25 18:47:15 UTC 2018": "amzn",
    "Linux version 5.10.180-0-virt (buildozer@build-3-14-x86_64) (gcc (Alpine 10.3.1_git20210424) 10.3.1 20210424, "
    "GNU ld (GNU Binutils) 2.35.2) #1-Alpine SMP Thu, 18 May 2023 08:53:16 +0000": "alpine",
    "Linux version 4.19.78-0-virt (buildozer@build-3-10-x86_64) (gcc version 8.3.0 (Alpine 8.3.0)) #1-Alpine SMP Thu "
    "Oct 10 15:25:30 UTC 2019": "alpine",
    "Linux version 6.13.8-arch1-1 (linux@archlinux) (gcc (GCC) 14.2.1 20250207, GNU ld (GNU Binutils) 2.44) "
    "#1 SMP PREEMPT_DYNAMIC Sun, 23 Mar 2025 17:17:30 +0000": "arch",
    "Linux version 6.6.69-1-lts (linux-lts@archlinux) (gcc (GCC) 14.2.1 20240910, GNU ld (GNU Binutils) 2.43.0) "
    "#1 SMP PREEMPT_DYNAMIC Thu, 02 Jan 2025 22:00:49 +0000": "arch",
    "Linux version 6.12.52_1 (voidlinux@voidlinux) (gcc (GCC) 14.2.1 20250405, GNU ld (GNU Binutils) 2.44) "
    "#1 SMP PREEMPT_DYNAMIC Sun Oct 12 20:52:41 UTC 2025": "void",
    "Linux version 5.6.1_1 (void-buildslave@a-hel-fi) (gcc version 9.3.0 (GCC)) #1 SMP Wed Apr 1 10:46:03 UTC 2020": (
        "void"
    ),
    "Linux version 6.8.7-1-default (geeko@buildhost) (gcc (SUSE Linux) 13.2.1 20240206, GNU ld (GNU Binutils; openSUSE "
    "Tumbleweed) 2.42.0.20240130-2) #1 SMP PREEMPT_DYNAMIC Thu Apr 18 07:12:38 UTC 2024 (5c0cf23)": "opensuse",
    "Linux version 6.12.63 (nixbld@localhost) (gcc (GCC) 15.2.0, GNU ld (GNU Binutils) 2.44) #1-NixOS SMP "
    "PREEMPT_DYNAMIC Thu Dec 18 12:55:23 UTC 2025": "nixos",
    "Linux version 6.12.54-gentoo (root@host) (gcc (Gentoo 14.3.1_p20250801 p4) 14.3.1 20250801, GNU ld (Gentoo 2.45 "
    "p3) 2.45.0) #1 SMP PREEMPT_DYNAMIC Sat Nov 29 10:34:00 CET 2025": "gentoo",
    # built by somebody on a distribution: not its kernel
    "Linux version 6.1.0-next-20221214 (tuxmake@tuxmake) (aarch64-linux-gnu-gcc (Debian 12.2.0-9) 12.2.0, GNU ld (GNU "
    "Binutils for Debian) 2.39) #2 SMP PREEMPT_DYNAMIC @1671022464": "",
    "Linux version 5.14.0-rc3-00066-gf227f0faf63b (nathan@archlinux-ax161) (x86_64-linux-gcc (GCC) 11.2.0, GNU ld "
    "(GNU Binutils) 2.37) #1 SMP Sat Jul 31 15:08:11 MST 2021": "",
}


def efi_program(sections: dict[bytes, bytes], machine: int = 0x8664) -> bytes:
    """An EFI program (PE32+) with these sections, of names of at most 8 bytes."""
    start = 0x400
    table, content = b"", b""
    for name, data in sections.items():
        padded = data + bytes(-len(data) % 512)
        table += struct.pack("<8sIIII16x", name, len(data), 0x1000, len(padded), start + len(content))
        content += padded
    header = b"PE\0\0" + struct.pack("<HHIIIHH", machine, len(sections), 0, 0, 0, 240, 0x206) + bytes(240) + table
    return (b"MZ" + bytes(0x3A) + struct.pack("<I", 0x40) + header).ljust(start, b"\0") + content


def efi_arm64_image(image: bytes) -> bytes:
    """The same arm64 Image with the EFI stub's header: 'MZ' (an instruction that does nothing), and one section."""
    start = 0x1000
    table = struct.pack("<8sIIII16x", b".text", len(image), start, len(image), start)
    header = b"PE\0\0" + struct.pack("<HHIIIHH", 0xAA64, 1, 0, 0, 0, 0, 0x206) + table
    return (b"MZ" + image[2:0x3C] + struct.pack("<I", 0x40) + header).ljust(start, b"\0") + image


def elf32() -> bytes:
    """The beginning of what the Xen hypervisor and kernels for 32-bit x86 are."""
    return b"\x7fELF\x01\x01\x01" + bytes(9) + struct.pack("<HHI", 2, 3, 1) + bytes(100)
