"""The API as reviewed: its OpenAPI document and the JSON shape of every model, compared with what is stored here.

After an intended change: BANGER_UPDATE_SNAPSHOTS=1 pytest tests/unit/api/test_openapi.py, and review the difference.
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from banger import __version__
from banger.api import models
from banger.api.errors import Code
from banger.api.operations import CALLS, STREAMS
from banger.daemon.http import Handlers, build_app
from banger.daemon.jobs import Report
from banger.daemon.streams import Peer

HERE = Path(__file__).parent


def compare(name: str, actual: object) -> None:
    text = json.dumps(actual, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if os.environ.get("BANGER_UPDATE_SNAPSHOTS") == "1":
        (HERE / name).write_text(text)
        pytest.skip(f"{name} was renewed: review the difference")
    assert json.loads(text) == json.loads((HERE / name).read_text()), f"{name} differs: see the head of this file"


async def _call(request: object, report: Report) -> object:
    raise NotImplementedError


async def _stream(request: object, peer: Peer) -> None:
    raise NotImplementedError


def test_openapi_document() -> None:
    app = build_app(Handlers({call.name: _call for call in CALLS}, {stream.name: _stream for stream in STREAMS}))
    document = app.openapi()
    assert document["info"].pop("version") == __version__
    compare("openapi.json", document)


def test_operation_ids_are_the_operations_names() -> None:
    app = build_app(Handlers({call.name: _call for call in CALLS}, {stream.name: _stream for stream in STREAMS}))
    ids = {path: methods["post"]["operationId"] for path, methods in app.openapi()["paths"].items()}
    assert ids == {f"/v1/{call.name}": call.name for call in CALLS}


def test_shapes_of_the_models() -> None:
    """What `--json` prints and clients parse: names, types, order, and which may be left out."""
    shapes = {
        name: [
            f"{field.name}: {field.type}"
            + ("" if field.default is field.default_factory is dataclasses.MISSING else " (optional)")
            for field in dataclasses.fields(kind)
        ]
        for name, kind in vars(models).items()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__module__.startswith(models.__name__)
    }
    compare("models.json", shapes)


def test_operations_streams_and_error_codes() -> None:
    table = {
        "calls": {
            call.name: [call.request.__name__, call.response.__name__, "long" if call.long else "short"]
            for call in CALLS
        },
        "streams": {stream.name: [stream.request.__name__, stream.response.__name__] for stream in STREAMS},
        "error codes": [code.value for code in Code],
    }
    compare("operations.json", table)
