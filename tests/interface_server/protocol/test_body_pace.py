"""What a client may take its time for."""

from interface_server.protocol.body_pace import BodyPace


def test_silence_is_bounded() -> None:
    pace = BodyPace(silence_s=60, rate=64)
    assert pace.wait(100) == 60
    assert pace.wait(110) == 50  # asked again, it is the same silence
    pace.received(64 * 10, 110)
    assert pace.wait(120) == 60
    assert pace.wait(190) == 0


def test_a_client_at_the_rate_may_go_on_for_ever_and_a_slower_one_may_not() -> None:
    for size, lives in ((640, True), (600, False), (1, False)):
        pace, now = BodyPace(silence_s=60, rate=64), 0.0
        for _ in range(200):
            left_s = pace.wait(now)
            assert left_s is not None
            if left_s < 10:
                break
            now += 10
            pace.received(size, now)
        assert (now == 2000) is lives


def test_a_fast_beginning_buys_no_more_than_the_whole_silence() -> None:
    pace = BodyPace(silence_s=60, rate=64)
    pace.wait(0)
    pace.received(10_000_000, 1)
    assert pace.wait(1) == 60


def test_time_in_which_nobody_waits_does_not_count() -> None:
    pace = BodyPace(silence_s=60, rate=64)
    pace.wait(0)
    pace.stop(20)
    assert pace.wait(10_000) == 40


def test_limits_that_are_off() -> None:
    assert BodyPace(silence_s=0, rate=64).wait(5) is None
    pace = BodyPace(silence_s=60, rate=0)
    pace.wait(0)
    pace.received(1, 59)
    assert pace.wait(59) == 60
