"""The actor that makes scopes remove expired keys. It decides when, and how many at a time."""

from __future__ import annotations

import heapq
import sys
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.containment import Log, described
from scopestate.actors.dispatcher import weakly
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.turn import BUSY, TurnActor
from scopestate.actors.wheel import NEVER
from scopestate.errors import EngineClosed, EngineForked, ScopestateError, StorageError
from scopestate.ops.values import class_name
from scopestate.ops.writes import EXPIRED_AT_ONCE, Expire, Expired

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scopestate.actors.clock import Clock
    from scopestate.actors.dispatcher import Dispatcher, Timer
    from scopestate.actors.ports import Store
    from scopestate.actors.scope import ScopeActor

log: Final = Log("scopestate.scope")

WINDOW_S: Final = 0.01
_ALMOST_S: Final = 0.0001
"""What is left of a window that has ended: sums of seconds are not exact."""
KEYS_OF_A_WINDOW: Final = 1000
"""The most keys that are removed in each window, over all scopes: the rest of the time is for other work."""
LONGEST_S: Final = 1.0
"""The longest sleep while keys have deadlines. Neither a clock that is set forward nor the end of a suspend wakes a
timer."""
FIRST_PAUSE_S: Final = 0.05
"""The pause after a refused removal. It doubles with each further refusal."""
LONGEST_PAUSE_S: Final = 10.0
FULL_PAUSE_S: Final = 1.0
"""The longest pause for a handler that is full."""
AHEAD_MS: Final = 60_000
"""A time of day that was set back by more than this is a problem too: deadlines given as a time of day come early."""
OVERDUE_MS: Final = 10_000
"""Keys that are not removed this many milliseconds after their deadline are reported as a health problem."""


class Begin(msgspec.Struct, frozen=True):
    """Ask the store which scopes have keys with deadlines."""


class Look(msgspec.Struct, frozen=True):
    """A scope may have keys that have expired."""


class Expect(msgspec.Struct, frozen=True):
    """A scope must be checked by a time, in milliseconds since the epoch."""

    scope: str
    ms: int


class Answered(msgspec.Struct, frozen=True, eq=False):
    """The turn that a scope was asked to run has ended."""

    asked: _Asked
    reply: Reply[Expired]


class _Asked(msgspec.Struct, eq=False):
    """A turn that removes keys of one scope, and has not ended."""

    scope: str
    actor: ScopeActor
    limit: int
    window_s: float
    expected_ms: int = NEVER
    """The latest time at which the scope must be checked again, according to messages that came since."""


class _Refused(msgspec.Struct):
    """A scope that has refused to remove its keys, and has not caught up since."""

    since_ms: int
    problem: str = ""
    limit: int = EXPIRED_AT_ONCE
    pause_s: float = 0.0


