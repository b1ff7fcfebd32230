"""The contracts of this package: what applications call, and what our own two processes stand on.

``ChannelLayer`` is the public API, in the words of the channel layer specification. ``ProcessLayer`` is what
an interface server or a worker needs besides: links, openings, and what happens to messages for its channels.
Nothing is implemented here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any, Protocol

from channel_layer.frames import Frame

__all__ = ["ChannelLayer", "LocalDelivery", "Message", "ProcessLayer", "ProcessListener", "Stored"]

Message = Mapping[str, Any]


class ChannelLayer(Protocol):
    """Named channels and groups; channel layer specification, C1-C22 in docs/conformance.md.

    A message is a dict of the types that ASGI allows in events ("Events"), 2.25 MiB encoded at most; it is checked
    and copied before anything is sent. Names are 1 to 100 ASCII letters, digits, ".", "-" and "_". Besides what
    each call names, it raises InvalidName (a TypeError), and InvalidMessage (a ValueError) with the place of a
    value; while the broker is away, calls wait for 10 s at most and then raise BrokerUnavailable (a
    ConnectionError). receive() waits on.
    """

    extensions: list[str]  # "groups", "flush"; specification, "Extensions"

    @property
    def ChannelFull(self) -> type[Exception]:
        """What send() raises when the channel holds as many messages as its capacity allows."""

    @property
    def MessageTooLarge(self) -> type[Exception]:
        """What send() raises for a message that the layer does not carry in one piece."""

    async def send(self, channel: str, message: Message) -> None:
        """Append a message to a channel; return when the broker has it.

        Nobody need receive: it expires (60 s, unless the layer has another ``expiry``). Never waits for room: raises
        ChannelFull at the capacity (100 messages unless the layer has another), and MessageTooLarge. After
        BrokerUnavailable it may or may not be there, and is not sent again. Specification, "Capacity".
        """

    async def receive(self, channel: str) -> dict[str, Any]:
        """Wait for the next message of a channel, for as long as it takes.

        Each message goes to one reader, the oldest first. A cancelled call leaves the message to the next reader.
        Raises InvalidName for a process-local channel of another process.
        """

    async def new_channel(self, prefix: str = "specific") -> str:
        """Return the name of a new channel that only this process reads: ``<prefix>.<process id>!<random>``.

        It exists as long as somebody uses it; there is nothing to close.
        """

    async def group_add(self, group: str, channel: str) -> None:
        """Add a channel to a group; when this returns, a following group_send reaches it.

        Idempotent. A membership ends with its channel's connection or process, or with group_discard. On a channel
        of another process it asks that process, and raises TimeoutError after 5 s without an answer; a dead owner
        is a no-op.
        """

    async def group_discard(self, group: str, channel: str) -> None:
        """Remove a channel from a group; no error if it was not a member. Raises TimeoutError as group_add does."""

    async def group_send(self, group: str, message: Message) -> None:
        """Send a message to all channels of a group; return when it is on its way to each process with members.

        At most once for each member; one that is full misses it, and is counted. Raises MessageTooLarge, never
        ChannelFull. What a client's connection does with it depends on the type: docs/groups.md.
        """

    async def flush(self) -> None:
        """Forget all messages and memberships of the deployment; return when every process has (5 s at most).

        Connections of clients go on. For tests.
        """


class LocalDelivery(Protocol):
    """Takes messages for process-local channels of this process; must not block or raise."""

    def __call__(self, channels: Collection[str], encoded: bytes) -> None:
        """``encoded`` is one message (codec.decode); each of ``channels`` is to get it."""


class ProcessListener(Protocol):
    """What the owner of a ProcessLayer is told. Plain calls on the layer's loop; they must not raise."""

    def frame_received(self, peer: str, frame: Frame) -> None:
        """A frame about a connection (CLAIM … EVENTS) came from ``peer``, in order."""

    def peer_ended(self, peer: str, reason: str) -> None:
        """The link to ``peer`` is over: treat its connections as if the other side had died."""

    def peer_ready(self, peer: str) -> None:
        """The link to ``peer`` has room again after ``link_is_congested`` was true."""

    def broker_changed(self, reachable: bool) -> None:
        """The broker went away or came back. While it is away nobody is dead and timers stand still."""


class Stored(Protocol):
    """The part of asyncio.Future that tells how a push_opening() went."""

    def add_done_callback(self, callback: Callable[[Any], object], /) -> object:
        """Have ``callback`` called with this object when it is known; once, for one callback, and never at once."""

    def __await__(self) -> Generator[Any, None, bytes]: ...

    def cancelled(self) -> bool:
        """True if nobody will ever know."""

    def exception(self) -> BaseException | None:
        """Why it was not stored."""

    def result(self) -> bytes:
        """The element."""


class ProcessLayer(ChannelLayer, Protocol):
    """The layer of one interface server or worker, used on that process's own loop only."""

    process_id: str

    @property
    def broker_reachable(self) -> bool:
        """False while the broker does not answer."""

    async def start(self, listener: ProcessListener, delivery: LocalDelivery | None = None) -> None:
        """Connect, take up the lease and read the inbox.

        ``delivery`` gets the messages for this process's channels; without it ``receive()`` does.
        Raises BrokerUnavailable, BrokerUnsuitable.
        """

    async def stop(self) -> None:
        """Say goodbye on every link, wait (2 s at most) until that is acknowledged, drop the lease, disconnect."""

    # Links

    def link_send(self, peer: str, frame: bytes) -> int:
        """Queue a frame for ``peer``. It arrives exactly once and in order, or ``peer_ended`` is called.

        Return its position in what is sent to ``peer``.
        """

    def link_send_event(self, peer: str, connection: int, epoch: int, payload: bytes, behind: int) -> int:
        """As ``link_send``, of an EVENT that may travel in one frame with equal ones of other connections.

        It overtakes neither the frame whose position is ``behind``, or any before it, nor messages to groups. Return
        its position.
        """

    def link_is_congested(self, peer: str) -> bool:
        """True while the link holds more than its senders should add to; ``peer_ready`` says when it is over."""

    def peer_is_reachable(self, peer: str) -> bool:
        """False while what we send to ``peer``, or what it answers, may be held up: it is not late then."""

    def hold_inbox(self, held: bool) -> None:
        """Take nothing more from our inbox while ``held``: our own loop is behind with what came. Never for a
        socket or an application to become ready: those have credit.
        """

    # Openings: elements of the normal channels http.request and websocket.connect

    def push_opening(self, channel: str, opening: bytes, *, exempt: bool = False) -> Stored:
        """Store an opening; the result is the element as the broker holds it (for find and remove).

        ``exempt``: also where the channel is full; for few, whose clients were let in long ago.

        Fails with ChannelFull, BrokerUnavailable. No coroutine, for which each request would pay with a task.
        """

    async def take_openings(self, channel: str, count: int) -> list[bytes]:
        """Wait for one to ``count`` openings, oldest first. A cancelled call leaves them to other readers."""

    async def find_openings(self, channel: str, elements: Sequence[bytes]) -> list[bool]:
        """Tell for each element whether it still waits (LPOS, one pipeline). Raises BrokerUnavailable."""

    async def remove_opening(self, channel: str, element: bytes) -> bool:
        """Remove a waiting opening (LREM); False if somebody took it. Raises BrokerUnavailable."""

    # Groups

    def forget_channels(self, channels: Collection[str]) -> None:
        """End all memberships of these channels of this process, at once; the registry follows."""

    def add_local_member(self, group: str, channel: str, *, when_registered: Any) -> None:
        """group_add for a channel of this process, for a frame that asked: calls ``when_registered(done: bool)``."""
