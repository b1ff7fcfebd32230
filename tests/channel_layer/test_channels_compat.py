from __future__ import annotations

import sys
import types

import pytest

from channel_layer import errors
from channel_layer.capacity import Capacities
from channel_layer.channels_compat import ChannelsBackend, channel_full, message_too_large


def test_without_channels_the_errors_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "channels.exceptions", raising=False)
    assert type(channel_full("text")) is errors.ChannelFull
    assert type(message_too_large("text")) is errors.MessageTooLarge
    assert str(channel_full("text")) == "text"


def test_with_channels_they_are_both(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = types.ModuleType("channels.exceptions")
    theirs.ChannelFull = type("ChannelFull", (Exception,), {})  # type: ignore[attr-defined]
    theirs.MessageTooLarge = type("MessageTooLarge", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "channels.exceptions", theirs)
    full, too_large = channel_full("a is full"), message_too_large("too large")
    assert isinstance(full, errors.ChannelFull)
    assert isinstance(full, theirs.ChannelFull)  # type: ignore[attr-defined]
    assert isinstance(too_large, errors.MessageTooLarge)
    assert isinstance(too_large, theirs.MessageTooLarge)  # type: ignore[attr-defined]
    assert (type(full).__name__, str(full)) == ("ChannelFull", "a is full")
    # One class, not one for each error.
    assert type(channel_full("b is full")) is type(full)


def test_the_real_module(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("channels.exceptions")
    with pytest.raises(exceptions.ChannelFull, match="full"):
        raise channel_full("full")


@pytest.mark.parametrize("odd", [None, "text", int], ids=repr)
def test_a_module_of_another_kind_changes_nothing(monkeypatch: pytest.MonkeyPatch, odd: object) -> None:
    other = types.ModuleType("channels.exceptions")
    other.ChannelFull = odd  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "channels.exceptions", other)
    assert type(channel_full("text")) is errors.ChannelFull


def test_the_helpers_of_channels_base_layer() -> None:
    layer = ChannelsBackend()
    layer._capacities = Capacities(7, {"a*": 8})
    assert (layer.capacity, layer.get_capacity("abc"), layer.get_capacity("x")) == (7, 8, 7)
    assert layer.require_valid_channel_name("a!b", receive=True)
    assert layer.non_local_name("a!b") == "a!"
    for check in (layer.valid_channel_name, layer.require_valid_channel_name):
        with pytest.raises(TypeError):
            check("a b")
    for check_group in (layer.valid_group_name, layer.require_valid_group_name):
        with pytest.raises(TypeError):
            check_group("a!b")