class ExpiryActor(TurnActor):
    """Has each scope remove its keys whose deadline has passed, at the deadline (docs/design/0039-expiry.md).

    It knows for each scope when to look at it next; the scope knows which keys that is about. It sends the scope an
    `Expire` turn, in order with the calls of the scope, and waits for the answer before the next one. The scope with
    the oldest deadline comes first, in memory or not. A turn that is refused, because a handler is full or the store
    fails, is tried again: nothing is lost, since the deadline is in the scope.
    """

    def __init__(self, dispatcher: Dispatcher, clock: Clock, directory: Mapping[str, ScopeActor]) -> None:
        super().__init__(dispatcher)
        self._clock = clock
        self._directory = directory
        self._store: Store | None = None
        self._next: dict[str, int] = {}
        """Scope -> when to look at it, in milliseconds since the epoch. Other entries in the heap are out of date."""
        self._heap: list[tuple[int, str]] = []
        self._asked: dict[str, _Asked] = {}
        self._refused: dict[str, _Refused] = {}
        self._timer: Timer | None = None
        self._window_s = 0.0
        self._left = KEYS_OF_A_WINDOW
        self._ended = False
        self.expired = 0
        """Keys removed so far."""
        self.late_ms = 0
        """How long after its deadline the oldest key of the last removal was removed."""

    # ---------------------------------------------------------------------------------------------- from any thread

    def keep_in(self, store: Store | None) -> None:
        """The scopes are saved in this store."""
        self._store = store

    def begin(self) -> None:
        """Look after the scopes of the store too, if keys of it have deadlines."""
        try:
            none = self._store is None or not self._store.due(1)
        except StorageError:
            none = False
        if not none:
            self.tell(Begin())

    def _begin_again(self) -> None:
        self.tell(Begin())

    def expect(self, scope: str, ms: int) -> None:
        """Have a scope looked at by `ms`, in milliseconds since the epoch. Idempotent."""
        # What is planned already need not be told: a scope in the table will be asked, and is read again after its
        # answer. Each refused turn of a scope comes here.
        if not self._ended and ms < self._next.get(scope, NEVER):
            self._enqueue(Expect(scope, ms))

    def end(self) -> None:
        """Remove no more keys. Idempotent."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def scopes(self) -> int:
        """Return the number of scopes that have keys with deadlines, as far as is known."""
        return len(self._next.keys() | self._asked.keys())

    def problems(self) -> list[str]:
        """Return what stands in the way of removing keys, for `Health.problems`."""
        now_ms = self._clock.now_ms()
        found = [
            f"expired keys of scope {scope!r} could not be removed and will be retried: {refused.problem}"
            for scope, refused in list(self._refused.items())
            if now_ms - refused.since_ms > OVERDUE_MS
        ][:10]
        late_ms = now_ms - min(self._heap[:1], default=(now_ms, ""))[0]
        if late_ms > OVERDUE_MS and not self._ended and not found:
            found.append(f"keys that expired {late_ms / 1000:.0f} s ago are not removed yet; reads do not see them")
        if self._next and (ahead_ms := self._clock.ahead_ms()) > AHEAD_MS:
            found.append(
                f"the time of day was set back: deadlines follow a clock that is {ahead_ms / 1000:.0f} s ahead of it"
            )
        return found

    # -------------------------------------------------------------------------------------------------------- turns

    def on_receive(self, message: Any) -> Any:
        if self._ended:
            return
        match message:
            case Expect(scope=scope, ms=ms):
                asked = self._asked.get(scope)
                if asked is not None:
                    asked.expected_ms = min(asked.expected_ms, ms)
                elif scope not in self._refused and ms < self._next.get(scope, NEVER):
                    self._note(scope, ms)
            case Look():
                pass
            case Begin():
                self._ask_store()
            case Answered(asked=asked, reply=reply):
                self._settle(asked, reply)
            case _:
                raise TypeError(f"the actor for expiry does not understand {message!r:.80}")
        self._look()

    def _fail(self) -> None:
        """Log a bug in a turn, and continue after a pause."""
        log.error("a turn of the actor for expiry failed", exc_info=sys.exc_info()[1])
        self._arm(LONGEST_S)

    def _ask_store(self) -> None:
        assert self._store is not None  # else it was not asked for
        try:
            due = self._store.due(sys.maxsize)
        except StorageError as error:
            log.error("could not read from the store which keys have expired; this will be retried: %s", error)  # noqa: TRY400 - the text says it all
            self._dispatcher.call_later(LONGEST_PAUSE_S, weakly(self._begin_again))
            return
        for ms, scope in due:
            if ms < self._next.get(scope, NEVER) and scope not in self._asked:
                self._note(scope, ms)

    def _note(self, scope: str, ms: int) -> None:
        """Look at a scope at `ms`."""
        if len(self._heap) > 2 * len(self._next) + 64:
            self._heap = [(when, name) for name, when in self._next.items()]
            heapq.heapify(self._heap)
        self._next[scope] = ms
        heapq.heappush(self._heap, (ms, scope))

    def _look(self) -> None:
        """Ask the scopes that are due, and sleep until the next one is."""
        heap = self._heap
        while heap:
            now_ms = self._clock.now_ms()
            ms, scope = heap[0]
            if self._next.get(scope) != ms:
                heapq.heappop(heap)
                continue
            if ms > now_ms:
                self._arm(min((ms - now_ms) / 1000, LONGEST_S))
                return
            now_s = self._dispatcher.monotonic()
            left_s = self._window_s + WINDOW_S - now_s
            if left_s <= _ALMOST_S:
                self._window_s, self._left = now_s, KEYS_OF_A_WINDOW
            if self._left <= 0:
                self._arm(left_s)
                return
            heapq.heappop(heap)
            del self._next[scope]
            self._ask(scope)
            heap = self._heap

    def _arm(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._ended:
            self._timer = self._dispatcher.call_later(delay_s, weakly(self._ring))

    def _ring(self) -> None:
        self.tell(Look())

    # --------------------------------------------------------------------------------------------- asking one scope

    def _ask(self, scope: str) -> None:
        """Have a scope remove some of its keys."""
        refused = self._refused.get(scope)
        limit = min(self._left, EXPIRED_AT_ONCE if refused is None else refused.limit)
        reply: Reply[Expired] = self._dispatcher.reply()
        try:
            actor = self._directory[scope]
        except (EngineClosed, EngineForked):
            return
        asked = _Asked(scope, actor, limit, self._window_s)
        self._asked[scope] = asked
        self._left -= limit
        turn = Expire(limit)
        try:
            # Callers that wait come first. Without them this thread runs the turn, if the scope is in memory.
            answer = BUSY if actor.has_mail() else actor.run_now(turn)
            if answer is not BUSY:
                reply.set(answer)
        except Exception as error:  # noqa: BLE001 - what a turn may raise, such as HandlerFull
            reply.fail(error)
        if reply.done:
            self._settle(asked, reply)
            return
        reply.when_done(lambda reply: self._enqueue(Answered(asked, reply)))
        actor._enqueue(Envelope(turn, reply))

    def _settle(self, asked: _Asked, reply: Reply[Expired]) -> None:
        """Note what a scope has done, and when to look at it again."""
        scope = asked.scope
        if self._asked.get(scope) is not asked:
            return
        expected_ms = min(asked.expected_ms, asked.actor.next_due())
        removed = 0
        try:
            answer = reply.get()
        except (EngineClosed, EngineForked):
            expected_ms = NEVER
        except Exception as error:  # noqa: BLE001 - as above
            expected_ms = self._clock.now_ms() + self._note_refusal(asked, error)
        else:
            removed = answer.keys
            if removed:
                self.expired += removed
                self.late_ms = answer.late_ms
            if scope in self._refused:
                self._note_success(scope, caught_up=expected_ms > self._clock.now_ms())
        if asked.window_s == self._window_s:
            self._left += asked.limit - removed
        del self._asked[scope]
        if expected_ms < NEVER:
            self._note(scope, expected_ms)

    def _note_refusal(self, asked: _Asked, error: Exception) -> int:
        """Note why a scope has removed nothing. Returns the pause in milliseconds before it is asked again."""
        full = isinstance(error, HandlerFull)
        if full:
            problem = "a handler's mailbox is full"
        else:
            problem = str(error) if isinstance(error, ScopestateError) else f"{class_name(error)}: {described(error)}"
        refused = self._refused.get(asked.scope)
        if refused is None:
            refused = self._refused[asked.scope] = _Refused(self._clock.now_ms())
            log.warning("expired keys of scope %r could not be removed and will be retried: %s", asked.scope, problem)
        # Fewer keys at a time: those before the one that is refused are removed.
        refused.problem, refused.limit = problem, max(1, asked.limit // 2)
        longest_s = FULL_PAUSE_S if full else LONGEST_PAUSE_S
        refused.pause_s = min(max(2 * refused.pause_s, FIRST_PAUSE_S), longest_s)
        return round(refused.pause_s * 1000)

    def _note_success(self, scope: str, *, caught_up: bool) -> None:
        """Note that a scope which had refused has removed keys."""
        refused = self._refused[scope]
        if caught_up:
            del self._refused[scope]
            log.warning("all expired keys of scope %r are removed", scope)
        else:
            refused.since_ms, refused.pause_s = self._clock.now_ms(), 0.0
            refused.limit = min(2 * refused.limit, EXPIRED_AT_ONCE)
