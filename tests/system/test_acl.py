"""The broker's user of docs/settings.md: what it may do suffices for all we do, and nothing of it is superfluous.

The line is read from that page itself, so that it cannot go stale there. A broker that enforces it counts which
commands ran, and keeps a list of those that it refused.
"""

import asyncio
import contextlib
import re

import httpx
import pytest
from websockets.sync.client import connect

from channel_layer import ChannelFull, Publisher, RedisChannelLayer, scripts
from channel_layer.broker import Broker
from tests.servers import BrokerServer
from tests.system.processes import ROOT, Command

APP = "tests.system.applications:application"
(ACL_LINE,) = re.findall(r"^user trunkline .*$", (ROOT / "docs" / "settings.md").read_text("utf-8"), re.MULTILINE)
(PASSWORD,) = re.findall(r" >(\S+)", ACL_LINE)
ALLOWED = set(re.findall(r" \+(\S+)", ACL_LINE))
# What redis-py asks for by itself: it tells the broker its version where it may, and does not mind where it may not.
REFUSED_HARMLESSLY = {"client|setinfo"}


@pytest.fixture(params=["valkey", "redis"])
def server(request, tmp_path):
    """A broker that has that user beside its own, which may do everything."""
    path = tmp_path / "users.acl"
    path.write_text(ACL_LINE + "\n")
    program = request.getfixturevalue(f"{request.param}_program")
    with BrokerServer(program, tcp=True, options=("--aclfile", str(path))) as running:
        yield running


def read_until(client, text):
    while client.recv(timeout=60) != text:
        pass


async def use_layers(url):
    """What applications may ask of a layer and the processes above do not need."""
    # Different options make different processes of them.
    layer = RedisChannelLayer(hosts=[url], capacity=2)
    other = RedisChannelLayer(hosts=[url], capacity=3)
    hasty = RedisChannelLayer(hosts=[url], capacity=2, expiry=1)
    for _ in range(2):
        await layer.send("jobs", {"type": "work"})
    with pytest.raises(ChannelFull):
        await layer.send("jobs", {"type": "work"})
    await hasty.send("brief", {"type": "expires"})
    await layer.send("brief", {"type": "work"})
    while True:
        with contextlib.suppress(ChannelFull):  # until the first message has expired and holds no place any more
            await layer.send("brief", {"type": "work"})
            break
    for channel in ("jobs", "jobs", "brief", "brief"):
        assert await layer.receive(channel) == {"type": "work"}
    for channel in ("jobs", await other.new_channel()):
        await layer.group_add("all", channel)
        await layer.group_send("all", {"type": "work"})
        assert await other.receive(channel) == {"type": "work"}
        await layer.group_discard("all", channel)
    await layer.send("jobs", {"type": "work"})
    await layer.flush()


async def return_a_message(url):
    """What a receive() does that is cancelled at the very moment a message comes."""
    broker = Broker(url, client_name="test")
    await broker.connect()
    assert await broker.script(scripts.PUSH_BACK, ["trunkline:1:channel:{jobs}"], [1000, b"a message"]) == 1
    await broker.close()


def commands_run(admin):
    return {name.removeprefix("cmdstat_") for name in admin.info("commandstats")}


@pytest.mark.timeout(180)
def test_the_user_of_the_readme_may_do_what_is_needed_and_no_more(server):
    url = f"redis://trunkline:{PASSWORD}@127.0.0.1:{server.port}"
    with (
        server.client(decode_responses=True) as admin,
        Command("interface", "--port", "0", "--queue-timeout", "10", "--redis", url) as interface,
    ):
        address = interface.wait_for(r"accepts on (http://\S+)").group(1)
        # There is no worker yet: after 2 s the request is looked for in its queue, after 10 s it is removed.
        assert httpx.post(address, timeout=60).status_code == 503
        with Command("worker", APP, "--redis", url) as worker:
            worker.wait_for("runs tests.system")
            assert httpx.post(address, timeout=60).text == "hello"
            with connect(f"{address.replace('http', 'ws')}/member?group=room", open_timeout=60) as client:
                read_until(client, "joined")
                client.send("from a client")
                read_until(client, "from a client")
                with Publisher(url) as publisher:
                    publisher.group_send("room", {"type": "websocket.send", "text": "from a script"})
                read_until(client, "from a script")
                admin.script_flush()
                client.send("when the broker has forgotten the scripts")
                read_until(client, "when the broker has forgotten the scripts")
                run = commands_run(admin)
                # A reader that lost its connection makes sure that nobody reads in its place: CLIENT KILL. The
                # administrator's own does not count.
                with admin.pipeline() as commands:
                    commands.execute_command("CLIENT", "KILL", "TYPE", "normal")
                    commands.config_resetstat()
                    commands.execute()
                client.send("after a reconnect")
                read_until(client, "after a reconnect")
            asyncio.run(use_layers(url))
            asyncio.run(return_a_message(url))
            assert worker.stop() == 0
        assert interface.stop() == 0
        run |= commands_run(admin)
        refused = {entry["object"] for entry in admin.acl_log() if entry["username"] == "trunkline"}
    assert refused <= REFUSED_HARMLESSLY
    assert sorted(ALLOWED - run) == []
