"""Directories of tens of thousands of files, as the kernel of a guest reads them: in order, by name, from anywhere."""

import subprocess
from pathlib import Path

from banger.disk import tar
from banger.disk.tar import Member
from tests.vm.host import Host

FILES, LINKS = 40_000, 21_000
# reads the directory by name and again from places in the middle of it
READER = r"""
opendir(D, "/data/files") or die;
my (@places, @names);
while (1) {
    my $place = telldir(D);
    my $name = readdir(D);
    last unless defined $name;
    push @places, $place;
    push @names, $name;
}
my $wrong = 0;
for (my $i = 7; $i < @names; $i += 101) {
    seekdir(D, $places[$i]);
    $wrong++ if readdir(D) ne $names[$i];
    $wrong++ unless -e "/data/files/$names[$i]";
    $wrong++ if -e "/data/files/x$names[$i]";
}
print scalar(@names), " ", $wrong, "\n";
"""


def add_tree(archive: Path) -> None:
    """Append to a tar: a directory of files with names of up to 255 bytes in no order, and as many links to them."""
    with open(archive, "ab") as stream:
        for number in range(FILES):
            data = b"%d" % number if number % 10 == 0 else b""
            member = Member(name(number), tar.REGULAR, 0o600, number % 7, 3, number, size=len(data))
            stream.write(tar.encode_header(member) + data + bytes(-len(data) % tar.BLOCK))
        for number in range(LINKS):
            member = Member(b"data/links/%d" % number, tar.HARD_LINK, 0, 0, 0, 0, link=name(number))
            stream.write(tar.encode_header(member))
        stream.write(tar.encode_end())


def name(number: int) -> bytes:
    return b"data/files/%06d" % (number * 7919 % FILES) + b"n" * (249 if number % 3 else number % 240)


def test_a_guest_reads_large_directories(host: Host, image: Path, tmp_path: Path) -> None:
    with open(tmp_path / "root.tar", "wb") as stream:
        argv = ["sqfs2tar", "--root-becomes", ".", str(image / "rootfs.squashfs")]
        packed = subprocess.run(argv, check=True, capture_output=True).stdout
        stream.write(packed.rstrip(b"\0").ljust(-(-len(packed.rstrip(b"\0")) // tar.BLOCK) * tar.BLOCK, b"\0"))
    add_tree(tmp_path / "root.tar")
    host.ok("image", "import", "large", "--from", str(tmp_path / "root.tar"))
    linked = name(20).decode()
    script = f"perl -e '{READER}' && ls /data/links | wc -l && stat -c '%h %u %g %a %Y' /{linked} && cat /data/links/20"
    read = host.ok("vm", "run", "--rm", "--image", "large", "--", "sh", "-c", script)
    assert read.splitlines() == [f"{FILES + 2} 0", str(LINKS), "2 6 3 600 20", "20"]
