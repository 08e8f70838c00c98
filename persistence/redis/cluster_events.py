"""The events that engines share through a cluster: one stream for each slot, read from the server that has the slot.

A server announces which streams have changed (`CLIENT TRACKING ... BCAST`), and these are read. Announcements are lost
while there is no connection, so after each new connection the streams of all slots of that server are read
(docs/design/0080-redis-cluster.md).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from redis.crc import key_slot

from scopestate.errors import NotConnected, StorageError
from scopestate.persistence.redis.cluster_nodes import NodeReader
from scopestate.persistence.redis.connection import pack_text
from scopestate.persistence.redis.entries import Event, number_of, state_event_of
from scopestate.persistence.redis.events import Arrivals, Losses
from scopestate.persistence.redis.history import Life
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.script import Shape
from scopestate.persistence.redis.tail import Published, Tail

if TYPE_CHECKING:
    from scopestate.actors.handler import HandlerActor
    from scopestate.actors.router import EventRouter
    from scopestate.persistence.redis.backend import RedisBackend
    from scopestate.persistence.redis.cluster import Clustered, ServerPool
    from scopestate.persistence.redis.tracking import Tracked

log = logging.getLogger("scopestate.persistence.redis")


class SlotTail(Tail):
    """The position in the stream of one slot.

    A thread that changes it holds `ClusterReader.exclusive`, or has set `is_busy` while it held that, because a check
    that waits for the server must not delay the readers of other servers.
    """

    def __init__(self, streams: ClusterReader, slot: int) -> None:
        super().__init__(streams.shape.in_slot(slot), streams.published(slot))
        self.slot = slot
        self.is_busy = False
        """True during a check. Nothing else changes the position then."""
        self.server = ""
        """The server that the stream was last read from."""
        self.read_s = 0.0
        """When an entry was last read from the stream, in seconds on the monotonic clock."""
        self._streams = streams

    @property
    def _server(self) -> str:
        return self.server

    @property
    def _is_over(self) -> bool:
        return self._streams.is_over

    @property
    def _outlet(self) -> Arrivals:
        return self._streams.outlet

    def note_loss(self, count: int, what: str) -> None:
        self._streams.losses.note(count, what)

    def _look_soon(self) -> None:
        self._streams.have_checked(self.slot)

    def _begin_feed_anew(self, life: Life, number: int, why: str) -> None:
        with self._streams.exclusive:
            self._streams.outlet.lose(self.slot, why)

    # ------------------------------------------------------------------------------------- for the thread that reads

    @property
    def id(self) -> bytes:
        """The id of the last entry that was read."""
        return self._id

    def begin_at(self, counted: int, newest: list[Any], life: Life | None) -> None:
        """Begin after the newest entry."""
        self._begin_behind(counted, newest)
        if life is not None:
            self.life = life

    def read_next(self, count: int) -> bytes:
        """Return the command that reads the next entries."""
        return pack_text(("XREAD", "COUNT", str(count), "STREAMS", self._shape.stream, self._id))

    def take_in(self, connection: Tracked, entries: list[Any], *, here: bool) -> HandlerActor | None:
        """Pass these entries to handlers and watches. Return a handler that the caller must run, if there is one."""
        self.read_s = time.monotonic()
        return self._take_in(connection, entries, here=here)[0]

    def check_commands(self) -> list[bytes]:
        """Return the commands whose replies are the arguments of `fits`."""
        stream = self._shape.stream
        return [
            pack_text(("GET", self._shape.counter)),
            pack_text(("XREVRANGE", stream, self._id, "-", "COUNT", "1")),
        ]

    def fits(self, counted: int, before: list[Any], published: int, wanted: int) -> bool:
        """Return whether the stream is still the one that was read. `wanted`: the number of the requested check."""
        if counted < self._number or published > counted or self.published.lost is not None:
            return False
        if self._number and (
            not before or before[0][0] != self._id or number_of(before[0][1]) not in {self._number, None}
        ):
            return False
        self._looked = wanted
        self._tell_all()
        return True

    def look(self, connection: Tracked) -> bool:
        """Find where to continue. Return whether there may be something to read."""
        restarts = self.restarts
        self._look(connection)
        return self.restarts != restarts

    @property
    def wanted(self) -> int:
        """How many checks were requested."""
        return self._wanted

    def forget_old(self) -> None:
        """Forget some of the entries that were read. Called from time to time."""
        self._forget_old()

    def tell_all(self) -> None:
        """Wake the threads that wait for an event."""
        self._tell_all()


class ClusterArrivals(Arrivals):
    """Passes the events of all servers to the router, and gives them their positions.

    The readers' threads hold `ClusterReader.exclusive` when they call this, so one thread at a time does.
    """

    def __init__(self, adapter: RedisBackend, reader: ClusterReader, router: EventRouter) -> None:
        super().__init__(adapter, reader, router)
        self._shape = reader.shape
        self._note_arrivals = None if adapter.cluster_durable is None else adapter.cluster_durable.note_arrivals_in

    def feed(self, tail: Tail, entry_id: bytes, fields: list[bytes], event: Event) -> None:
        feed = self._router.feed
        position = feed.position + 1
        feed.arrive(event.scope, position, lambda: state_event_of(entry_id, fields, position - event.number))

    def pass_over(self, tail: Tail, scopes: Sequence[str], count: int) -> bool:
        feed = self._router.feed
        return feed.pass_over(scopes, feed.position + count)

    def note_arrivals_in(self, slot: int) -> None:
        """The stream of a slot has new entries: durable triggers may have something to do."""
        if self._note_arrivals is not None:
            self._note_arrivals(slot)

    def lose(self, slot: int, why: str) -> None:
        """End watches with a reason because changes in a slot are missing: those of its scopes, and of many scopes."""
        shape, feed = self._shape, self._router.feed
        feed.begin_anew(
            feed.store_id,
            feed.epoch,
            feed.position + 1,
            why,
            lambda scope: key_slot(shape.key_of(scope)) == slot,
        )


class ClusterReader:
    """Reads the streams of all slots. Call `open`, `start` and `stop`, in this order."""

    def __init__(self, servers: Clustered, options: RedisOptions, shape: Shape, read_life: Callable[[], Life]) -> None:
        """`read_life` returns the life of the whole cluster, and raises StorageError."""
        self.life = Life("", 0, 0)
        """The life of the cluster that this reads; known once it is open."""
        self._read_life = read_life
        self.servers = servers
        self.options = options
        self.shape = shape
        self.losses = Losses()
        self.outlet: ClusterArrivals
        assert shape.by_slot is not None  # it is that of a cluster
        self.keys = shape.by_slot
        """The stream of each slot, its counter and its limit."""
        self.slot_of = {keys[0].encode(): slot for slot, keys in enumerate(self.keys)}
        self.tails: dict[int, SlotTail] = {}
        self.unread: set[int] = set(range(servers.count))
        """Slots whose position is not known, because their server could not be reached yet."""
        self._published: dict[int, Published] = {}
        self._nodes: dict[ServerPool, NodeReader] = {}
        self.exclusive = threading.RLock()
        """Held by a reader while it passes events to the router. It passes many at a time, because passing the lock to
        another thread takes longer than an event."""
        self._changing = threading.RLock()
        self._started = False
        self._stopped = threading.Event()

    # ------------------------------------------------------------------------------------------- the engine's side

    def open(self) -> None:
        """Connect to all primaries, and note where reading begins: everything written from now on is read.

        One server is enough. Events that are published at the others before they are reached are missed, and that is
        reported. Raises NotConnected, and StorageError if a server refuses.
        """
        try:
            self._open()
        except BaseException:
            self.stop()
            raise

    def _open(self) -> None:
        problems: list[str] = []
        for pool, slots in self.servers.parts().items():
            node = self._nodes[pool] = NodeReader(self, pool)
            try:
                node.open(slots)
            except NotConnected as error:
                problems.append(str(error))
                log.warning("%s; its events are read once it can be reached", error)
        if len(problems) == len(self._nodes):
            raise NotConnected("; ".join(problems))
        self.life = self._read_life()

    def start(self, adapter: RedisBackend, router: EventRouter) -> Arrivals:
        """Start reading, and return the object that passes the events to the router."""
        self.outlet = ClusterArrivals(adapter, self, router)
        with self._changing:
            self._started = True
            for node in self._nodes.values():
                node.start()
        for slot in list(self.unread):
            self.hand_over(slot)  # a slot that has moved since
        return self.outlet

    def stop(self) -> None:
        """Stop reading: nothing is published after this has returned. Idempotent."""
        self._stopped.set()
        if self._started:
            self.outlet.interrupt()
        with self._changing:
            nodes = list(self._nodes.values())
        for node in nodes:
            node.interrupt()
        for node in nodes:
            node.stop()
        for tail in list(self.tails.values()):
            tail.tell_all()

    @property
    def is_over(self) -> bool:
        """True once nothing is read any more."""
        return self._stopped.is_set()

    @property
    def missed(self) -> int:
        """Events that this engine has missed, as far as their number is known."""
        return self.losses.missed

    def problem(self) -> str | None:
        """Return the current problem as text, or a recent loss."""
        parts = self.servers.parts()
        for pool, node in list(self._nodes.items()):
            if node.why_not is not None and pool in parts:
                return f"events of other engines do not arrive: {node.why_not}"
        return self.losses.problem()

    def published(self, slot: int) -> Published:
        """Return what this engine has published in a slot."""
        found = self._published.get(slot)
        if found is None:
            found = self._published.setdefault(slot, Published())
        return found

    def published_of(self, hash_key: bytes) -> Published:
        """Return what this engine has published in the slot of a scope."""
        return self.published(key_slot(hash_key))

    def catch_up_own(self, timeout_s: float | None) -> bool:
        """Wait until the events of this engine's own writes were read; False if that took longer than `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for slot, published in list(self._published.items()):
            if published.newest:
                left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                if not self.tail(slot).catch_up_own(left_s):
                    return False
        return True

    def catch_up(self, timeout_s: float) -> str | None:
        """Wait until every change made so far was read from the servers that can be reached.

        Return the address of a server that does not answer in time; None if all did.
        """
        deadline = time.monotonic() + timeout_s
        waiting = [(node, node.ask_barrier()) for node in list(self._nodes.values())]
        for node, number in waiting:
            if not node.wait_for_barrier(number, max(deadline - time.monotonic(), 0.0)):
                return node.address
        return None

    # ------------------------------------------------------------------------------------------ for durable triggers

    def known_slots(self) -> list[int]:
        """Return the slots that are known to have events, or to have had some."""
        own = [slot for slot, _ in self.published_by_slot()]  # which may not have been read yet
        return list({**dict.fromkeys(list(self.tails)), **dict.fromkeys(own)})

    def slots_in_use(self) -> list[int]:
        """Return all slots with events. Raises StorageError if a server does not say which of its slots have some."""
        silent = self.catch_up(self.options.call_timeout_s)
        if silent is None and self.unread:
            silent = self.servers.pool_of(next(iter(self.unread))).target.address
        if silent is not None:
            raise StorageError(f"Redis at {silent} does not say which slots of the cluster have events: try again")
        return self.known_slots()

    def slot_of_scope(self, scope: str) -> int:
        """Return the slot of a scope."""
        return key_slot(self.shape.key_of(scope))

    def published_by_slot(self) -> list[tuple[int, int]]:
        """Return the slots in which this engine has published events, each with the number of the newest one."""
        return [(slot, published.newest) for slot, published in list(self._published.items()) if published.newest]

    # -------------------------------------------------------------------------------------------- for the node readers

    def tail(self, slot: int) -> SlotTail:
        """Return the position in the stream of a slot."""
        found = self.tails.get(slot)
        if found is None:
            with self._changing:
                found = self.tails.get(slot)
                if found is None:
                    found = self.tails[slot] = SlotTail(self, slot)
        return found

    def hand_over(self, slot: int, pool: ServerPool | None = None, *, asking: bool = False, after_s: float = 0) -> None:
        """Ask for the stream of a slot to be read from a server: by default the one that has the slot."""
        with self._changing:
            node = self._node(pool or self.servers.pool_of(slot))
            if node is not None:
                node.hand(slot, asking=asking, after_s=after_s)

    def have_checked(self, slot: int) -> None:
        """Ask for a check of a slot: whether its stream is still the one that was read."""
        with self._changing:
            node = self._node(self.servers.pool_of(slot))
            if node is not None:
                node.hand(slot, check=True)

    def follow_map(self) -> None:
        """Read from every server that has slots, because the map of the slots may have changed."""
        with self._changing:
            for pool in self.servers.parts():
                self._node(pool)

    def retire(self, node: NodeReader) -> bool:
        """Remove the reader of a server if that has no slots any more. Return whether the reader may end."""
        with self._changing:
            if node.pool in self.servers.parts() or node.has_work():
                return False
            self._nodes.pop(node.pool, None)
            return True

    def _node(self, pool: ServerPool) -> NodeReader | None:
        node = self._nodes.get(pool)
        if node is None and not self.is_over:
            node = self._nodes[pool] = NodeReader(self, pool)
            if self._started:
                node.start()
        return node
