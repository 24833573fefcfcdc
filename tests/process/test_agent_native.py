"""The agent's own tests in C, under sanitizers, and its fuzz targets for a bounded time."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

AGENT = Path(__file__).parents[2] / "agent"
FUZZ_SECONDS = int(os.environ.get("BANGER_FUZZ_SECONDS", "10"))


def make(directory: Path, *argv: str) -> str:
    done = subprocess.run(
        ["make", "-C", AGENT, f"BUILD={directory}", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-4000:]
    return done.stdout.decode(errors="replace")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_tests_in_c(tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    output = make(tmp_path, "test", f"CC={compiler}")
    ran = re.findall(rf"^{tmp_path}/(test_\w+)$", output, re.MULTILINE)
    assert sorted(ran) == sorted(source.stem for source in (AGENT / "tests").glob("test_*.c"))


@pytest.mark.timeout(600)
def test_fuzzing_finds_nothing(tmp_path: Path) -> None:
    if shutil.which("clang") is None:
        pytest.skip("libFuzzer needs clang (Debian: apt-get install clang libclang-rt-dev)")
    output = make(tmp_path, "fuzz", f"SECONDS={FUZZ_SECONDS}")
    executed = [int(count) for count in re.findall(r"stat::number_of_executed_units:\s*(\d+)", output)]
    assert len(executed) == len(list((AGENT / "fuzz").glob("fuzz_*.c")))
    assert all(count > 100 for count in executed)
