"""The thread that tells Redis what an engine of a group has handled, and that it still works on the rest."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from scopestate.errors import NotConnected
from scopestate.persistence.redis.connection import NOT_ALL, Broken, Connection, Refusal, Target, pack

log = logging.getLogger("scopestate.persistence.redis")

_SETTLED_S: Final = 2.0
"""How long after a batch it is looked whether the one before it is known: its engine may be about to say so."""
_ENDS_KEPT: Final = 10_000
_PAUSE_S: Final = 0.5
"""Between attempts to connect."""
_DEAD_BEATS: Final = 40
"""A consumer that holds nothing and has not been heard of for so many beats is removed."""

# KEYS: the stream. ARGV: the group, the least idle time in ms, and the only name to look at, or ''.
_REMOVE_IDLE: Final = b"""
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #row, 2 do consumer[row[i]] = row[i + 1] end
  if consumer.pending == 0 and consumer.idle >= tonumber(ARGV[2]) and (ARGV[3] == '' or ARGV[3] == consumer.name) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
  end
end
"""


class Group(NamedTuple):
    """Names of the consumer group and of this engine in it."""

    stream: str
    name: str
    me: str
    """The consumer: another one for each engine."""
    ends: str
    """A sorted set of the numbers with which batches ended: a batch that begins elsewhere begins behind a gap."""


class Keeper:
    """Acknowledges, keeps alive, and looks for gaps, on a connection and a thread of its own.

    The reader's connection waits for new entries, and handlers end meanwhile. Methods from any thread.
    """

    def __init__(
        self,
        target: Target,
        group: Group,
        claim_after_s: float,
        beat_s: float,
        note_loss: Callable[[int, str], object],
    ) -> None:
        """`beat_s`: how often what is held is shown to be alive."""
        self._target = target
        self._group = group
        self._idle_ms = int(claim_after_s * 1000 / 4 * _DEAD_BEATS)
        self._beat_s = beat_s
        self._note_loss = note_loss
        self.held: dict[bytes, None] = {}
        """Ids that this engine has taken and not acknowledged yet."""
        self._room = threading.Event()
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._done: list[bytes] = []
        self._ends: list[int] = []
        self._checks: list[tuple[float, int]] = []
        self._next_beat = 0.0
        self._connection: Connection | None = None
        self._thread: threading.Thread | None = None
        self._ending = False
        self._why_not: str | None = None

    # ----------------------------------------------------------------------------------------------- for the reader

    def start(self) -> None:
        """Begin; once."""
        self._next_beat = time.monotonic() + self._beat_s
        self._thread = threading.Thread(target=self._run, name="scopestate-redis-keeper", daemon=True)
        self._thread.start()

    def hold(self, ids: Iterable[bytes]) -> None:
        """Note what was taken; kept alive from here on."""
        self.held.update(dict.fromkeys(ids))

    def has_room(self, most: int, stopped: threading.Event) -> bool:
        """Wait a moment until fewer than `most` entries are held; False if they are not."""
        while len(self.held) >= most and not stopped.is_set():
            self._room.clear()
            # Looked at again: one may have gone before the flag was cleared. The pause lets the reader see its end.
            if len(self.held) >= most and not self._room.wait(0.2):
                return False
        return not stopped.is_set()

    def note(self, first: int, last: int) -> None:
        """Note the numbers of a batch of new entries."""

        def enter() -> None:
            self._ends.append(last)
            self._checks.append((time.monotonic() + _SETTLED_S, first))

        self._queue.put(enter)

    def acknowledge(self, ids: list[bytes]) -> None:
        """Tell Redis that these were handled."""
        self._queue.put(lambda: self._done.extend(ids))

    def problem(self) -> str | None:
        """Return why handled events cannot be acknowledged now; None if they can."""
        return None if self._why_not is None else f"handled events cannot be acknowledged: {self._why_not}"

    def end(self) -> None:
        """Acknowledge what is handled by now, if there is a connection, and end. Idempotent."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    # ------------------------------------------------------------------------------------------ the keeper's thread

    def _run(self) -> None:
        while not self._ending:
            self._collect()
            try:
                self._work()
                self._why_not = None
            except (Broken, NotConnected, Refusal) as error:
                if self._why_not is None:
                    log.warning("%s; handled events are acknowledged later", error)
                self._why_not = str(error)
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None
            except Exception:
                log.exception("acknowledging the events of Redis at %s failed", self._target.address)
        if self._connection is not None:
            self._connection.close()

    def _collect(self) -> None:
        """Wait for something to tell, or until something is due."""
        if self._why_not is not None:
            wait_s = _PAUSE_S
        else:
            due = min([self._next_beat, *(due for due, _ in self._checks[:1])])
            wait_s = max(due - time.monotonic(), 0.0)
        try:
            note = self._queue.get(timeout=wait_s)
            while True:
                if note is None:
                    self._ending = True
                else:
                    note()
                note = self._queue.get_nowait()
        except queue.Empty:
            return

    def _work(self) -> None:
        group = self._group
        commands: list[tuple[Any, ...]] = []
        now = time.monotonic()
        done, ends = self._done[:1000], self._ends[:1000]
        if done:
            commands.append(("XACK", group.stream, group.name, *done))
        if ends:
            commands.append(("ZADD", group.ends, *(number for end in ends for number in (end, end))))
            commands.append(("ZREMRANGEBYRANK", group.ends, 0, -_ENDS_KEPT - 1))
        checks = [check for check in self._checks if check[0] <= now or self._ending]
        commands += [("ZREVRANGEBYSCORE", group.ends, first - 1, "-inf", "LIMIT", 0, 1) for _, first in checks]
        if now >= self._next_beat:
            commands += self._beat()
        if self._ending:
            commands.append(("EVAL", _REMOVE_IDLE, 1, group.stream, group.name, 0, group.me))
        if not commands:
            return
        replies = self._exchange(commands)
        refusals = [reply for reply in replies if type(reply) is Refusal and not _is_gone(reply)]
        if done and replies[0] in refusals:
            raise refusals[0]
        del self._done[: len(done)], self._ends[: len(ends)]
        for entry_id in done:
            self.held.pop(entry_id, None)
        self._room.set()
        self._checks = self._checks[len(checks) :]
        for (_, first), found in zip(checks, replies[(1 if done else 0) + (2 if ends else 0) :], strict=False):
            if type(found) is list:
                self._check(first, found)
        if refusals:
            raise refusals[0]

    def _beat(self) -> list[tuple[Any, ...]]:
        """Show life for what is held, and remove consumers that have shown none for long."""
        self._next_beat = time.monotonic() + self._beat_s
        group, held = self._group, list(self.held)
        commands: list[tuple[Any, ...]] = []
        if held:
            commands.append(("XCLAIM", group.stream, group.name, group.me, 0, *held, "JUSTID"))
        commands.append(("EVAL", _REMOVE_IDLE, 1, group.stream, group.name, self._idle_ms, ""))
        return commands

    def _check(self, first: int, found: list[bytes]) -> None:
        """Report a gap before the batch that began with `first`."""
        if found and int(found[0]) < first - 1:
            count = first - 1 - int(found[0])
            self._note_loss(
                count,
                f"{count} events ({int(found[0]) + 1} to {first - 1}) were trimmed from the stream "
                f"{self._group.stream!r} of Redis at {self._target.address} before any engine of the group "
                f"{self._group.name!r} had taken them: no trigger has seen them; raise events_kept",
            )

    def _exchange(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Send the commands together and return the replies. Raises NotConnected and Broken."""
        connection = self._connection
        if connection is None:
            connection = self._connection = self._target.dial()
        connection.send(b"".join(pack(command) for command in commands))
        replies: list[Any] = []
        while len(replies) < len(commands):
            reply = connection.next_reply()
            if reply is NOT_ALL:
                connection.receive()
            else:
                replies.append(reply)
        return replies


def _is_gone(refusal: Refusal) -> bool:
    """True if the group is gone: the reader makes it anew, and until then there is nothing to acknowledge in it."""
    return "NOGROUP" in refusal.text or "no such key" in refusal.text
