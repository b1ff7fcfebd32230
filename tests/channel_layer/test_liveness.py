"""Who is found dead, who never is: every decision with a clock of the test."""

from __future__ import annotations

import pytest

from channel_layer.liveness import GRACE_S, SILENCE_S, Judgement, Liveness

NOTHING = Judgement([], None, [])


class World:
    """One peer, "w", and a clock; looks every quarter of a second."""

    def __init__(self) -> None:
        self.now = 100.0
        self.heard_at: dict[str, float] = {}
        self.liveness = Liveness(lambda peer: self.heard_at.get(peer, float("-inf")))
        self.inbox_works = True

    def look(self, present: bool = False, *, current: bool = True) -> Judgement:
        judgement = self.liveness.judge(self.now, [("w", present)], inbox_is_current=current)
        if judgement.probe is not None and self.inbox_works:
            self.liveness.probe_returned(judgement.probe)
        return judgement

    def look_for(self, seconds: float, present: bool = False, *, current: bool = True) -> float | None:
        """Look again and again; return when it was found dead."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.25
            if self.look(present, current=current).dead:
                return self.now
        return None


@pytest.fixture
def world() -> World:
    return World()


def test_a_peer_with_a_lease_is_left_alone(world: World) -> None:
    for _ in range(20):
        world.now += 1
        assert world.look(present=True) == NOTHING
    assert not world.liveness.has_suspects


def test_a_missing_lease_is_a_suspicion_then_a_death(world: World) -> None:
    suspected_at = world.now
    assert world.look() == Judgement(["w"], 1, [])
    assert world.liveness.has_suspects
    died_at = world.look_for(60)
    assert died_at is not None
    assert SILENCE_S <= died_at - suspected_at <= SILENCE_S + 0.5
    assert not world.liveness.has_suspects
    assert world.liveness.statistics().dead_count == 1


def test_it_is_pinged_once_and_probed_each_time(world: World) -> None:
    judgements = [world.look()]
    for _ in range(4):
        world.now += 0.25
        judgements.append(world.look())
    assert [judgement.ping for judgement in judgements] == [["w"], [], [], [], []]
    assert [judgement.probe for judgement in judgements] == [1, 2, 3, 4, 5]


def test_a_blob_clears_it_and_the_next_look_suspects_it_again(world: World) -> None:
    world.look()
    world.now += 0.25
    world.heard_at["w"] = world.now
    assert world.look() == NOTHING
    assert world.liveness.statistics().cleared_count == 1
    world.now += 0.25
    assert world.look().ping == ["w"]


def test_a_blob_from_before_the_ping_does_not_clear_it(world: World) -> None:
    world.heard_at["w"] = world.now
    world.look()
    assert world.look_for(3) is not None


def test_a_lease_that_is_back_clears_it(world: World) -> None:
    world.look()
    world.now += 10
    assert world.look(present=True) == NOTHING
    assert not world.liveness.has_suspects


def test_nobody_dies_while_our_own_inbox_stands_still(world: World) -> None:
    world.inbox_works = False
    world.look()
    assert world.look_for(60) is None
    world.inbox_works = True
    assert world.look_for(1) is not None


def test_a_probe_from_before_the_silence_proves_nothing(world: World) -> None:
    world.inbox_works = False
    first = world.look().probe
    assert first is not None
    world.now += 10
    world.liveness.probe_returned(first)
    assert not world.look().dead


def test_a_probe_nobody_sent_proves_nothing(world: World) -> None:
    world.inbox_works = False
    world.look()
    world.now += 10
    world.liveness.probe_returned(77)
    assert not world.look().dead


def test_nobody_dies_while_blobs_wait_unread(world: World) -> None:
    world.look()
    assert world.look_for(10, current=False) is None
    assert world.look_for(1) is not None


def test_nobody_is_judged_while_the_broker_is_away_and_in_the_grace_after_it(world: World) -> None:
    world.look()
    world.liveness.broker_lost()
    assert not world.liveness.is_judging(world.now)
    assert world.look_for(100) is None
    restored_at = world.now
    world.liveness.broker_restored(world.now)
    died_at = world.look_for(60)
    assert died_at is not None
    # The suspicion from before does not count: it begins anew after the grace.
    assert died_at - restored_at >= GRACE_S + SILENCE_S


def test_a_peer_that_renews_within_the_grace_is_never_suspected(world: World) -> None:
    world.liveness.broker_lost()
    world.liveness.broker_restored(world.now)
    assert world.look_for(GRACE_S - 0.3) is None
    assert world.look_for(10, present=True) is None
    assert world.liveness.statistics().suspected_count == 0


def test_peers_without_a_link_are_forgotten(world: World) -> None:
    world.look()
    world.liveness.keep_only([])
    assert not world.liveness.has_suspects
    world.look()
    world.liveness.forget("w")
    world.liveness.forget("unknown")
    assert not world.liveness.has_suspects


def test_peers_are_judged_each_for_itself(world: World) -> None:
    died_at: dict[str, float] = {}
    silent_from = {"w": 100.0, "x": 103.0, "y": 999.0}
    while world.now < 110:
        leases = [(peer, world.now < since) for peer, since in silent_from.items() if peer not in died_at]
        judgement = world.liveness.judge(world.now, leases)
        if judgement.probe is not None:
            world.liveness.probe_returned(judgement.probe)
        died_at |= dict.fromkeys(judgement.dead, world.now)
        world.now += 0.25
    assert died_at.keys() == {"w", "x"}
    for peer, at in died_at.items():
        assert SILENCE_S <= at - silent_from[peer] <= SILENCE_S + 0.5


def test_probes_that_never_come_back_do_not_pile_up(world: World) -> None:
    world.inbox_works = False
    world.look()
    world.look_for(200)
    assert len(world.liveness._probes) <= 64


def test_repr(world: World) -> None:
    world.look()
    assert repr(world.liveness) == "<Liveness suspects=['w']>"
    world.liveness.broker_lost()
    assert repr(world.liveness) == "<Liveness suspects=[] broker away>"


def test_a_death_that_was_told_waits_for_no_silence_only_for_what_was_said_before(world: World) -> None:
    def look(**options: bool) -> Judgement:
        return world.liveness.judge(world.now, [("w", False)], told_dead={"w"}, **options)

    judgement = look()
    assert judgement == Judgement(["w"], 1, [])
    world.now += 0.01
    assert look().dead == []  # the probe has not come back: what it said last may wait in our inbox
    world.liveness.probe_returned(1)
    assert look(inbox_is_current=False).dead == []
    assert look() == Judgement([], None, ["w"])


def test_a_death_that_was_told_of_a_process_that_speaks_is_not_believed(world: World) -> None:
    judgement = world.liveness.judge(world.now, [("w", False)], told_dead={"w"})
    assert judgement.probe is not None
    world.heard_at["w"] = world.now + 0.005
    world.liveness.probe_returned(judgement.probe)
    world.now += 0.01
    assert world.liveness.judge(world.now, [("w", False)], told_dead={"w"}) == NOTHING
    assert world.liveness.statistics().cleared_count == 1


def test_no_death_is_believed_while_the_broker_is_away_and_in_the_grace_after_it(world: World) -> None:
    world.liveness.broker_lost()
    assert world.liveness.judge(world.now, [("w", False)], told_dead={"w"}) == NOTHING
    world.liveness.broker_restored(world.now)
    world.now += GRACE_S - 0.1
    assert world.liveness.judge(world.now, [("w", False)], told_dead={"w"}) == NOTHING
