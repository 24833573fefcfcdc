"""What an image says of its main process, read from its configuration."""

import json

import pytest

from banger.api.errors import BangerError, Code
from banger.imagecat import configuration
from banger.imagecat.manifest import ImageConfig
from banger.imagecat.oci import parse_config


@pytest.mark.parametrize(
    ("config", "command"),
    [
        ({}, ()),
        ({"Healthcheck": None}, ()),
        ({"Healthcheck": {}}, ()),
        ({"Healthcheck": {"Test": []}}, ()),
        ({"Healthcheck": {"Test": ["NONE"]}}, ()),
        ({"Healthcheck": {"Test": ["OTHER", "x"]}}, ()),
        ({"Healthcheck": {"Test": ["CMD", "curl", "-f", "http://localhost/"], "Interval": 1}}, ("curl", "-f", "http://localhost/")),
        ({"Healthcheck": {"Test": ["CMD-SHELL", "a || exit 1"]}}, ("/bin/sh", "-c", "a || exit 1")),
        ({"Healthcheck": {"Test": ["CMD-SHELL", "a"]}, "Shell": ["/bin/ash", "-ec"]}, ("/bin/ash", "-ec", "a")),
    ],
)  # fmt: skip
def test_health_checks(config: dict[str, object], command: tuple[str, ...]) -> None:
    assert parse_config(json.dumps({"config": config}).encode(), "x").healthcheck == command


@pytest.mark.parametrize("check", ["CMD", [], {"Test": "CMD"}, {"Test": ["CMD", 1]}])
def test_what_is_no_health_check(check: object) -> None:
    with pytest.raises(BangerError) as caught:
        parse_config(json.dumps({"config": {"Healthcheck": check}}).encode(), "x")
    assert caught.value.code is Code.CORRUPT


def test_a_health_check_survives_export() -> None:
    written = configuration._plain(ImageConfig(healthcheck=("/bin/sh", "-c", "true")))
    assert parse_config(json.dumps({"config": written}).encode(), "x").healthcheck == ("/bin/sh", "-c", "true")
