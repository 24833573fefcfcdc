"""What is done to one image at the same time ends as if it had been done one after the other."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from tests.daemons import DaemonProcess, running_daemon
from tests.process.test_image_register import ext4, install_kernel, root_directory, squashfs

IMAGE = "Tiny"  # no reference to a registry can be called so: what is missing stays missing
ROUNDS = 8
GONE = {Code.NOT_FOUND, Code.IN_USE}  # it was removed before, or while it was used

Action = Callable[[], object]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path / "daemon") as daemon:
        install_kernel(daemon.layout.kernels)
        yield daemon


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    """A directory with a rootfs, a seed, and a root to import; that must be the same afterwards."""
    files = tmp_path / "files"
    squashfs(files / "rootfs.squashfs", root_directory(files / "root"))
    ext4(files / "seed.ext4", files / "root/etc", 8 << 20)

    def sums() -> dict[str, str]:
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files.iterdir() if path.is_file()}

    before = sums()
    yield files
    assert sums() == before


def race(*actions: Action) -> list[BangerError | None]:
    """Do all at once; what each failed with, None for success."""
    outcomes: list[BangerError | None] = [None] * len(actions)
    barrier = threading.Barrier(len(actions))

    def act(number: int, action: Action) -> None:
        barrier.wait()
        try:
            action()
        except BangerError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=act, args=pair) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def codes(outcomes: list[BangerError | None]) -> list[Code | None]:
    return [None if outcome is None else outcome.code for outcome in outcomes]


def check(daemon: DaemonProcess, names: set[str]) -> None:
    """Just these images are there, whole, and no staging."""
    checks = daemon.client.call(op.IMAGE_VERIFY, m.ImageVerify()).images
    assert {check.name: check.problem for check in checks} == dict.fromkeys(names, "")
    assert {path.name for path in daemon.layout.images.iterdir()} == names


def register(daemon: DaemonProcess, files: Path, force: bool = False) -> m.ImageInfo:
    rootfs, seed = str(files / "rootfs.squashfs"), str(files / "seed.ext4")
    return daemon.client.call(op.IMAGE_REGISTER, m.ImageRegister(IMAGE, rootfs, "mine", seed, force))


def import_one(daemon: DaemonProcess, files: Path, force: bool = False) -> m.ImageInfo:
    return daemon.client.call(op.IMAGE_IMPORT, m.ImageImport(IMAGE, str(files / "root"), "mine", force))


def remove(daemon: DaemonProcess) -> object:
    return daemon.client.call(op.IMAGE_DELETE, m.ImageDelete(IMAGE))


def promote(daemon: DaemonProcess) -> m.ImageInfo:
    return daemon.client.call(op.IMAGE_PROMOTE, m.NameRequest(IMAGE))


def create(daemon: DaemonProcess) -> m.VmInfo:
    return daemon.client.call(op.VM_CREATE, m.VmCreate(image=IMAGE, name="one", home_bytes=64 << 20))


def test_promote_and_remove(daemon: DaemonProcess, files: Path) -> None:
    for _ in range(ROUNDS):
        register(daemon, files)
        promoted, removed = codes(race(lambda: promote(daemon), lambda: remove(daemon)))
        assert removed is None
        assert promoted in {None, *GONE}
        check(daemon, set())


def test_promote_twice(daemon: DaemonProcess, files: Path) -> None:
    for _ in range(ROUNDS):
        register(daemon, files, force=True)
        outcomes = codes(race(*[lambda: promote(daemon)] * 3))
        assert outcomes.count(None) == 1
        assert set(outcomes) <= {None, Code.WRONG_STATE, Code.IN_USE}
        assert daemon.client.call(op.IMAGE_SHOW, m.NameRequest(IMAGE)).managed
        check(daemon, {IMAGE})


def test_register_and_remove(daemon: DaemonProcess, files: Path) -> None:
    for _ in range(ROUNDS):
        registered, removed = codes(race(lambda: register(daemon, files), lambda: remove(daemon)))
        assert (registered, removed) in {(None, None), (None, Code.NOT_FOUND)}
        check(daemon, set() if removed is None else {IMAGE})
        if removed is not None:
            remove(daemon)


@pytest.mark.parametrize("force", [False, True])
def test_register_and_import(daemon: DaemonProcess, files: Path, force: bool) -> None:
    for _ in range(ROUNDS // 2):
        outcomes = race(*[lambda: register(daemon, files, force), lambda: import_one(daemon, files, force)] * 2)
        failed = [outcome for outcome in outcomes if outcome is not None]
        assert len(failed) == (0 if force else 3)
        assert all(error.message == f"there already is an image {IMAGE!r}" for error in failed)
        check(daemon, {IMAGE})
        remove(daemon)


def test_parallel_imports_have_one_winner(daemon: DaemonProcess, files: Path) -> None:
    outcomes = race(*[lambda: import_one(daemon, files)] * 6)
    failed = [outcome for outcome in outcomes if outcome is not None]
    assert len(failed) == 5
    assert {(error.code, error.message) for error in failed} == {(Code.EXISTS, f"there already is an image {IMAGE!r}")}
    assert all("--force" in error.hint for error in failed)
    check(daemon, {IMAGE})


def test_tag_and_remove(daemon: DaemonProcess, files: Path) -> None:
    for _ in range(ROUNDS):
        import_one(daemon, files)
        tagged, removed = codes(
            race(
                lambda: daemon.client.call(op.IMAGE_TAG, m.ImageTag(IMAGE, "other", force=True)),
                lambda: remove(daemon),
            )
        )
        assert removed is None
        assert tagged in {None, Code.NOT_FOUND}
        check(daemon, set() if tagged else {"other"})
        if not tagged:
            daemon.client.call(op.IMAGE_DELETE, m.ImageDelete("other"))


def whole_vm(daemon: DaemonProcess, created: BangerError | None) -> None:
    """A VM that was made has its files, another has left nothing; none is there afterwards."""
    directories = list(daemon.layout.vms.iterdir())
    if created is not None:
        assert directories == []
        return
    (vm,) = directories
    assert {"rootfs", "kernel", "boot.cpio", "overlay.ext4", "work.ext4", "vm.json"} <= {
        path.name for path in vm.iterdir()
    }
    assert (vm / "rootfs").stat().st_size > 0
    daemon.client.call(op.VM_DELETE, m.VmRemove("one"))


@pytest.mark.parametrize("managed", [True, False])
def test_create_a_vm_and_remove_its_image(daemon: DaemonProcess, files: Path, managed: bool) -> None:
    for _ in range(ROUNDS):
        if managed:
            import_one(daemon, files)
        else:
            register(daemon, files)
        created, removed = race(lambda: create(daemon), lambda: remove(daemon))
        assert (created is None) != (removed is None), f"{created}, {removed}"
        if removed is not None:
            assert (removed.code, "is used by one" in removed.message) == (Code.IN_USE, True)
        whole_vm(daemon, created)
        if removed is not None:
            check(daemon, {IMAGE})
            remove(daemon)


def test_vms_of_the_same_name(daemon: DaemonProcess, files: Path) -> None:
    for _ in range(ROUNDS // 2):
        import_one(daemon, files, force=True)  # into the seed of which the key has to be put first
        outcomes = race(*[lambda: create(daemon)] * 4)
        failed = [outcome for outcome in outcomes if outcome is not None]
        assert {(error.code, error.message) for error in failed} == {
            (Code.EXISTS, "there is already a VM named 'one'")
        }  # fmt: skip
        assert len(failed) == 3
        with pytest.raises(BangerError) as caught:
            daemon.client.call(op.VM_CREATE, m.VmCreate(image="Gone", name="one"))
        assert caught.value.code is Code.EXISTS  # the name is still that of the first, before all else
        whole_vm(daemon, None)


@pytest.mark.parametrize("change", ["promote", "replace"])
def test_create_a_vm_while_its_image_changes(daemon: DaemonProcess, files: Path, change: str) -> None:
    def act() -> object:
        return promote(daemon) if change == "promote" else import_one(daemon, files, force=True)

    for _ in range(ROUNDS):
        register(daemon, files, force=True)
        created, changed = race(lambda: create(daemon), act)
        assert changed is None
        assert created is None or created.code is Code.IN_USE
        whole_vm(daemon, created)
        check(daemon, {IMAGE})
