"""Models become dataclasses when they are first used, and nobody sees a difference."""

import dataclasses
import subprocess
import sys
import threading
from dataclasses import field

import pytest

from banger.api import models as m
from banger.api.codec import decode, encode
from banger.api.models.base import Model, complete_models


class Point(Model):
    """Two numbers."""

    x: int
    y: int = 2
    names: list[str] = field(default_factory=list)


def test_made_by_position_and_name_with_defaults() -> None:
    class Fresh(Model):
        x: int
        names: list[str] = field(default_factory=list)

    first = Fresh(1)
    assert (first.x, first.names, repr(first)) == (1, [], "Fresh(x=1, names=[])")
    assert first == Fresh(x=1, names=[])
    assert first != Fresh(2)
    assert Fresh(1).names is not first.names
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        Fresh()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        Fresh(x=1, z=2)  # type: ignore[call-arg]


def test_a_wrong_first_use_is_an_error_like_any_other() -> None:
    class Fresh(Model):
        x: int

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        Fresh()  # type: ignore[call-arg]
    assert Fresh(1).x == 1


def test_its_fields_are_there_before_the_first_one_is() -> None:
    class Fresh(Model):
        x: int
        y: str = "no"

    assert dataclasses.is_dataclass(Fresh)
    assert [each.name for each in dataclasses.fields(Fresh)] == ["x", "y"]
    assert not hasattr(Fresh, "no_such_thing")
    assert not dataclasses.is_dataclass(Model)


def test_one_that_extends_another_has_the_fields_of_both() -> None:
    class Base(Model):
        x: int

    class More(Base):
        y: int

    assert [each.name for each in dataclasses.fields(More)] == ["x", "y"]
    assert [each.name for each in dataclasses.fields(Base)] == ["x"]
    assert More(1, 2) == More(x=1, y=2)


def test_through_json_and_replaced() -> None:
    point = decode(Point, {"x": 1, "names": ["a"]})
    assert point == Point(1, 2, ["a"])
    assert encode(dataclasses.replace(point, y=3)) == {"x": 1, "y": 3, "names": ["a"]}


@pytest.mark.parametrize("attempt", range(20))
def test_many_threads_that_make_the_first_ones(attempt: int) -> None:
    class Fresh(Model):
        x: int
        names: list[str] = field(default_factory=list)

    together, made = threading.Barrier(8), []

    def make() -> None:
        together.wait()
        made.append(Fresh(1))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [Fresh(1)] * 8


def test_importing_them_makes_none_and_completing_them_all() -> None:
    count = "sum('__dataclass_fields__' in vars(model) for model in Model.__subclasses__())"
    code = f"from banger.api.models.base import Model; import banger.api.operations; print({count})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"0\n"
    complete_models()
    assert all("__dataclass_fields__" in vars(model) for model in Model.__subclasses__())
    assert m.Empty() == m.Empty()
