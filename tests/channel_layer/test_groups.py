"""Memberships and the registration of a process, with a broker of the test (test_process_layer.py has a real one)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from channel_layer import scripts
from channel_layer.errors import BrokerError, BrokerUnavailable
from channel_layer.groups import Groups
from channel_layer.names import Keys
from tests.channel_layer.processes import until


class Registry:
    """Holds the sorted sets of groups; answers at once, or when told to."""

    def __init__(self) -> None:
        self.reachable = True
        self.is_slow = False
        self.commands: list[tuple[str, str]] = []  # "register" or "remove", and the group
        self.sets: dict[str, set[str]] = {}
        self.unanswered: list[asyncio.Future[Any]] = []
        self.refusal: Exception | None = None

    def shard_of(self, key: str) -> Registry:
        return self  # there is one

    def script(self, script: scripts.Script, keys: Any, args: Any) -> asyncio.Future[Any]:
        assert script is scripts.GROUP_REGISTER
        assert args == ["w1", 60_000]
        group = keys[0].partition("{")[2][:-1]
        return self._run("register", group)

    def call(self, *args: Any) -> asyncio.Future[Any]:
        assert (args[0], args[2]) == ("ZREM", "w1")
        return self._run("remove", args[1].partition("{")[2][:-1])

    def _run(self, what: str, group: str) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self.reachable:
            future.set_exception(BrokerUnavailable("away"))
            return future
        self.commands.append((what, group))
        if self.refusal is not None:
            future.set_exception(self.refusal)
            return future
        if what == "register":
            self.sets.setdefault(group, set()).add("w1")
        else:
            self.sets.get(group, set()).discard("w1")
        if self.is_slow:
            self.unanswered.append(future)
        else:
            future.set_result(1)
        return future

    def lose(self) -> None:
        self.reachable = False
        for future in self.unanswered:
            if not future.done():
                future.set_exception(BrokerUnavailable("lost"))
        self.unanswered.clear()


@pytest.fixture
async def registry() -> Registry:
    return Registry()


@pytest.fixture
async def groups(registry: Registry) -> Groups:
    broker: Any = registry
    return Groups(process_id="w1", keys=Keys(), broker=broker, loop=asyncio.get_running_loop())


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_members_stand_in_the_order_of_joining(groups: Groups) -> None:
    for channel in "cab":
        await groups.add_and_wait("room", f"x.w1!{channel}", 1.0)
    await groups.add_and_wait("room", "x.w1!c", 1.0)
    assert groups.members("room") == ("x.w1!c", "x.w1!a", "x.w1!b")
    groups.discard("room", "x.w1!a")
    assert groups.members("room") == ("x.w1!c", "x.w1!b")
    assert groups.members("other") == ()


async def test_only_the_first_member_registers_and_the_last_one_removes(groups: Groups, registry: Registry) -> None:
    await groups.add_and_wait("room", "x.w1!a", 1.0)
    await groups.add_and_wait("room", "x.w1!b", 1.0)
    assert registry.commands == [("register", "room")]
    groups.discard("room", "x.w1!a")
    groups.discard("room", "x.w1!a")
    groups.discard("other", "x.w1!a")
    assert registry.commands == [("register", "room")]
    groups.discard("room", "x.w1!b")
    assert registry.commands == [("register", "room"), ("remove", "room")]
    assert groups.statistics().groups == groups.statistics().members == 0


async def test_a_second_add_waits_for_the_first_registration(groups: Groups, registry: Registry) -> None:
    registry.is_slow = True
    first = asyncio.create_task(groups.add_and_wait("room", "x.w1!a", 5.0))
    second = asyncio.create_task(groups.add_and_wait("room", "x.w1!b", 5.0))
    await turns()
    assert len(registry.commands) == 1
    assert not first.done()
    assert not second.done()
    assert groups.members("room") == ("x.w1!a", "x.w1!b")  # it is reached as soon as anybody can know
    registry.unanswered[0].set_result(1)
    await asyncio.gather(first, second)


async def test_a_member_that_joins_behind_the_last_one_is_registered_in_the_end(
    groups: Groups, registry: Registry
) -> None:
    registry.is_slow = True
    calls = []
    for _ in range(5):
        calls.append(asyncio.create_task(groups.add_and_wait("room", "x.w1!a", 5.0)))
        await turns()
        groups.discard("room", "x.w1!a")
    calls.append(asyncio.create_task(groups.add_and_wait("room", "x.w1!a", 5.0)))
    await turns()
    assert registry.commands == [("register", "room"), ("remove", "room")] * 5 + [("register", "room")]
    for future in registry.unanswered:
        future.set_result(1)
    await asyncio.gather(*calls)
    assert registry.sets["room"] == {"w1"}


async def test_forgotten_channels_leave_all_their_groups(groups: Groups, registry: Registry) -> None:
    for channel in "ab":
        for group in ("one", "two"):
            await groups.add_and_wait(group, channel, 1.0)
    groups.forget(["a", "unknown"])
    assert groups.members("one") == groups.members("two") == ("b",)
    groups.forget(["b"])
    assert registry.sets == {"one": set(), "two": set()}
    assert repr(groups) == "<Groups of w1: 0 groups, 0 channels>"


async def test_an_add_during_an_outage_is_registered_when_it_is_over(groups: Groups, registry: Registry) -> None:
    registry.reachable = False
    adding = asyncio.create_task(groups.add_and_wait("room", "x.w1!a", 5.0))
    await turns()
    assert not adding.done()
    registry.reachable = True
    groups.broker_restored()
    await adding
    assert registry.sets["room"] == {"w1"}


async def test_an_add_whose_answer_was_lost_is_registered_again(groups: Groups, registry: Registry) -> None:
    registry.is_slow = True
    adding = asyncio.create_task(groups.add_and_wait("room", "x.w1!a", 5.0))
    await turns()
    registry.lose()
    registry.is_slow = False
    await turns()
    assert not adding.done()
    registry.reachable = True
    groups.broker_restored()
    await adding
    assert registry.commands == [("register", "room")] * 2


async def test_an_add_that_was_refused_for_overload_is_tried_again(groups: Groups, registry: Registry) -> None:
    registry.refusal = BrokerUnavailable("overloaded")
    adding = asyncio.create_task(groups.add_and_wait("room", "x.w1!a", 5.0))
    await turns()
    registry.refusal = None
    groups.retry()
    await adding
    groups.retry()
    assert registry.commands == [("register", "room")] * 2


async def test_an_add_that_waits_too_long_takes_its_membership_back(groups: Groups, registry: Registry) -> None:
    registry.reachable = False
    with pytest.raises(BrokerUnavailable, match="was not added to room"):
        await groups.add_and_wait("room", "x.w1!a", 0.01)
    assert groups.members("room") == ()


async def test_an_add_the_broker_refuses_takes_its_membership_back(groups: Groups, registry: Registry) -> None:
    registry.refusal = BrokerError("NOPERM")
    with pytest.raises(BrokerError, match="NOPERM"):
        await groups.add_and_wait("room", "x.w1!a", 1.0)
    assert groups.members("room") == ()
    assert groups.statistics().failed_count == 1


async def test_an_add_that_waits_too_long_leaves_the_membership_to_another_that_waits(
    groups: Groups, registry: Registry
) -> None:
    registry.is_slow = True
    first = asyncio.create_task(groups.add_and_wait("room", "x.w1!a", 0.01))
    await asyncio.sleep(0)
    second = asyncio.create_task(groups.add_and_wait("room", "x.w1!a", 60.0))
    with pytest.raises(BrokerUnavailable, match="was not added to room"):
        await first
    registry.unanswered[0].set_result(1)
    await second
    assert groups.members("room") == ("x.w1!a",)
    assert registry.commands == [("register", "room")]


async def test_the_last_of_several_adds_that_wait_too_long_takes_the_membership_back(
    groups: Groups, registry: Registry
) -> None:
    registry.reachable = False
    adding = [asyncio.create_task(groups.add_and_wait("room", "x.w1!a", 0.01)) for _ in range(2)]
    await asyncio.wait(adding)
    assert [type(each.exception()) for each in adding] == [BrokerUnavailable] * 2
    assert groups.members("room") == ()


async def test_a_refusal_ends_only_memberships_that_it_was_the_answer_to(groups: Groups, registry: Registry) -> None:
    await groups.add_and_wait("room", "x.w1!a", 1.0)
    registry.refusal = BrokerError("NOPERM")
    groups.broker_restored()
    told: list[Exception | None] = []
    groups.add("room", "x.w1!a", told.append)
    groups.add("room", "x.w1!b", told.append)  # as another process asks for it
    await until(lambda: len(told) == 2)
    assert told == [registry.refusal] * 2
    assert groups.members("room") == ("x.w1!a",)


async def test_after_lost_data_everything_is_registered_and_adds_wait_for_it(
    groups: Groups, registry: Registry
) -> None:
    names = [f"group-{number}" for number in range(1200)]  # more than a portion
    for name in names:
        await groups.add_and_wait(name, "x.w1!a", 1.0)
    registry.sets.clear()
    registry.commands.clear()
    groups.broker_restored()
    assert groups.statistics().unregistered == 1200
    await groups.add_and_wait(names[-1], "x.w1!b", 1.0)
    assert registry.sets[names[-1]] == {"w1"}
    await until(lambda: not groups.statistics().unregistered)
    assert set(registry.sets) == set(names)


async def test_groups_left_during_an_outage_are_removed_after_it(groups: Groups, registry: Registry) -> None:
    await groups.add_and_wait("left", "x.w1!a", 1.0)
    await groups.add_and_wait("again", "x.w1!a", 1.0)
    registry.lose()
    groups.forget(["x.w1!a"])
    await turns()
    groups.add("again", "x.w1!a", lambda error: None)
    registry.reachable = True
    groups.broker_restored()
    await turns()
    assert registry.sets == {"left": set(), "again": {"w1"}}


async def test_thousands_of_groups_are_left_in_portions(groups: Groups, registry: Registry) -> None:
    """Or the pushes of the same moment would be refused because too many commands are unanswered."""
    for number in range(1200):
        groups.add(f"group-{number}", f"x.w1!{number}", lambda error: None)
    await turns()
    registry.is_slow = True
    registry.commands.clear()
    groups.forget([f"x.w1!{number}" for number in range(1200)])
    await turns()
    assert len(registry.commands) == 500
    registry.is_slow = False
    groups.add("group-1100", "x.w1!new", lambda error: None)  # while its removal waits
    for future in registry.unanswered:
        future.set_result(1)
    await until(lambda: sum(map(len, registry.sets.values())) == 1)
    assert registry.sets["group-1100"] == {"w1"}
    assert len(registry.commands) == 1200


async def test_an_outage_stops_the_renewal_and_its_end_begins_it_anew(groups: Groups, registry: Registry) -> None:
    for number in range(600):
        groups.add(f"group-{number}", "x.w1!a", lambda error: None)
    registry.is_slow = True
    registry.commands.clear()
    groups.renew()
    await turns()
    assert len(registry.commands) == 500
    groups.renew()  # one at a time
    await turns()
    assert len(registry.commands) == 500
    registry.lose()
    await turns()
    registry.reachable, registry.is_slow = True, False
    groups.broker_restored()
    await until(lambda: not groups.statistics().unregistered)
    assert len(registry.commands) == 1100


async def test_close_leaves_all_groups(groups: Groups, registry: Registry) -> None:
    for number in range(3):
        groups.add(f"group-{number}", "x.w1!a", lambda error: None)
    await turns()
    await groups.close()
    assert all(members == set() for members in registry.sets.values())
    assert groups.members("group-0") == ()


async def test_close_without_a_broker_does_not_wait(groups: Groups, registry: Registry) -> None:
    groups.add("room", "x.w1!a", lambda error: None)
    registry.lose()
    await groups.close()
