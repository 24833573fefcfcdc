"""The configuration file: defaults, every key, and what is wrong in it named."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.config import Config, load


def test_missing_and_empty_file_mean_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "config.toml") == Config()
    (tmp_path / "config.toml").write_text("# nothing\n")
    assert load(tmp_path / "config.toml") == Config()


def test_every_key_can_be_set(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    sizes = (1 << 31, 1 << 30, 1 << 29)
    mirrors = {"docker.io": ("http://10.0.0.1:5000/hub", "mirror.example.org"), "ghcr.io": ()}
    limits = (1, 2, 3)
    registries = (("10.0.0.1:5000",), "ghcr.io", mirrors)
    wanted = Config("img", "krn", 3, *sizes, 2.5, 60.0, *limits, "copy:/m", "tcg", *registries, ssh_key="/key")
    lines = [f"{key} = {json.dumps(value)}" for key, value in asdict(wanted).items() if key != "registry_mirrors"]
    tables = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in mirrors.items()]
    file.write_text("\n".join([*lines, "[registry_mirrors]", *tables]))
    assert load(file) == wanted


def test_whole_number_serves_for_seconds(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("stop_grace = 3")
    assert load(tmp_path / "c").stop_grace == 3.0


def test_times_are_written_as_options_take_them(tmp_path: Path) -> None:
    (tmp_path / "c").write_text('auto_stop = "1h30m"\nstop_grace = "2.5s"\nboot_timeout = "90"')
    loaded = load(tmp_path / "c")
    assert (loaded.auto_stop, loaded.stop_grace, loaded.boot_timeout) == (5400.0, 2.5, 90.0)
    (tmp_path / "c").write_text('auto_stop = "never"')
    assert load(tmp_path / "c").auto_stop == 0.0


def test_sizes_are_written_as_options_take_them(tmp_path: Path) -> None:
    written = {"memory": "2G", "disk_size": "1.5GiB", "home_size": "64M", "reserve_memory": "1g"}
    written |= {"reserve_disk": "4194304", "cache_size": "1T"}
    (tmp_path / "c").write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in written.items()))
    loaded = load(tmp_path / "c")
    assert (loaded.memory, loaded.disk_size, loaded.home_size) == (2 << 30, 3 << 29, 64 << 20)
    assert (loaded.reserve_memory, loaded.reserve_disk, loaded.cache_size) == (1 << 30, 4 << 20, 1 << 40)


def test_every_size_in_bytes_can_be_written_so(tmp_path: Path) -> None:
    sizes = [key for key, value in asdict(Config()).items() if type(value) is int and "uid" not in key]
    for key in sizes:
        if key != "vcpu":
            (tmp_path / "c").write_text(f'{key} = "3G"')
            assert asdict(load(tmp_path / "c"))[key] == 3 << 30, key


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memry = 1", "unknown key 'memry'"),
        ("[vm]\nmemory = 1", "unknown key 'vm'"),
        ('memory = "2X"', "memory: '2X' is not a size"),
        ('home_size = ""', "home_size: '' is not a size"),
        ('cache_size = "20"', "cache_size: '20' without a unit means bytes"),
        ("memory = 1.5", "memory: 1.5 is not a size"),
        ("disk_size = true", "disk_size: true is not a size"),
        ("reserve_disk = 1979-05-27", "reserve_disk: a time is not a size"),
        ("vcpu = true", "vcpu must be of type integer, not true"),
        ("default_image = 7", "default_image must be of type string, not 7"),
        ('insecure_registries = "a"', "insecure_registries must be of type list of strings"),
        ("insecure_registries = [1]", "insecure_registries must be of type list of strings, not a list"),
        ('insecure_registries = ["http://a"]', "insecure_registries has 'http://a', which is not a registry"),
        ('default_registry = "docker.io/library"', "default_registry has 'docker.io/library', which is not a registry"),
        ("registry_mirrors = 1", "registry_mirrors must be of type table"),
        ('[registry_mirrors]\ndocker.io = ["a"]', "the mirrors of 'docker' must be a list of strings"),
        ('[registry_mirrors]\n"a/b" = ["a"]', "registry_mirrors has 'a/b', which is not a registry"),
        ('[registry_mirrors]\n"a" = "b"', "the mirrors of 'a' must be a list of strings, not 'b'"),
        ('[registry_mirrors]\n"a" = ["ftp://b"]', "'ftp://b' is not a mirror of 'a'"),
        ('[registry_mirrors]\n"a" = ["b/C"]', "'b/C' is not a mirror of 'a'"),
        ('[registry_mirrors]\n"a" = ["https://user@b"]', "'https://user@b' is not a mirror of 'a'"),
        ("stop_grace = false", "stop_grace must be of type number, not false"),
        ('auto_stop = "1x"', "auto_stop: '1x' is not a length of time"),
        ('stop_grace = "never"', "stop_grace: 'never' is not a length of time"),
        ("memory = -1", "memory cannot be -1"),
        ("boot_timeout = inf", "boot_timeout cannot be inf"),
        ("stop_grace = nan", "stop_grace cannot be nan"),
        ('accelerator = "hvf"', "accelerator must be auto, kvm or tcg, not 'hvf'"),
        ('vmm = "bochs"', "vmm must be auto, firecracker or qemu, not 'bochs'"),
        ("first_vm_uid = 0", "first_vm_uid 0 and vm_uids 1048576 are no range of users"),
        ("vm_uids = 0", "first_vm_uid 1879048192 and vm_uids 0 are no range of users"),
        ("first_vm_uid = 4294967290\nvm_uids = 6", "first_vm_uid 4294967290 and vm_uids 6 are no range of users"),
        ("memory = ", "is not valid TOML"),
        ("vcpu = " + "9" * 5000, "is not valid TOML: a number has too many digits"),
        ("registry_mirrors = " + "[" * 100_000, "is not valid TOML: it is nested too deeply"),
        ("memory = 1\nmemory = 2", "is not valid TOML"),
    ],
)
def test_mistake_is_named_with_its_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(BangerError) as caught:
        load(file)
    assert caught.value.code is Code.INVALID
    assert caught.value.message.startswith(str(file))
    assert said in caught.value.message


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary"):
        with pytest.raises(BangerError, match=str(path)):
            load(path)
