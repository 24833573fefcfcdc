"""The OCI configuration that an image keeps: what people want to know of it, and one for images that have none.

It is a stranger's: nothing in it is trusted to have the type that OCI Image Configuration 1.1 gives it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from banger import system
from banger.imagecat.manifest import CONFIG, ImageConfig, ImageManifest

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_LIMIT = 4 << 20  # bytes
_KEPT = ("created", "author", "architecture", "variant", "os", "os.version", "os.features", "config")


@dataclass(frozen=True)
class Step:
    """One step of how an image was made; `size_bytes` is that of its layer, compressed as it was pulled."""

    created: str
    created_by: str
    size_bytes: int
    comment: str


def read(entry: Path) -> dict[str, Json]:
    """The configuration in an image's directory, empty where there is none that can be read."""
    try:
        with open(entry / CONFIG, "rb", opener=system.open_regular) as stream:
            value: Json = json.loads(stream.read(_LIMIT))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def created(config: Mapping[str, Json]) -> str:
    """When the image was made, as it says itself."""
    return _text(config.get("created"))


def labels(config: Mapping[str, Json]) -> dict[str, str]:
    """The labels of an image, by name."""
    found = _object(_object(config.get("config")).get("Labels"))
    return {name: value for name, value in sorted(found.items()) if isinstance(value, str)}


def history(config: Mapping[str, Json], manifest: ImageManifest) -> list[Step]:
    """The steps that an image was made by, the last first; without a configuration there is one: its arrival."""
    steps = []
    layers = iter(manifest.layers)
    for entry in _list(config.get("history")):
        step = _object(entry)
        layer = None if step.get("empty_layer") is True else next(layers, None)
        steps.append(
            Step(
                _text(step.get("created")),
                _text(step.get("created_by")),
                layer.size_bytes if layer else 0,
                _text(step.get("comment")),
            )
        )
    # configurations need not have a history, or one of all layers
    steps += [Step("", "", layer.size_bytes, layer.digest) for layer in layers]
    if not steps:
        comment = "" if manifest.managed else "registered where it is"
        return [Step(manifest.imported_at, manifest.source, manifest.size_bytes, comment)]
    return steps[::-1]


def of_one_layer(config: Mapping[str, Json], manifest: ImageManifest, diff_id: str) -> dict[str, Json]:
    """The configuration of an image whose whole tree is one layer: its own, or one made of what the manifest says."""
    document = {key: config[key] for key in _KEPT if key in config}
    steps = [{**_object(step), "empty_layer": True} for step in _list(config.get("history"))]
    if not config:
        document = {"created": manifest.imported_at, "config": _plain(manifest.config)}
    made: dict[str, Json] = {
        "created": created(document) or manifest.imported_at,
        "created_by": f"banger image export {manifest.name}",
        "comment": "all layers in one" if steps else manifest.source,
    }
    return {
        **document,
        "architecture": _text(document.get("architecture")) or manifest.arch,
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [*steps, made],
    }


def _plain(config: ImageConfig) -> dict[str, Json]:
    """What an image says about its main process under the names that the specification has for it."""
    plain: dict[str, Json] = {}
    for name, words in (("Entrypoint", config.entrypoint), ("Cmd", config.cmd), ("Env", config.env)):
        if words:
            plain[name] = [*words]
    for name, text in (("User", config.user), ("WorkingDir", config.workdir), ("StopSignal", config.stop_signal)):
        if text:
            plain[name] = text
    if config.healthcheck:
        plain["Healthcheck"] = {"Test": ["CMD", *config.healthcheck]}
    for name, keys in (("Volumes", config.volumes), ("ExposedPorts", config.exposed_ports)):
        if keys:
            plain[name] = {key: {} for key in keys}
    return plain


def _text(value: Json) -> str:
    return value if isinstance(value, str) else ""


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


def _object(value: Json) -> dict[str, Json]:
    return value if isinstance(value, dict) else {}
