"""A quick enum is an enum in everything but its speed."""

import copy
import pickle
from enum import Enum, IntEnum

import pytest

from channel_layer.enums import quick


@quick
class Colour(Enum):
    RED = "red"
    CRIMSON = "red"  # noqa: PIE796 - an alias
    BLUE = "blue"


@quick
class Number(IntEnum):
    ONE = 1
    TWO = 2


def test_members_are_attributes_of_the_class_itself():
    assert vars(Colour)["RED"] is Colour.RED
    assert vars(Number)["TWO"] is Number.TWO


def test_members_are_what_they_were():
    assert list(Colour) == [Colour.RED, Colour.BLUE]
    assert Colour("red") is Colour.RED is Colour.CRIMSON is Colour["RED"]
    assert (Colour.RED.name, Colour.RED.value, repr(Colour.RED)) == ("RED", "red", "<Colour.RED: 'red'>")
    assert isinstance(Colour.RED, Colour)
    assert Colour.RED != Colour.BLUE
    assert Colour.RED != "red"
    assert Number.ONE + Number.TWO == 3
    with pytest.raises(ValueError, match="green"):
        Colour("green")
    with pytest.raises(AttributeError):
        Colour.RED = 1


def test_members_are_keys():
    assert {Colour.RED: 1, Colour.BLUE: 2}[Colour("blue")] == 2
    assert {1: "one"}[Number.ONE] == "one"
    assert {Number.ONE: "one"}[1] == "one"


def test_a_copy_is_the_member_itself():
    assert copy.deepcopy(Colour.RED) is Colour.RED
    assert pickle.loads(pickle.dumps(Colour.RED)) is Colour.RED
