"""Reads the streams of the slots that one server of a cluster has.

The server announces which streams have changed, and these are read. After each new connection all streams of the server
are read, because earlier announcements are not known.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from scopestate.errors import StorageError
from scopestate.persistence.connections.connection import NOT_ALL, Broken
from scopestate.persistence.redis.connection import PASSING, Refusal, pack_text
from scopestate.persistence.redis.events import BLOCK_S
from scopestate.persistence.redis.history import life_in, life_parts
from scopestate.persistence.redis.reading import ReadingThreads
from scopestate.persistence.redis.script import explain
from scopestate.persistence.redis.tail import BEGINNING, COUNT
from scopestate.persistence.redis.tracking import Listener, Tracked

if TYPE_CHECKING:
    from scopestate.actors.handler import HandlerActor
    from scopestate.persistence.redis.cluster import ServerPool
    from scopestate.persistence.redis.cluster_events import ClusterReader, SlotTail

log = logging.getLogger("scopestate.persistence.redis")

LOOK_EVERY_S: Final = 10.0
"""Seconds between checks whether each known stream is still the one that was read."""
_AT_ONCE: Final = 500
"""The most streams that are read or checked together."""
_MOST_ENTRIES: Final = 2000
"""The most entries that are read together."""
_LATER_S: Final = 0.05
"""Pause before a stream is read again that its server could not serve, in seconds."""
_RECENT_S: Final = 0.2
"""A stream that had new entries within this time may be announced again for the same entries. In seconds."""


class NodeReader(ReadingThreads):
    """Reads the streams of the slots of one server."""

    def __init__(self, streams: ClusterReader, pool: ServerPool) -> None:
        options = streams.options
        prefix = f"scopestate:events:{streams.shape.key_prefix}{{"
        self._listener = Listener(streams.servers, options, pool.target.where, prefix, streams.follow_map)
        super().__init__(self._listener, options, prefix, options.call_timeout_s)
        self.pool = pool
        self._streams = streams
        self._due: dict[int, bool] = {}
        """Slots whose stream must be read -> whether the server must be told that the slot is moving to it."""
        self._unsure: dict[int, None] = {}
        """Slots to check: whether their streams are still those that were read."""
        self._handed: deque[tuple[float, int, bool, bool]] = deque()
        """From other threads: when to begin, slot, asking, check."""
        self._later: list[tuple[float, int, bool, bool]] = []
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._barriers = self._passed = self._pinged = 0
        """How many barriers were requested, how many were passed, and how many have reached the server."""
        self._has_passed = threading.Condition()
        self._begun_late = 0
        """The number of slots whose reading began late, and that were not reported yet."""
        self._next_look = 0.0
        self._heard_s = 0.0
        self._polled: Tracked | None = None
        self._poll = select.poll()

    # ------------------------------------------------------------------------------------------------ from any thread

    @property
    def address(self) -> str:
        """The address of the server."""
        return self._listener.address

    @property
    def why_not(self) -> str | None:
        """Why this reader reads nothing now; None if it reads."""
        return self._why_not

    def open(self, slots: Collection[int]) -> None:
        """Connect, and note where reading begins. Raises NotConnected and StorageError."""
        connection = self._listener.dial()
        connection.wait_at_most(self._patience_s)
        try:
            self._begin_behind(connection, slots)
        except Refusal as refusal:
            connection.close()
            raise explain(refusal, self.address, self._stream) from refusal
        except Broken as error:
            raise StorageError(f"the connection to Redis at {self.address} was lost: {error}") from error
        self._connection = connection
        self._next_look = time.monotonic() + LOOK_EVERY_S

    def start(self) -> None:
        """Start reading."""
        self._start_threads()

    def interrupt(self) -> None:
        """Make the reader end soon."""
        self._stopped.set()
        self._ring()

    def stop(self) -> None:
        """Stop reading, and close what is open."""
        self._stop_threads()
        with self._has_passed:
            self._has_passed.notify_all()
        if not self._started:
            self._at_end()

    def _at_end(self) -> None:
        self._bell.close()
        self._ear.close()

    def hand(self, slot: int, *, asking: bool = False, check: bool = False, after_s: float = 0.0) -> None:
        """Ask for a stream to be read from this server, or to be checked."""
        self._handed.append((time.monotonic() + after_s, slot, asking, check))
        self._ring()

    def has_work(self) -> bool:
        """True if streams were handed to this reader that it has not read yet."""
        return bool(self._handed or self._later or self._due or self._unsure)

    def ask_barrier(self) -> int:
        """Ask for everything written so far to be read. Return the number to pass to `wait_for_barrier`."""
        with self._has_passed:
            self._barriers += 1
            number = self._barriers
        self._ring()
        return number

    def wait_for_barrier(self, number: int, timeout_s: float) -> bool:
        """Wait until a barrier is passed or the server cannot be reached; False if neither happens in `timeout_s`."""

        def is_over() -> bool:
            return self._passed >= number or self._why_not is not None or self._stopped.is_set()

        with self._has_passed:
            return self._has_passed.wait_for(is_over, timeout_s)

    def _ring(self) -> None:
        with suppress(OSError):  # full, so it is ringing already, or closed
            self._bell.send(b"!")

    # ------------------------------------------------------------------------------------------ the reader's thread

    def _connected(self) -> Any:
        streams = self._streams
        if self._connection is None and self.pool not in streams.servers.parts():
            for slot in {*self._due, *self._unsure, *(one[1] for one in [*self._later, *self._handed])}:
                streams.hand_over(slot)
            for work in (self._due, self._unsure, self._later, self._handed):
                work.clear()
            if streams.retire(self):
                log.info("Redis at %s has no slots of the cluster any more", self.address)
                self._stopped.set()
                return None
        return super()._connected()

    def _lose(self, why: str) -> None:
        super()._lose(why)
        with self._has_passed:
            self._has_passed.notify_all()

    def _begin_with(self, connection: Tracked) -> None:
        """Read the streams of all slots of this server, because earlier announcements are not known."""
        streams = self._streams
        slots = streams.servers.parts().get(self.pool, ())
        late = [slot for slot in slots if slot in streams.unread]
        if late:
            self._begin_late(connection, late)
        for slot in slots:
            self._due[slot] = False
            if slot in streams.tails:
                self._unsure[slot] = None
        self._next_look = time.monotonic() + LOOK_EVERY_S

    def _take(self, connection: Tracked) -> HandlerActor | None:
        self._bring(connection)
        if self._pinged < self._barriers:
            barriers = self._barriers
            # Twice: the server announces a change after the replies of the same round of its event loop.
            connection.call("PING")
            connection.call("PING")
            self._bring(connection)
            self._pinged = barriers
        if self._unsure:
            self._check(connection)
            return None
        if self._due:
            return self._read_some(connection)
        if self._passed < self._pinged:
            with self._has_passed:
                self._passed = self._pinged
                self._has_passed.notify_all()
        now_s = time.monotonic()
        if now_s >= self._next_look:
            self._next_look = now_s + LOOK_EVERY_S
            self._look_around(connection)
        elif self._wait(connection, now_s):
            self._heard_s = now_s
        elif time.monotonic() - self._heard_s >= BLOCK_S:
            connection.call("PING")
            self._heard_s = time.monotonic()
        return None

    def _bring(self, connection: Tracked) -> None:
        """Take in the announcements of the server, and the slots that other threads have handed over."""
        connection.take_pushes()  # those that came behind a reply: the socket is not readable for them again
        names, connection.changed = connection.changed, set()
        slot_of = self._streams.slot_of
        for name in names:
            slot = slot_of.get(name)
            if slot is not None:
                self._due.setdefault(slot, False)
        if connection.forgotten:
            connection.forgotten = False
            self._begin_with(connection)
        if self._handed or self._later:
            waiting, self._later = self._later, []
            while self._handed:
                waiting.append(self._handed.popleft())
            now_s = time.monotonic()
            for one in waiting:
                when_s, slot, asking, check = one
                if when_s > now_s:
                    self._later.append(one)
                elif check:
                    self._unsure[slot] = None
                else:
                    self._due[slot] = asking

    def _wait(self, connection: Tracked, now_s: float) -> bool:
        """Wait until there is something to do, at most until the next check. Return whether the server sent data."""
        until_s = min([self._next_look, now_s + BLOCK_S, *(one[0] for one in self._later)])
        if not connection.has_decrypted():
            has_data = False
            for fd, _ in self._poll_of(connection).poll(max(until_s - now_s, 0.0) * 1000):
                if fd == self._ear.fileno():
                    with suppress(BlockingIOError):
                        self._ear.recv(1 << 16)
                else:
                    has_data = True
            if not has_data:
                return False
        connection.receive()
        connection.take_pushes()
        return True

    def _poll_of(self, connection: Tracked) -> select.poll:
        """Return what waits for the server and for other threads."""
        if self._polled is not connection:
            self._polled = connection
            self._poll = select.poll()
            self._poll.register(connection.fileno(), select.POLLIN)
            self._poll.register(self._ear, select.POLLIN)
        return self._poll

    def _exchange(self, connection: Tracked, commands: Iterable[bytes], count: int) -> list[Any]:
        connection.send(b"".join(commands))
        replies: list[Any] = []
        while len(replies) < count:
            reply = connection.next_reply()
            if reply is NOT_ALL:
                connection.receive()
            else:
                replies.append(reply)
        return replies

    def _read_some(self, connection: Tracked) -> HandlerActor | None:
        streams = self._streams
        late = [slot for slot in self._due if slot in streams.unread] if streams.unread else []
        if late:
            for slot in late:
                del self._due[slot]
            self._begin_late(connection, late)  # all of them, before that is reported
        some = list(self._due.items())[:_AT_ONCE]
        for slot, _ in some:
            del self._due[slot]
        count = max(min(COUNT, _MOST_ENTRIES // max(len(some), 1)), 1)
        commands: list[bytes] = []
        asked: list[bytes] = []
        for slot, asking in some:
            tail = streams.tails.get(slot)
            if asking:
                commands.append(_ASKING)
            asked.append(BEGINNING if tail is None else tail.id)
            commands.append(self._first(slot, count) if tail is None else tail.read_next(count))
        replies = iter(self._exchange(connection, commands, len(commands)))
        here = len(some) == 1 and not self._is_away
        handler: HandlerActor | None = None
        refused: list[tuple[int, Refusal]] = []
        with streams.exclusive:
            for (slot, asking), before in zip(some, asked, strict=True):
                if asking:
                    next(replies)
                reply = next(replies)
                if type(reply) is Refusal:
                    refused.append((slot, reply))
                elif not reply:
                    known = streams.tails.get(slot)
                    if known is not None and time.monotonic() - known.read_s > _RECENT_S:
                        self._unsure[slot] = None
                else:
                    handler = self._take_entries(connection, slot, before, reply, count, here=here) or handler
        for slot, refusal in refused:
            self._redirect(slot, refusal)
        return handler

    def _first(self, slot: int, count: int) -> bytes:
        return pack_text(("XREAD", "COUNT", str(count), "STREAMS", self._streams.keys[slot][0], BEGINNING))

    def _take_entries(
        self, connection: Tracked, slot: int, before: bytes, reply: Any, count: int, *, here: bool
    ) -> HandlerActor | None:
        entries = next(iter(reply.values()))
        tail = self._streams.tail(slot)
        if tail.is_busy or tail.id != before:
            # The reader of another server is checking it, or has read it in the meantime.
            self._later.append((time.monotonic() + _LATER_S, slot, False, False))
            return None
        tail.server = self.address
        self._streams.outlet.note_arrivals_in(slot)
        handler = tail.take_in(connection, entries, here=here and len(entries) == 1)
        if len(entries) >= count:
            self._due.setdefault(slot, False)
        return handler

    def _redirect(self, slot: int, refusal: Refusal) -> None:
        """Ask for the stream to be read from the server that has it now, because this one does not."""
        streams = self._streams
        if refusal.word in {"MOVED", "ASK"}:
            pool = streams.servers.named_by(refusal, self.address)
            pause_s = _LATER_S if pool is self.pool else 0.0
            streams.hand_over(slot, pool, asking=refusal.word == "ASK", after_s=pause_s)
        elif refusal.word in PASSING:
            self._later.append((time.monotonic() + _LATER_S, slot, False, False))
        else:
            raise refusal

    # -------------------------------------------------------------------------------------------------------- checks

    def _begin_behind(self, connection: Tracked, slots: Collection[int]) -> list[int]:
        """Note the newest events of slots whose position is not known, and return these slots."""
        streams = self._streams
        found: list[int] = []
        counted: dict[int, int] = {}
        commands = [pack_text(("GET", streams.keys[slot][1])) for slot in slots]
        for slot, reply in zip(slots, self._in_parts(connection, commands), strict=True):
            if type(reply) is not Refusal:
                found.append(slot)
                if reply is not None:
                    counted[slot] = int(reply)
            elif reply.word not in {"MOVED", "ASK", *PASSING}:
                raise reply
        commands = []
        for slot in counted:
            shape = streams.shape.in_slot(slot)
            commands.append(pack_text(("XREVRANGE", shape.stream, "+", "-", "COUNT", "1")))
            commands.append(pack_text(life_parts(shape)))
        replies = iter(self._in_parts(connection, commands))
        for slot, its_number in counted.items():
            newest, life = next(replies), next(replies)
            if type(newest) is Refusal or type(life) is Refusal:
                found.remove(slot)
                continue
            tail = streams.tail(slot)
            with streams.exclusive:
                tail.server = self.address
                tail.begin_at(its_number, newest, life_in(life))
        streams.unread.difference_update(found)
        return found

    def _begin_late(self, connection: Tracked, slots: Collection[int]) -> None:
        """Begin to read the streams whose server could not be reached when the engine was opened."""
        streams = self._streams
        found = self._begin_behind(connection, slots)
        self._begun_late += len(found)
        when_s = time.monotonic() + _LATER_S
        mine = set(streams.servers.parts().get(self.pool, ()))
        for slot in set(slots) - set(found):
            if slot in mine:
                self._later.append((when_s, slot, False, False))
            else:
                streams.hand_over(slot, after_s=_LATER_S)
        # Reported when all of them are being read, because nothing is missed from then on.
        if self._begun_late and not mine & streams.unread:
            count, self._begun_late = self._begun_late, 0
            streams.losses.note(
                0,
                f"Redis at {self.address} could not be reached when the engine was opened: what was published in "
                f"{count} slots of the cluster from then until now has reached no trigger of this engine",
            )

    def _in_parts(self, connection: Tracked, commands: list[bytes]) -> list[Any]:
        replies: list[Any] = []
        for at in range(0, len(commands), _AT_ONCE):
            part = commands[at : at + _AT_ONCE]
            replies += self._exchange(connection, part, len(part))
        return replies

    def _check(self, connection: Tracked) -> None:
        """Check whether streams are still those that were read."""
        streams = self._streams
        some = [streams.tail(slot) for slot in list(self._unsure)[:_AT_ONCE]]
        commands: list[bytes] = []
        asked: list[tuple[bytes, int, int]] = []
        for tail in some:
            del self._unsure[tail.slot]
            asked.append((tail.id, tail.published.newest, tail.wanted))
            commands += tail.check_commands()
        replies = iter(self._exchange(connection, commands, len(commands)))
        for tail, (before, published, wanted) in zip(some, asked, strict=True):
            counted, last = next(replies), next(replies)
            refusal = next((one for one in (counted, last) if type(one) is Refusal), None)
            if refusal is not None:
                self._redirect(tail.slot, refusal)
                continue
            number = int(counted or 0)
            with streams.exclusive:
                if tail.is_busy or tail.id != before:
                    continue
                tail.server = self.address
                if tail.fits(number, last, published, wanted):
                    if number > tail.number:
                        self._due.setdefault(tail.slot, False)
                    continue
                tail.is_busy = True
            self._look(connection, tail)

    def _look(self, connection: Tracked, tail: SlotTail) -> None:
        try:
            tail.look(connection)
        except Refusal as refusal:
            self._redirect(tail.slot, refusal)
        else:
            self._due.setdefault(tail.slot, False)
        finally:
            tail.is_busy = False

    def _look_around(self, connection: Tracked) -> None:
        """Read the map of the slots, and ask for checks of all streams of this server that had entries."""
        streams = self._streams
        streams.servers.note_map(connection.call("CLUSTER", "SLOTS"), self.address.rpartition(":")[0])
        streams.follow_map()
        if streams.retire(self):
            self._stopped.set()
            return
        for slot in streams.servers.parts().get(self.pool, ()):
            tail = streams.tails.get(slot)
            if tail is not None:
                tail.forget_old()
                self._unsure[slot] = None


_ASKING: Final = pack_text(("ASKING",))
