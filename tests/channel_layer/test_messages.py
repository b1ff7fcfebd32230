from __future__ import annotations

from typing import Any

import pytest

from channel_layer.errors import WireError
from channel_layer.messages import check_seconds, split_element


def test_split_element() -> None:
    assert split_element((1_700_000_000_123).to_bytes(8, "big") + b"content") == (1_700_000_000_123, b"content")
    assert split_element(bytes(8)) == (0, b"")


@pytest.mark.parametrize("length", range(8))
def test_an_element_shorter_than_its_deadline(length: int) -> None:
    with pytest.raises(WireError, match=f"{length} bytes"):
        split_element(b"x" * length)


@pytest.mark.parametrize("value", [1, 0.25, 86400])
def test_check_seconds(value: float) -> None:
    assert check_seconds("expiry", value) == value
    assert type(check_seconds("expiry", value)) is float


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
    ],
)
def test_check_seconds_names_option_and_value(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        check_seconds("expiry", value)
    assert "expiry" in str(raised.value)
    assert repr(value) in str(raised.value)
