"""The channel layer of one process on a broker: what belongs together, put together, on one loop.

Lives here: which way a message, a frame or a letter goes, what happens when the broker goes and comes back, and the
start and the end of it all. Does not live here: each part's own work.

    send, receive --> inbox.ListWriter, local_channels, normal_channels      group_* --> groups, group_sender,
    inbox.InboxReader --blobs--> links --frames--> here --> listener                     group_requests
                      +-letters--> here --> groups, local_channels or the owner's delivery
    leases + peer_watch: this process lives; who of the others does

The methods of the public API (base.ChannelLayer) may be called from any loop and thread: they cross over to this
layer's loop. Everything else is for that loop only. A process of the role ``client`` has no links, and reads an inbox
only once it has a channel to read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from channel_layer import mail, scripts
from channel_layer.base import LocalDelivery, Message, ProcessListener, Stored
from channel_layer.broker import Broker, BrokerChange, BrokerShard, BrokerStatistics
from channel_layer.broker_connection import BrokerNotServing
from channel_layer.broker_url import parse_broker_urls
from channel_layer.capacity import Capacities
from channel_layer.channels_compat import ChannelsBackend
from channel_layer.codec import decode_event, encode_message
from channel_layer.crossing import call_on
from channel_layer.encryption import Cipher, Refused, Undecryptable, build_refusal
from channel_layer.errors import BrokerUnavailable, ChannelFull, InvalidName, MessageTooLarge, WireError
from channel_layer.frames import WIRE_VERSION, WIRE_VERSION_PREVIOUS, Frame, FrameKind, build_group_answer
from channel_layer.group_requests import GroupRequests
from channel_layer.group_sender import OUTAGE_WAIT_S, GroupSender, GroupSenderStatistics
from channel_layer.groups import RENEWAL_INTERVAL_S, Groups, GroupsStatistics
from channel_layer.inbox import InboxReader, InboxStatistics, ListWriter, WriterStatistics
from channel_layer.lease_connection import LeaseConnection
from channel_layer.leases import Lease, LeaseKeeper, encode_lease
from channel_layer.link import AWAY
from channel_layer.links import Links, LinksStatistics
from channel_layer.liveness import LivenessStatistics
from channel_layer.local_channels import LocalChannels, LocalChannelsStatistics
from channel_layer.mail import LetterKind
from channel_layer.messages import (
    CAPACITY_DEFAULT,
    EXPIRY_DEFAULT_S,
    GROUP_EXPIRY_DEFAULT_S,
    DecodedMessage,
    check_seconds,
    split_element,
)
from channel_layer.names import (
    NORMAL_MEMBER_MARK,
    Keys,
    Role,
    check_channel_name,
    check_group_name,
    is_linked,
    new_process_id,
    non_local_name,
    process_of,
)
from channel_layer.normal_channels import NormalChannels, NormalChannelsStatistics
from channel_layer.peer_watch import PeerWatch

__all__ = ["RedisProcessLayer", "RedisProcessLayerStatistics"]

logger = logging.getLogger("trunkline.channel_layer")

T = TypeVar("T")

# Openings that wait for a worker, per channel; one more is refused (ChannelFull), and its client gets 503.
OPENING_CAPACITY_DEFAULT: Final = 4096
# A little longer than the interface server waits, so that it removes an opening before the broker's clock does.
OPENING_EXPIRY_DEFAULT_S: Final = 35.0
# A link's list outlives a loop that is blocked as long as a supervisor allows; what is lost is sent again.
_LINK_EXPIRY_MS: Final = 60_000
# Messages to groups are dropped for a peer while more than this waits for it: twice what makes senders that can wait
# do so (LinkSettings.congested_bytes).
_GROUP_LINK_BYTES_MAX: Final = 16 * 1024 * 1024
# How often what has no event is looked at, where no links set another pace (peer_watch.py).
_LOOK_INTERVAL_S: Final = 0.5
_SWEEP_INTERVAL_S: Final = 5.0
_LEAVE_TIMEOUT_S: Final = 2.0
# Frames that are ours; the listener gets all others. Plain ints: most frames pass here, and comparing enums costs.
_GROUP_FRAMES: Final = frozenset(
    map(int, (FrameKind.GROUP_SEND, FrameKind.GROUP_ADD, FrameKind.GROUP_DISCARD, FrameKind.GROUP_ANSWER))
)
# To tell one interface server that openings are held; a renewal of the lease waits for it.
_TELL_TIMEOUT_S: Final = 0.25
_UNDECRYPTABLE_LOG_INTERVAL_S: Final = 1.0
# In front of the name of a channel that is read for its openings; no name begins with it.
_OPENINGS_MARK: Final = "@"
# Keys deleted at once by flush(), and keys that one SCAN looks at.
_FLUSH_PORTION: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisProcessLayerStatistics:
    """What a process's layer holds and has done. The parts are those of the modules of their names."""

    process_id: str
    broker: BrokerStatistics
    writer: WriterStatistics
    inbox: InboxStatistics | None  # None: not read (yet)
    links: LinksStatistics | None  # None: a client
    normal_channels: NormalChannelsStatistics
    local_channels: LocalChannelsStatistics
    groups: GroupsStatistics
    group_sender: GroupSenderStatistics
    group_requests_waiting: int
    liveness: LivenessStatistics
    peers_dead: int  # remembered
    absence_count: int  # how often this process found that it was away longer than its lease
    letter_expired_count: int
    letter_unknown_count: int  # of kinds that this release does not know
    malformed_count: int
    undecryptable_count: int  # messages, openings, letters and blobs that none of our keys decrypts


