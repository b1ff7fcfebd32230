"""How fast a stopping server closes its WebSockets."""

import pytest

from interface_server.closing_pace import CLOSES_PER_S_MIN, ClosingPace


def test_few_are_closed_within_a_moment_however_much_time_there_is():
    pace = ClosingPace(10, 20.0)
    assert pace.due(0.0) == 1
    assert pace.due(10 / CLOSES_PER_S_MIN) == 10
    assert pace.due(20.0) == 10


def test_many_are_spread_evenly_over_most_of_the_time():
    pace = ClosingPace(8000, 20.0)
    assert pace.due(0.0) == 1
    for second in range(1, 16):
        assert pace.due(second) - pace.due(second - 1) == pytest.approx(500, abs=1)
    assert pace.due(15.9) < 8000
    assert pace.due(16.0) == 8000


@pytest.mark.parametrize(("count", "time_s"), [(0, 20.0), (5000, 0.0), (0, 0.0)])
def test_without_time_all_are_due_at_once(count, time_s):
    assert ClosingPace(count, time_s).due(0.0) == count


@pytest.mark.parametrize("count", [1, 7, 501, 20_000])
def test_no_more_and_no_fewer_than_there_are(count):
    pace = ClosingPace(count, 20.0)
    due = [pace.due(step * 0.05) for step in range(401)]
    assert due == sorted(due)
    assert due[-1] == count
