"""What is told of a kernel that has just been imported."""

import pytest

from banger.api.models import KernelInfo
from banger.cli.kernel import print_arrived


@pytest.mark.parametrize(
    ("modules", "unknown", "warned"),
    [(False, ["CONFIG_EXT4_FS"], True), (True, ["CONFIG_DEVTMPFS"], False), (False, [], False)],
)
def test_a_kernel_that_may_lack_its_modules(
    modules: bool, unknown: list[str], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = KernelInfo(name="mine", kernel_version="6.1", arch="amd64", modules=modules, unknown=unknown)
    print_arrived(kernel, as_json=False, verb="imported")
    assert ("'banger kernel show mine' lists as unknown" in capsys.readouterr().err) is warned