class _Parts:
    """What exists while the layer is connected."""

    def __init__(
        self,
        *,
        loop: asyncio.AbstractEventLoop,
        listener: ProcessListener | None,
        delivery: LocalDelivery | None,
        writer: ListWriter,
        local: LocalChannels,
        normal: NormalChannels,
        groups: Groups,
        sender: GroupSender,
        requests: GroupRequests,
        links: Links | None,
        watch: PeerWatch | None,
    ) -> None:
        self.loop = loop
        self.listener = listener
        self.delivery = delivery
        self.writer = writer
        self.local = local
        self.normal = normal
        self.groups = groups
        self.sender = sender
        self.requests = requests
        self.links = links
        self.watch = watch  # None: a client, without links
        self.inbox: InboxReader | None = None  # None: a client without a channel of its own
        self.lease: LeaseKeeper | None = None
        self.housekeeping: asyncio.Task[None] | None = None


class RedisProcessLayer(ChannelsBackend):
    """Implements base.ProcessLayer. ``process_id`` is known, and names may be made, before start()."""

    ChannelFull = ChannelFull
    MessageTooLarge = MessageTooLarge

    def __init__(
        self,
        url: str,
        prefix: str = "trunkline",
        role: Role = "client",
        *,
        expiry: float = EXPIRY_DEFAULT_S,
        group_expiry: float = GROUP_EXPIRY_DEFAULT_S,
        capacity: int = CAPACITY_DEFAULT,
        channel_capacity: Mapping[Any, int] | None = None,
        opening_capacity: int = OPENING_CAPACITY_DEFAULT,
        opening_expiry_s: float = OPENING_EXPIRY_DEFAULT_S,
        outage_wait_s: float = OUTAGE_WAIT_S,
        cipher: Cipher | None = None,
        notices: tuple[str | None, str | None] = (None, None),
        version: str = "",
        wire_version: int = WIRE_VERSION,
    ) -> None:
        """Raises ValueError and TypeError for what no layer can be made of; the text names it.

        ``group_expiry`` ends memberships of normal channels only: others end with their process. ``outage_wait_s``
        is how long send(), group_send() and group_add() wait for a broker that is away. ``cipher`` has the
        keys of every process of the deployment; without, nothing is encrypted. ``notices``: see announce_outages().
        ``wire_version`` is the one for openings to be written in; up to that one they are read.
        """
        self.extensions = ["groups", "flush"]
        self.url = url
        self.role: Role = role
        self.expiry = check_seconds("expiry", expiry)
        self.group_expiry = check_seconds("group_expiry", group_expiry)
        self._capacities = Capacities(capacity, channel_capacity)
        self._expiry_ms = int(self.expiry * 1000)
        self._opening_capacity = opening_capacity
        self._opening_expiry_ms = int(opening_expiry_s * 1000)
        self._outage_wait_s = outage_wait_s
        self._version = version
        self._wire_version = wire_version
        self.keys = Keys(prefix)
        self.cipher = cipher if cipher is not None else Cipher()
        self._notices = {notices} - {(None, None)}  # a few: one for each layer of an application that asks for others
        self.process_id = new_process_id(role)
        # What the application's side knows, set by the worker: the epoch of the connection behind a reply channel,
        # for the fence of its GROUP_ADD. 0 is not fenced.
        self.epoch_of: Callable[[str], int] = lambda channel: 0
        # What the listener's side knows, set by the interface server: whether a channel of this process lives, under
        # this epoch (0: any). For one that does not, group_add is a no-op and leaves nothing behind.
        self.owns_channel: Callable[[str, int], bool] = lambda channel, epoch: True
        # What the listener's side knows, set by the worker: (interface server, number, epoch) of openings that it
        # took and cannot claim, for the first turn of an application blocks its loop. Asked on the lease's thread.
        self.stalled_openings: Callable[[], Collection[tuple[str, int, int]]] = tuple
        # What the listener's side does, set by the interface server: wait longer for the claims of these openings,
        # number and epoch of each in turn.
        self.openings_held: Callable[[Sequence[int]], None] = lambda openings: None
        self._broker = Broker(url, client_name=f"trunkline:{self.process_id}", generation_key=self.keys.generation)
        self._inbox_key = self.keys.mail(self.process_id)  # where that is, there is all of the inbox
        self._parts: _Parts | None = None  # present from start() to stop()
        # When the newest message to ourselves left that has come back (probe()); None: none has yet.
        self.proved_at: float | None = None
        self._away: set[BrokerShard] = set()  # as far as everybody was told
        self._told_reachable = True  # what the listener was told of our inbox
        # Channels that were told that a shard went, until all are back: those read, or in groups, at that time.
        self._told_of_outage: dict[str, None] = {}
        self._absence_count = 0
        self._absences_seen = 0
        self._letter_expired_count = 0
        self._letter_unknown_count = 0
        self._malformed_count = 0
        self._undecryptable_count = 0
        self._undecryptable_logged_at = float("-inf")

    def __repr__(self) -> str:
        state = "started" if self._parts is not None else "not started"
        return f"<RedisProcessLayer {self.process_id} {state} {self._broker!r}>"

    @property
    def prefix(self) -> str:
        return self.keys.prefix

    def adopt_capacities(self, capacities: Capacities) -> None:
        """Hold channels to these from now on: what an application has configured."""
        self._capacities.adopt(capacities)

    @property
    def broker_reachable(self) -> bool:
        """True while our own inbox can be reached; others' and channels may be elsewhere (see broker.py)."""
        return self._broker.shard_of(self._inbox_key).reachable

    def peer_is_reachable(self, peer: str) -> bool:
        """False while what we send to ``peer``, or what it answers, may be held up by the broker."""
        inboxes = self._broker.shard_of(self._inbox_key), self._broker.shard_of(self.keys.mail(peer))
        return not any(shard.is_suspicious for shard in inboxes)

    def linked_processes(self) -> list[str]:
        """The processes that this one has a link with: those it has exchanged anything with, and that live."""
        parts = self._parts
        return [] if parts is None or parts.links is None else parts.links.peers()

    def statistics(self) -> RedisProcessLayerStatistics:
        """Return what every part holds and has counted. Raises RuntimeError while the layer is not started."""
        parts = self._started()
        return RedisProcessLayerStatistics(
            process_id=self.process_id,
            broker=self._broker.statistics(),
            writer=parts.writer.statistics(),
            inbox=None if parts.inbox is None else parts.inbox.statistics(),
            links=None if parts.links is None else parts.links.statistics(),
            normal_channels=parts.normal.statistics(),
            local_channels=parts.local.statistics(),
            groups=parts.groups.statistics(),
            group_sender=parts.sender.statistics(),
            group_requests_waiting=parts.requests.waiting,
            liveness=LivenessStatistics.none() if parts.watch is None else parts.watch.statistics(),
            peers_dead=0 if parts.watch is None else parts.watch.dead_count,
            absence_count=self._absence_count,
            letter_expired_count=self._letter_expired_count,
            letter_unknown_count=self._letter_unknown_count,
            malformed_count=self._malformed_count,
            undecryptable_count=self._undecryptable_count,
        )

    # Start and end

    async def start(self, listener: ProcessListener | None = None, delivery: LocalDelivery | None = None) -> None:
        """Connect, take up the lease and read the inbox; see base.ProcessLayer. A client needs no listener."""
        if self._parts is not None:
            raise RuntimeError(f"{self!r} was started before")
        if self.role != "client" and listener is None:
            raise TypeError(f"a process of the role {self.role} needs a listener: its links speak to it")
        await self._broker.connect()
        loop = asyncio.get_running_loop()
        writer = ListWriter(self._broker, loop, self.cipher)
        groups = Groups(process_id=self.process_id, keys=self.keys, broker=self._broker, loop=loop)
        links: Links | None = None
        watch: PeerWatch | None = None
        if self.role != "client" and listener is not None:
            links = Links(
                process_id=self.process_id,
                push=self._push_blobs,
                pushed=self._broker.flush,
                frame_received=self._frame_received,
                peer_ended=self._peer_ended,
                peer_ready=listener.peer_ready,
                loop=loop,
                is_away=lambda peer: not self._broker.shard_of(self.keys.link(peer)).reachable,
            )
            watch = PeerWatch(
                process_id=self.process_id,
                keys=self.keys,
                broker=self._broker,
                links=links,
                loop=loop,
                push_probe=self._push_probe,
                inbox_is_current=self._inbox_is_current,
                lease_renewed=self._lease_renewed,
            )
        self._parts = _Parts(
            loop=loop,
            listener=listener,
            delivery=delivery,
            writer=writer,
            local=LocalChannels(
                capacities=self._capacities, expiry_s=self.expiry, loop=loop, abandoned=self._abandoned
            ),
            normal=NormalChannels(self._broker, loop, keys_of=self._keys_to_read, expiry_s=self.expiry),
            groups=groups,
            sender=GroupSender(
                process_id=self.process_id,
                keys=self.keys,
                broker=self._broker,
                writer=writer,
                loop=loop,
                expiry_s=self.expiry,
                capacities=self._capacities,
                members=groups.members,
                deliver=self._deliver,
                link_send=None if links is None else self._link_send_to_group,
                linked=tuple if links is None else links.peers,
                outage_wait_s=self._outage_wait_s,
            ),
            requests=GroupRequests(
                process_id=self.process_id,
                keys=self.keys,
                broker=self._broker,
                writer=writer,
                loop=loop,
                expiry_s=self.expiry,
                link_send=None if links is None else links.send,
            ),
            links=links,
            watch=watch,
        )
        self._away = {shard for shard in self._broker.shards if not shard.reachable}
        self._told_reachable = True
        self._told_of_outage = {}
        self._broker.subscribe(self._broker_changed)
        if self.role != "client":
            self._open_inbox(self._parts)
        self._parts.housekeeping = loop.create_task(self._keep_house(self._parts))

    async def settle(self, timeout_s: float) -> None:
        """Wait until the peers have all that was sent to them, or ``timeout_s`` is over. Before stop().

        What they do not have when the process ends is lost with it: stop() is no time to wait for a broker that is
        away just then.
        """
        links = self._started().links
        if links is not None:
            await links.settle(timeout_s)

    async def stop(self) -> None:
        """Leave: goodbye on every link (2 s at most), out of all groups; drop lease and inbox, disconnect."""
        parts = self._parts
        if parts is None:
            return
        if parts.links is not None:
            await parts.links.leave(_LEAVE_TIMEOUT_S)
        self._parts = None
        if parts.housekeeping is not None:
            parts.housekeeping.cancel()
            await asyncio.wait((parts.housekeeping,))
        if parts.watch is not None:
            await parts.watch.close()
        await parts.sender.close()
        await parts.groups.close()
        if parts.inbox is not None:
            await parts.inbox.stop()
        await parts.normal.close()
        parts.local.close()
        if parts.lease is not None:
            # Not in the loop's own pool: the application may have filled that with calls that never end.
            executor = ThreadPoolExecutor(1, "lease stop")
            try:
                await parts.loop.run_in_executor(executor, parts.lease.stop)
            except RuntimeError:
                parts.lease.stop()  # the interpreter is shutting down and starts no threads: nobody minds the wait
            finally:
                executor.shutdown(wait=False)
            if self.broker_reachable:
                # What is still in the inbox was for a process that is no more.
                inbox = (self.keys.link(self.process_id), self.keys.mail(self.process_id))
                await asyncio.gather(*[self._broker.call("DEL", key) for key in inbox], return_exceptions=True)
        await self._broker.close()

    def set_load(self, load: int, room: int) -> None:
        """Say in the lease how much this process runs, of how much it has room for."""
        lease = self._started().lease
        if lease is not None:
            lease.update(encode_lease(Lease(role=self.role, version=self._version, load=load, room=room)))

    def probe(self) -> None:
        """Send a message to ourselves through the broker; ``proved_at`` tells when one left that has come back.

        For health checks: whoever gets its own messages gets those of others. Does nothing while the broker is away.
        """
        parts = self._parts
        if parts is not None and parts.inbox is not None and self.broker_reachable:
            # Its time is in its token; below 0, where liveness.py has none.
            self._push_probe(-int(parts.loop.time() * 1000))

    def _push_probe(self, token: int) -> None:
        parts = self._parts
        if parts is not None:
            parts.writer.push_unasked(
                self._inbox_key,
                mail.build_probe(token),
                capacity=-1,  # never refused: a full mail is no reason to think that others are dead
                expiry_ms=self._expiry_ms,
            )

    def _started(self) -> _Parts:
        parts = self._parts
        if parts is None:
            raise RuntimeError(f"{self!r}: the channel layer is used before start() or after stop()")
        return parts

    def _open_inbox(self, parts: _Parts) -> None:
        """Read the inbox, and hold the lease that says somebody does."""
        if parts.inbox is not None:
            return
        links = parts.links
        parts.inbox = InboxReader(
            self._broker.open_reader(),
            link_key=self.keys.link(self.process_id),
            mail_key=self.keys.mail(self.process_id),
            blob_received=_refuse_blob if links is None else self._blob_received,
            letter_received=self._letter_received,
            reader_restored=_nothing if links is None else links.reader_restored,
        )
        parts.inbox.start()
        parts.lease = LeaseKeeper(
            self.url,
            self.keys.lease(self.process_id),
            encode_lease(Lease(role=self.role, version=self._version)),
            each_period=self._tell_stalled,
            on_absence=lambda: self._look_for_own_absence(parts),
        )
        # Here, too, and not only from the thread, which has a connection of its own and is later: whoever hears of
        # this process from what it says next finds it alive. If this fails, the thread goes on trying.
        self._broker.call(*parts.lease.renewal()).add_done_callback(_ignore_failure)
        parts.lease.start()

    # The public API, from any loop

    async def send(self, channel: str, message: Message) -> None:
        """See base.ChannelLayer. While the broker is away it waits, 10 s at most."""
        check_channel_name(channel)
        encoded = encode_message(message)
        parts = self._started()
        if asyncio.get_running_loop() is parts.loop:
            await self._send(parts, channel, encoded)
        else:
            await call_on(parts.loop, lambda: self._send(parts, channel, encoded))

    async def receive(self, channel: str) -> DecodedMessage:
        """See base.ChannelLayer. Waits through outages of the broker. A local channel must be of this process."""
        known = self._parts
        if (
            known is not None
            and type(channel) is str
            and known.local.is_known(channel)
            and asyncio.get_running_loop() is known.loop
        ):
            # The short way of a consumer that comes again.
            try:
                return decode_event(await known.local.receive(channel))
            except WireError:
                self._malformed_count += 1
                logger.exception("a message of channel %s was dropped", channel)
        check_channel_name(channel)
        parts = self._started()
        process = process_of(channel)
        if process is not None and process != self.process_id:
            raise InvalidName(
                f"channel {channel!r} is read by process {process}, this is {self.process_id}: receive() is for "
                "normal channels and for those that new_channel() made in this process"
            )
        if process is not None and parts.delivery is not None:
            raise InvalidName(f"channel {channel!r}: the channels of an interface server go to its connections")
        while True:
            if asyncio.get_running_loop() is parts.loop:
                raw = await self._receive(parts, channel)
            else:
                raw = await call_on(
                    parts.loop,
                    lambda: self._receive(parts, channel),
                    undo=lambda raw: self._give_back(parts, channel, raw),
                )
            try:
                return decode_event(raw if process is not None else self.cipher.open(split_element(raw)[1]))
            except Undecryptable as error:
                self._undecryptable(f"a message of channel {channel}", error)
            except WireError:
                self._malformed_count += 1
                logger.exception("a message of channel %s was dropped", channel)

    async def new_channel(self, prefix: str = "specific") -> str:
        """See base.ChannelLayer."""
        channel = check_channel_name(f"{prefix.rstrip('.')}.{self.process_id}!{secrets.token_hex(8)}")
        parts = self._started()
        if parts.inbox is None:
            if asyncio.get_running_loop() is parts.loop:
                self._open_inbox(parts)
            else:
                await call_on(parts.loop, lambda: _as_coroutine(lambda: self._open_inbox(parts)))
        return channel

    async def group_add(self, group: str, channel: str) -> None:
        """See base.ChannelLayer. Cancelled, it leaves the channel a member or not."""
        await self._change_group(group, channel, add=True)

    async def group_discard(self, group: str, channel: str) -> None:
        """See base.ChannelLayer."""
        await self._change_group(group, channel, add=False)

    async def _change_group(self, group: str, channel: str, *, add: bool) -> None:
        check_group_name(group)
        check_channel_name(channel)
        parts = self._started()
        change = self._group_add if add else self._group_discard
        if asyncio.get_running_loop() is parts.loop:
            await change(parts, group, channel)
        else:
            await call_on(parts.loop, lambda: change(parts, group, channel))

    async def group_send(self, group: str, message: Message) -> None:
        """See base.ChannelLayer. While the broker is away it waits, 10 s at most."""
        check_group_name(group)
        encoded = encode_message(message)
        parts = self._started()
        if asyncio.get_running_loop() is parts.loop:
            await parts.sender.send(group, encoded)
        else:
            await call_on(parts.loop, lambda: parts.sender.send(group, encoded))

    async def flush(self) -> None:
        """Forget the messages and memberships of the whole deployment: normal channels, mail, groups.

        Waits until every process that lives has done so (5 s at most). Links, and with them the connections of
        clients, go on.
        """
        parts = self._started()
        if asyncio.get_running_loop() is parts.loop:
            await self._flush(parts)
        else:
            await call_on(parts.loop, lambda: self._flush(parts))

    def announce_outages(self, notices: tuple[str | None, str | None]) -> None:
        """From now on, tell the channels that this process reads when the broker goes, and when it is back.

        They get a message of the first type, or of the second; None: nothing. Told are channels that somebody waits
        at, and members of groups; whoever was told of the first is told of the second. "Back" is also a broker that
        lost its data without having been away.
        """
        if notices != (None, None):
            self._notices = {*self._notices, notices}

    async def close(self) -> None:
        """Do nothing: the process layer lives as long as its process. Channels' test helpers call it."""

    async def close_pools(self) -> None:
        """Do nothing; as close(). Users of channels_redis call it."""

    # The same on the layer's loop

    async def _send(self, parts: _Parts, channel: str, encoded: bytes) -> None:
        process = process_of(channel)
        if process == self.process_id:
            # Readers on this loop get their turn, as they do while a broker answers; and a call that is cancelled
            # here has sent nothing.
            await asyncio.sleep(0)
            if parts.delivery is not None:
                self._deliver((channel,), encoded)
            else:
                parts.local.store(channel, encoded)
            return
        if process is None:
            key, content = self.keys.normal(channel), encoded
        else:
            key, content = self.keys.mail(process), mail.build_message(channel, encoded)
        give_up_at = parts.loop.time() + self._outage_wait_s
        while True:
            await self._reach(key)
            try:
                await parts.writer.store(
                    key,
                    content,
                    capacity=self._capacities.of(channel),
                    expiry_ms=self._expiry_ms,
                    name=non_local_name(channel),
                )
            except BrokerNotServing:
                # Refused, so not stored: a master became a replica, say. Once more, where the new one is.
                if parts.loop.time() >= give_up_at:
                    raise
            else:
                return

    async def _reach(self, key: str) -> None:
        """Wait for the shard of ``key``, if it is away. Raises BrokerUnavailable."""
        if not self._broker.shard_of(key).reachable:
            await self._broker.wait_reachable(self._outage_wait_s, key)

    async def _receive(self, parts: _Parts, channel: str) -> bytes:
        """Return the next message, of a normal channel with its deadline in front."""
        if "!" in channel:
            self._open_inbox(parts)
            return await parts.local.receive(channel)
        return (await parts.normal.take(channel, 1))[0]

    def _give_back(self, parts: _Parts, channel: str, raw: bytes) -> None:
        if "!" in channel:
            parts.local.give_back(channel, raw)
        else:
            parts.normal.give_back(channel, [raw])

    async def _group_add(self, parts: _Parts, group: str, channel: str) -> None:
        process = process_of(channel)
        await self._reach(self.keys.group(group) if process in (self.process_id, None) else self.keys.mail(process))
        if process == self.process_id:
            self._open_inbox(parts)
            await parts.groups.add_and_wait(group, channel, self._outage_wait_s)
        elif process is None:
            await self._broker.script(
                scripts.GROUP_REGISTER,
                [self.keys.group(group)],
                [NORMAL_MEMBER_MARK + channel, int(self.group_expiry * 1000)],
            )
        else:
            self._open_inbox(parts)
            await parts.requests.ask(process, group, channel, add=True, epoch=self.epoch_of(channel))

    async def _group_discard(self, parts: _Parts, group: str, channel: str) -> None:
        process = process_of(channel)
        if process == self.process_id:
            parts.groups.discard(group, channel)
            return
        await self._reach(self.keys.group(group) if process is None else self.keys.mail(process))
        if process is None:
            await self._broker.call("ZREM", self.keys.group(group), NORMAL_MEMBER_MARK + channel)
        else:
            self._open_inbox(parts)
            await parts.requests.ask(process, group, channel, add=False, epoch=self.epoch_of(channel))

    async def _flush(self, parts: _Parts) -> None:
        self._forget_all(parts)
        prefix = self.prefix.replace("\\", r"\\").replace("*", r"\*").replace("?", r"\?").replace("[", r"\[")
        before, after = self.keys.lease("*").split("*")
        leases = await self._find_keys(f"{prefix}{before.removeprefix(self.prefix)}*{after}")
        processes = {key.removeprefix(before).removesuffix(after) for key in leases} - {self.process_id}
        for pattern in (f"{prefix}:[0-9]*:channel:*", f"{prefix}:1:inbox:*:mail", f"{prefix}:group:*"):
            found = await self._find_keys(pattern)
            # One key a command: they are in different slots of a Cluster.
            for start in range(0, len(found), _FLUSH_PORTION):
                portion = found[start : start + _FLUSH_PORTION]
                await asyncio.gather(*[self._broker.call("UNLINK", key) for key in portion])
        if processes:
            self._open_inbox(parts)
            await parts.requests.flush(processes)

    async def _find_keys(self, pattern: str) -> list[str]:
        keys: set[str] = set()  # SCAN may return a key twice
        for shard in self._broker.shards:
            cursor = b"0"
            while True:
                cursor, found = await shard.call("SCAN", cursor, "MATCH", pattern, "COUNT", _FLUSH_PORTION)
                keys.update(key.decode() for key in found)
                if cursor == b"0":
                    break
        return list(keys)

    def _forget_all(self, parts: _Parts) -> None:
        parts.local.clear()
        parts.groups.clear()

    # Links

    def link_send(self, peer: str, frame: bytes) -> int:
        """See base.ProcessLayer."""
        parts = self._parts
        if parts is not None and parts.links is not None:  # as _links(), for what happens with each request
            return parts.links.send(peer, frame)
        return self._links().send(peer, frame)

    def link_send_event(self, peer: str, connection: int, epoch: int, payload: bytes, behind: int) -> int:
        """See base.ProcessLayer."""
        parts = self._parts
        if parts is not None and parts.links is not None:
            return parts.links.send_event(peer, connection, epoch, payload, behind)
        return self._links().send_event(peer, connection, epoch, payload, behind)

    def link_is_congested(self, peer: str) -> bool:
        """See base.ProcessLayer."""
        parts = self._parts
        if parts is not None and parts.links is not None:
            return parts.links.is_congested(peer)
        return self._links().is_congested(peer)

    def _links(self) -> Links:
        links = self._started().links
        if links is None:
            raise RuntimeError(f"{self!r}: a client has no links")
        return links

    def _push_blobs(self, peer: str, blobs: list[bytes]) -> asyncio.Future[Any]:
        if self.cipher.is_encrypting:
            blobs = [self.cipher.seal_blob(self.process_id, blob) for blob in blobs]
        return self._push_to_link(peer, blobs)

    def _push_to_link(self, peer: str, blobs: list[bytes]) -> asyncio.Future[Any]:
        key = self.keys.link(peer)
        return self._broker.transaction(("RPUSH", key, *blobs), ("PEXPIRE", key, _LINK_EXPIRY_MS))

    def _link_send_to_group(self, peer: str, frame: bytes) -> bool:
        links = self._links()
        watch = self._started().watch
        if (watch is not None and watch.is_dead(peer)) or links.queued_bytes(peer) > _GROUP_LINK_BYTES_MAX:
            return False
        # An instance's events stay behind the messages that it sent to groups before.
        links.send(peer, frame)
        links.raise_barrier(peer)
        return True

    # Openings

    def _keys_to_read(self, name: str) -> tuple[str, ...]:
        """The lists behind a name of NormalChannels."""
        if not name.startswith(_OPENINGS_MARK):
            return (self.keys.normal(name),)
        channel = name.removeprefix(_OPENINGS_MARK)
        versions = range(self._wire_version, WIRE_VERSION_PREVIOUS - 1, -1)
        return tuple(self.keys.openings(channel, version) for version in versions)

    def push_opening(self, channel: str, opening: bytes, *, exempt: bool = False) -> Stored:
        """See base.ProcessLayer."""
        return self._started().writer.push_element(
            self.keys.openings(channel, self._wire_version),
            opening,
            capacity=-1 if exempt else self._opening_capacity,
            expiry_ms=self._opening_expiry_ms,
            name=channel,
        )

    async def take_openings(self, channel: str, count: int) -> list[bytes]:
        """See base.ProcessLayer. Waits through outages of the broker."""
        key = self.keys.normal(channel)
        while True:
            while not self.broker_reachable:
                with contextlib.suppress(BrokerUnavailable):
                    await self._reach(self._inbox_key)
                self._started()  # raises if it was stopped meanwhile
            elements = await self._started().normal.take(_OPENINGS_MARK + channel, count)
            own, theirs = self._broker.shard_of(self._inbox_key), self._broker.shard_of(key)
            if theirs.reachable and not own.reachable:
                # They came from another shard than ours, which is away: the answers to our claims would not come.
                # Others can take them.
                self._started().normal.give_back(_OPENINGS_MARK + channel, elements)
                continue
            openings: list[bytes] = []
            for element in elements:
                try:
                    openings.append(self.cipher.open(split_element(element)[1]))
                except Undecryptable as error:
                    # Not put back: this process would take it again at once. Its interface server misses it in the
                    # list and sends it again, perhaps to one that has the key.
                    self._undecryptable(f"an opening of {channel}", error)
            if openings:
                return openings

    def _tell_stalled(self) -> None:
        """On the lease's thread: tell interface servers that what they miss is here. Raises OSError, BrokerError."""
        held: dict[str, list[int]] = {}
        for interface, number, epoch in self.stalled_openings():
            held.setdefault(interface, []).extend((number, epoch))
        for interface, openings in held.items():
            key, letter = self.keys.mail(interface), self.cipher.seal(mail.build_held(openings))
            connection = LeaseConnection(parse_broker_urls(self.url), key, timeout_s=_TELL_TIMEOUT_S)
            try:
                connection.execute("EVAL", scripts.PUSH.source, 1, key, -1, self._expiry_ms, letter)
            finally:
                connection.close()

    async def find_openings(self, channel: str, elements: Sequence[bytes]) -> list[bool]:
        """See base.ProcessLayer."""
        key = self.keys.openings(channel, self._wire_version)
        positions = await asyncio.gather(*[self._broker.call("LPOS", key, element) for element in elements])
        return [position is not None for position in positions]

    async def remove_opening(self, channel: str, element: bytes) -> bool:
        """See base.ProcessLayer."""
        return bool(await self._broker.call("LREM", self.keys.openings(channel, self._wire_version), 1, element))

    # Groups

    def hold_inbox(self, held: bool) -> None:
        parts = self._parts
        if parts is not None and parts.inbox is not None:
            parts.inbox.hold(held)

    def forget_channels(self, channels: Collection[str]) -> None:
        """See base.ProcessLayer."""
        self._started().groups.forget(channels)

    def add_local_member(self, group: str, channel: str, *, when_registered: Callable[[bool], None]) -> None:
        """See base.ProcessLayer."""
        self._started().groups.add(group, channel, lambda error: when_registered(error is None))

    def _abandoned(self, channel: str) -> None:
        parts = self._parts
        if parts is not None:
            parts.groups.forget((channel,))

    def _deliver(self, channels: Collection[str], encoded: bytes, lifetime_s: float | None = None) -> None:
        parts = self._parts
        if parts is None or not channels:
            return
        if parts.delivery is None:
            parts.local.deliver(channels, encoded, lifetime_s)
            return
        try:
            parts.delivery(channels, encoded)
        except Exception:
            logger.exception("a message for %d channels was not delivered", len(channels))

    def _undecryptable(self, what: str, error: Undecryptable) -> None:
        """Count, and say so once in a while: each element of a deployment with wrong keys comes here."""
        self._undecryptable_count += 1
        now = time.monotonic()
        if now - self._undecryptable_logged_at >= _UNDECRYPTABLE_LOG_INTERVAL_S:
            self._undecryptable_logged_at = now
            logger.error(
                "%s is dropped: %s. All processes need the same encryption keys (%d elements so far)",
                what,
                error,
                self._undecryptable_count,
            )

    # What comes in: blobs and frames

    def _blob_received(self, data: bytes) -> None:
        parts = self._parts
        if parts is None or parts.links is None:
            return
        try:
            blob = self.cipher.open_blob(data)
        except Undecryptable as error:
            source = error.source
            self._undecryptable(f"a blob of {source if source is not None else 'an unknown process'}", error)
            if source is not None and is_linked(source) and source != self.process_id:
                # It would send this blob again for ever, and everything behind it waits for this one.
                self._give_up(parts, source, f"what it sends cannot be decrypted: {error}")
                refusal = self._push_to_link(source, [build_refusal(self.process_id)])
                refusal.add_done_callback(_ignore_failure)  # the next blob that comes again is refused again
            return
        except Refused as error:
            self._give_up(parts, error.source, "it cannot decrypt what this process sends")
            return
        parts.links.receive_blob(blob)

    def _give_up(self, parts: _Parts, peer: str, reason: str) -> None:
        if parts.links is not None and peer in parts.links.peers():
            logger.warning("the link to %s is over: %s", peer, reason)
            parts.links.give_up(peer, reason)

    def _frame_received(self, peer: str, frame: Frame) -> None:
        parts = self._parts
        if parts is None or parts.listener is None:
            return
        kind = frame[0]
        if kind not in _GROUP_FRAMES:
            parts.listener.frame_received(peer, frame)
        elif kind == FrameKind.GROUP_SEND:
            self._deliver(parts.groups.members(frame[1]), frame[2])
        elif kind == FrameKind.GROUP_ADD or kind == FrameKind.GROUP_DISCARD:
            _, connection, epoch, request, group = frame[:5]
            channel = f"interface.{self.process_id}!{connection}"
            if kind == FrameKind.GROUP_DISCARD:
                # An owner that lost the connection (another epoch) must not take its successor out of the group.
                if self.owns_channel(channel, epoch):
                    parts.groups.discard(group, channel)
                self._answer_frame(peer, request, True)
            elif self.owns_channel(channel, epoch):
                parts.groups.add(group, channel, lambda error: self._answer_frame(peer, request, error is None))
            else:
                self._answer_frame(peer, request, True)
        else:
            parts.requests.answered(frame[1], frame[2])

    def _answer_frame(self, peer: str, request: int, done: bool) -> None:
        parts = self._parts
        # It may come long after the question, when the broker is back: a link that ended meanwhile is not begun anew.
        if parts is not None and parts.links is not None and peer in parts.links.peers():
            parts.links.send(peer, build_group_answer(request, done))

    def _peer_ended(self, peer: str, reason: str) -> None:
        parts = self._parts
        if parts is None or parts.listener is None:
            return
        if parts.watch is not None:
            parts.watch.forget(peer)
        parts.requests.peer_ended(peer, reason)
        parts.listener.peer_ended(peer, reason)

    # What comes in: mail

    def _letter_received(self, element: bytes) -> None:
        parts = self._parts
        if parts is None:
            return
        try:
            deadline_ms, content = split_element(element)
            kind, fields = mail.decode_letter(self.cipher.open(content))
        except Undecryptable as error:
            self._undecryptable("a letter", error)
            return
        except WireError:
            self._malformed_count += 1
            raise
        lifetime_ms = deadline_ms - self._broker.time_ms(self._inbox_key)
        if lifetime_ms <= 0:
            self._letter_expired_count += 1
            return
        if kind == LetterKind.MESSAGE:
            channel, payload = fields[:2]
            self._deliver((channel,), payload, lifetime_ms / 1000)
        elif kind == LetterKind.GROUP_SEND:
            group, payload = fields[:2]
            self._deliver(parts.groups.members(group), payload, lifetime_ms / 1000)
        elif kind == LetterKind.GROUP_ADD or kind == LetterKind.GROUP_DISCARD:
            group, channel, request, answer_to = fields[:4]
            self._group_letter_received(parts, kind, group, channel, request, answer_to)
        elif kind == LetterKind.GROUP_ANSWER:
            parts.requests.answered(fields[0], fields[1])
        elif kind == LetterKind.FLUSH:
            self._forget_all(parts)
            self._answer_letter(fields[1], fields[0], True)
        elif kind == LetterKind.HELD:
            if len(fields) % 2 or any(type(number) is not int for number in fields):
                self._malformed_count += 1
                raise WireError(f"letter HELD is not numbers and epochs: {fields!r:.80}")
            self.openings_held(fields)
        elif kind == LetterKind.PROBE:
            if fields[0] < 0:
                self.proved_at = max(-fields[0] / 1000, self.proved_at or 0.0)
            elif parts.watch is not None:
                parts.watch.probe_returned(fields[0])
        else:
            self._letter_unknown_count += 1

    def _group_letter_received(
        self, parts: _Parts, kind: int, group: str, channel: str, request: int, answer_to: str
    ) -> None:
        if process_of(channel) != self.process_id or not self.owns_channel(channel, 0):
            self._answer_letter(answer_to, request, True)
        elif kind == LetterKind.GROUP_ADD:
            parts.groups.add(group, channel, lambda error: self._answer_letter(answer_to, request, error is None))
        else:
            parts.groups.discard(group, channel)
            self._answer_letter(answer_to, request, True)

    def _answer_letter(self, process: str, request: int, done: bool) -> None:
        parts = self._parts
        if parts is not None:
            parts.writer.push_unasked(
                self.keys.mail(process),
                mail.build_group_answer(request, done),
                capacity=mail.MAIL_CAPACITY,
                expiry_ms=self._expiry_ms,
            )

    # The broker

    def _broker_changed(self, change: BrokerChange) -> None:
        parts = self._parts
        if parts is None:
            return
        shard = change.shard
        assert shard is not None
        was_reachable = shard not in self._away
        is_ours = shard is self._broker.shard_of(self._inbox_key)
        if parts.watch is not None:
            parts.watch.shard_changed(shard)

        def concerns(peer: str) -> bool:
            return self._broker.shard_of(self.keys.link(peer)) is shard

        if not change.reachable:
            self._away.add(shard)
            if parts.links is not None:
                parts.links.broker_lost(concerns)
            self._tell_listener(parts)
            self._announce(parts, [lost for lost, _ in self._notices])
            return
        self._away.discard(shard)
        if parts.links is not None:
            if was_reachable:
                parts.links.broker_lost(concerns)  # it lost its data under us: what was in the lists is gone
            parts.links.broker_restored(concerns)
        parts.groups.broker_restored(shard)
        if change.data_lost:
            parts.sender.data_lost(shard)
        if parts.lease is not None and is_ours:
            parts.lease.look_again()  # a master that was cut off with us would go on taking it
        self._tell_listener(parts, again=not was_reachable)
        self._announce(parts, [restored for _, restored in self._notices])

    def _tell_listener(self, parts: _Parts, *, again: bool = False) -> None:
        """Tell whether our inbox can be reached; ``again``: another shard is back, what waits for it may go on."""
        was_told, self._told_reachable = self._told_reachable, self.broker_reachable
        if parts.listener is not None and (was_told is not self._told_reachable or (again and was_told)):
            parts.listener.broker_changed(self._told_reachable)

    def _announce(self, parts: _Parts, types: list[str | None]) -> None:
        if not types or parts.delivery is not None:
            return
        channels = {**self._told_of_outage, **dict.fromkeys([*parts.local.names(), *parts.groups.channels()])}
        # Who was told may be busy with that, and not yet wait again when the broker is back.
        self._told_of_outage = channels if self._away else {}
        for kind in types:
            if kind is not None:
                parts.local.deliver(channels.keys(), encode_message({"type": kind}))

    # Who lives

    async def _keep_house(self, parts: _Parts) -> None:
        """Everything that is done again and again, each at its own interval."""
        loop = parts.loop
        next_sweep = loop.time() + _SWEEP_INTERVAL_S
        next_renewal = loop.time() + RENEWAL_INTERVAL_S
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S if parts.watch is None else parts.watch.interval_s)
            now = loop.time()
            try:
                self._notice_own_absence(parts)
                parts.groups.retry()
                if now >= next_renewal:
                    next_renewal = now + RENEWAL_INTERVAL_S
                    parts.groups.renew()
                if now >= next_sweep:
                    next_sweep = now + _SWEEP_INTERVAL_S
                    parts.local.sweep()
                    parts.normal.close_idle()
                if parts.watch is not None:
                    parts.watch.look()
            except Exception:
                logger.exception("housekeeping failed; going on")

    def _inbox_is_current(self) -> bool:
        parts = self._parts
        return parts is not None and parts.inbox is not None and parts.inbox.is_current

    def _lease_renewed(self) -> float | None:
        parts = self._parts
        return None if parts is None or parts.lease is None else parts.lease.last_renewed

    def _look_for_own_absence(self, parts: _Parts) -> None:
        """On the lease's thread. At once: what this process takes up before it looks again is soon ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody there takes anything up
            parts.loop.call_soon_threadsafe(self._notice_own_absence, parts)

    def _notice_own_absence(self, parts: _Parts) -> None:
        lease = parts.lease
        if lease is None or lease.absence_count == self._absences_seen:
            return
        self._absences_seen = lease.absence_count
        self._absence_count += 1
        parts.groups.broker_restored()
        if parts.links is None or parts.watch is None:
            return
        parts.watch.give_grace()
        peers = parts.links.peers()
        logger.warning("this process was away longer than its lease: ending its %d links", len(peers))
        for peer in peers:
            parts.links.give_up(peer, AWAY)


def _refuse_blob(data: bytes) -> None:
    raise WireError(f"a blob of {len(data)} bytes came, but a client has no links")


def _ignore_failure(answer: asyncio.Future[Any]) -> None:
    if not answer.cancelled():
        answer.exception()  # else asyncio reports that nobody looked


def _nothing() -> None:
    """A client has no links to repair."""


async def _as_coroutine(call: Callable[[], T]) -> T:
    return call()
