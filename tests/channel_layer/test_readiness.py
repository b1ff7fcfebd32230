"""Who is ready, and the lines in which a process tells its supervisor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel_layer.readiness import (
    PROOF_AGE_S_MAX,
    LifePhase,
    StatusWord,
    build_status,
    decode_status,
    explain_unready,
)


@pytest.mark.parametrize(
    ("phase", "reachable", "proved_at", "why"),
    [
        (LifePhase.SERVING, True, 100.0, None),
        (LifePhase.SERVING, True, 100.0 - PROOF_AGE_S_MAX, None),
        (LifePhase.SERVING, True, 90.0, "no message has come back through the broker for 10 s"),
        (LifePhase.SERVING, True, None, "no message has come back through the broker yet"),
        (LifePhase.SERVING, False, 100.0, "the broker does not answer"),
        (LifePhase.STARTING, True, 100.0, "starting"),
        (LifePhase.DRAINING, True, 100.0, "draining"),
        (LifePhase.DRAINING, False, None, "draining"),
    ],
)
def test_ready_is_who_serves_and_got_a_message_back_just_now(phase, reachable, proved_at, why) -> None:
    told = explain_unready(phase, now=100.0, broker_reachable=reachable, proved_at=proved_at)
    assert told == why


@given(st.sampled_from(StatusWord), st.text())
def test_a_line_arrives_as_it_was_but_for_white_space_and_length(word: StatusWord, text: str) -> None:
    line = build_status(word, text)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert len(line) <= 512  # PIPE_BUF: written whole or not at all
    decoded = decode_status(line)
    assert decoded is not None
    assert decoded[0] is word
    if len(line) < 400:
        assert decoded[1].split() == text.encode("utf-8", "replace").decode().split()


@pytest.mark.parametrize("line", [b"", b"\n", b"steady\n", b"readyish x\n", b"\xff\xfe\n"])
def test_what_no_release_writes_is_nothing(line: bytes) -> None:
    assert decode_status(line) is None
