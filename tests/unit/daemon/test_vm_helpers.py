"""What a start of a VM leaves of the logs of the one before."""

from pathlib import Path

from banger.daemon.vm_helpers import remove_logs


def test_only_the_output_of_the_main_command_is_kept(tmp_path: Path) -> None:
    for name in ("console", "main", "vmm", "metrics"):
        for old in ("", ".1"):
            (tmp_path / f"{name}.log{old}").write_bytes(b"said before")
    remove_logs(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"main.log", "main.log.1"}
