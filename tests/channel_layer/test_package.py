"""The public names of the package, and which layer get_channel_layer() returns."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import channel_layer
from channel_layer import get_channel_layer, install_process_layer, installed_process_layer
from channel_layer.memory import InMemoryChannelLayer


@pytest.fixture(autouse=True)
def no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_layer, "_shared_layer", None)
    monkeypatch.setattr(channel_layer, "_process_layer", None)
    monkeypatch.delenv("TRUNKLINE_REDIS", raising=False)
    monkeypatch.delenv("TRUNKLINE_PREFIX", raising=False)


@pytest.mark.parametrize("name", channel_layer.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(channel_layer, name) is not None
    assert name in dir(channel_layer)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuchThing'"):
        channel_layer.NoSuchThing  # noqa: B018


def test_importing_the_package_loads_nothing_and_does_nothing() -> None:
    code = """
import sys, threading
before = set(sys.modules)
import channel_layer
loaded = set(sys.modules) - before
assert not {"redis", "msgpack", "hiredis", "twisted", "uvloop", "channels", "asyncio"} & loaded, loaded
assert {name for name in loaded if name.startswith("channel_layer.")} == set(), loaded
channel_layer.Publisher
assert "twisted" not in sys.modules
assert "channel_layer.redis_layer" not in sys.modules
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_a_worker_and_a_broker_the_text_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="TRUNKLINE_REDIS is not set"):
        get_channel_layer()
    monkeypatch.setenv("TRUNKLINE_REDIS", "")
    with pytest.raises(RuntimeError, match="TRUNKLINE_REDIS is not set"):
        get_channel_layer()


def test_elsewhere_it_is_one_shared_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_REDIS", "redis://localhost:1")  # nothing connects before the first call
    layer = get_channel_layer()
    assert isinstance(layer, channel_layer.RedisChannelLayer)
    assert get_channel_layer() is layer


def test_inside_a_worker_it_is_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_REDIS", "redis://localhost:1")
    layer = InMemoryChannelLayer()
    assert installed_process_layer() is None
    install_process_layer(layer)
    assert get_channel_layer() is layer
    assert installed_process_layer() is layer
    install_process_layer(None)
    assert installed_process_layer() is None
    assert get_channel_layer() is not layer


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_leaves_the_layers_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_REDIS", "redis://localhost:1")
    shared = get_channel_layer()
    install_process_layer(InMemoryChannelLayer())
    child = os.fork()
    if child == 0:
        try:
            own = get_channel_layer()
            right = installed_process_layer() is None and own is not shared and get_channel_layer() is own
            os._exit(0 if right else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert get_channel_layer() is installed_process_layer()
