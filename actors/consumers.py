"""The consumers of a store's journal: which there are, how far they are, and what the next save stores of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from scopestate.actors.backlog import size_of
from scopestate.actors.bound import JournalBound
from scopestate.actors.consuming import Consumers, ConsumerStatus, DeadLetter
from scopestate.actors.containment import Log
from scopestate.actors.journal_consumer import Filter, JournalConsumer
from scopestate.actors.shared_consumer import SharedConsumer, standing_by
from scopestate.actors.snapshot import Flush
from scopestate.errors import Compacted, ConfigError
from scopestate.ops.cursors import ManyCursor, read_start
from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits
    from scopestate.actors.dispatcher import Dispatcher
    from scopestate.actors.feed import Feed
    from scopestate.actors.journal import ConsumerChange, Journal, Letter, Pending
    from scopestate.actors.snapshot import SnapshotActor
    from scopestate.ops.results import StateEvent
    from scopestate.ops.triggers import Trigger

log = Log("scopestate.triggers")

SAVED_AFTER_S: Final = 0.1
"""A few outcomes wait at most this long to be saved."""
SETTLE_AGAIN_S: Final = 0.05
"""How long a check of open deliveries waits for a wake-up: the end of a pause causes none."""


class JournalConsumers(Consumers):
    """The consumers of a store's journal."""

    def __init__(
        self,
        journal: Journal,
        feed: Feed,
        snapshot: SnapshotActor,
        dispatcher: Dispatcher,
        now_ms: Callable[[], int],
        durability_of: Callable[[str], str],
        limits: Limits,
        claim_s: float = 0.0,
    ) -> None:
        """`claim_s`: for how many seconds joining engines may claim what was begun in the previous session."""
        self._claim_s = claim_s
        self._claims_end_s = dispatcher.monotonic() + claim_s
        self.journal = journal
        self.feed = feed
        self.dispatcher = dispatcher
        self.now_ms = now_ms
        self._snapshot = snapshot
        self.durability_of = durability_of
        self._exclusive = Guard()
        self.settled = feed.position
        self._by_name: dict[str, JournalConsumer] = {}
        self._by_number: dict[int, JournalConsumer] = {}
        self._asked = False
        self._many = False
        self._collected: list[tuple[JournalConsumer, ConsumerChange]] = []
        self._next_s = 0.0
        for saved in journal.consumers():
            self._add(JournalConsumer(saved, self))
        self.bound = JournalBound(
            journal, feed, limits, dispatcher, self._by_number, self.flush_soon, snapshot.save_acks_soon
        )
        self.bound.begin()
        feed.on_committed(self.committed)

    def _add(self, consumer: JournalConsumer) -> None:
        self._by_name[consumer.name] = self._by_number[consumer.number] = consumer
        wanted = consumer.filter
        consumer.interest = self.feed.want(wanted.scope, wanted.scope_prefix or "", consumer.number)

    def change_filter(self, consumer: JournalConsumer, wanted: Filter) -> None:
        """Keep events of other scopes for a consumer from now on."""
        old, consumer.filter = consumer.interest, wanted
        self.journal.change_filter(consumer.number, _text(wanted))
        consumer.interest = self.feed.want(wanted.scope, wanted.scope_prefix or "", consumer.number)
        if old is not None:
            self.feed.unwant(old)
        self.bound.ask()

    # ------------------------------------------------------------------------------------------------------ consumers

    @exclusive
    def open(self, name: str, trigger: Trigger) -> JournalConsumer:
        if trigger.scope is not None and self.durability_of(trigger.scope) == "memory":
            raise ConfigError(no_memory_for(trigger.scope))
        consumer = self._by_name.get(name)
        if consumer is None:
            done = self._start(trigger)
            saved = self.journal.create_consumer(name, _text(Filter.of(trigger)), done, self.now_ms())
            consumer = JournalConsumer(saved, self)
            if done < self.settled:
                consumer.read_from_disk()
            self._add(consumer)
            self.bound.ask()
        return consumer

    @property
    def expects_claims(self) -> bool:
        """True while engines that handle what was begun in the previous session may join."""
        return self._claims_end_s > self.dispatcher.monotonic()

    def await_claims(self, for_s: float | None = None) -> None:
        """Unless the time for claims is over, let it end `for_s` seconds from now; None: as after opening the store.

        For the server of the followers: an engine can join only when it is ready, and on a busy machine that takes
        longer than the claims would last. From any thread.
        """
        if self.expects_claims:
            self._claims_end_s = self.dispatcher.monotonic() + (self._claim_s if for_s is None else for_s)

    def end_claims_in_time(self, shared: SharedConsumer) -> None:
        """Call `shared.end_claims` when the time for claims is over."""
        left_s = self._claims_end_s - self.dispatcher.monotonic()
        if left_s <= 0:
            shared.end_claims()
        else:
            # It may end sooner by then, or later.
            self.dispatcher.call_later(min(left_s, self._claim_s), lambda: self.end_claims_in_time(shared))

    def share(self, name: str, trigger: Trigger) -> SharedConsumer:
        return self.open(name, trigger).share()

    def served_elsewhere(self) -> list[str]:
        return [one.name for one in self._all() if one.is_served_elsewhere()]

    def settle(self, names: Sequence[str], marks: Mapping[str, int], wait_s: float) -> dict[str, int]:
        monotonic = self.dispatcher.monotonic
        ends_s = monotonic() + wait_s
        shared = {name: one.share() for name in names if (one := self._by_name.get(name)) is not None}
        if any(name not in marks for name in shared):
            self.flush()
        left = {name: marks.get(name, self.settled) for name in shared}
        news = threading.Event()
        ends = [one.watch(news.set) for one in shared.values()]
        try:
            while left := {name: mark for name, mark in left.items() if not shared[name].is_settled(mark)}:
                left_s = ends_s - monotonic()
                if left_s <= 0:
                    break
                news.wait(min(left_s, SETTLE_AGAIN_S))
                news.clear()
        finally:
            for end in ends:
                end()
        return left

    def _start(self, trigger: Trigger) -> int:
        """Return the position after which a new consumer begins. Raises Compacted and InvalidRegistration."""
        if trigger.start == "now":
            self.feed.number()
            return self.feed.position
        if trigger.start == "earliest":
            return 0
        return position_of(trigger.start, self.feed, self.journal)

    def _all(self) -> list[JournalConsumer]:
        # A copy, without the guard: it is held during waits for the disk, and the health of an engine must not wait.
        by_name = self._by_name.copy()
        return [by_name[name] for name in sorted(by_name)]

    def names(self) -> list[str]:
        return [consumer.name for consumer in self._all()]

    def states(self) -> list[tuple[str, str | None]]:
        return [(consumer.name, consumer.paused()) for consumer in self._all()]

    def status(self, name: str) -> ConsumerStatus | None:
        consumer = self._by_name.get(name)
        return None if consumer is None else consumer.status()

    def pause(self, name: str, why: str) -> bool:
        return self._set_paused(name, why)

    def resume(self, name: str) -> bool:
        return self._set_paused(name, None)

    def _set_paused(self, name: str, why: str | None) -> bool:
        consumer = self._by_name.get(name)
        if consumer is None:
            return False
        if why is not None and consumer.trimmed is not None:
            return True  # what it has lost is reported when it is resumed
        self.journal.pause_consumer(consumer.number, why)
        consumer.set_paused(why)
        return True

    @exclusive
    def forget(self, name: str) -> bool:
        consumer = self._by_name.get(name)
        if consumer is None:
            return False
        self.journal.forget_consumer(consumer.number)
        consumer.forgotten = True
        del self._by_name[name], self._by_number[consumer.number]
        if consumer.interest is not None:
            self.feed.unwant(consumer.interest)
        self.bound.ask()
        return True

    def limits_changed(self) -> None:
        self.bound.ask()

    def problems(self) -> list[str]:
        standing = [one.name for one in self._all() if one.shared is not None and one.shared.stands_by_here]
        return [*[why for why in (self.feed.over, self.bound.problem) if why], *map(standing_by, standing)]

    def lag(self, after: int, floor: int) -> tuple[int, int]:
        """Return how many events are after `floor`, and when the oldest one after `after` was made (ms; 0: none)."""
        oldest = self.journal.read(after, most=1)
        return self.journal.count_behind(floor), oldest[0].time_ms if oldest else 0

    # ---------------------------------------------------------------------------------------------------------- saves

    def committed(self, events: Sequence[StateEvent]) -> None:
        """Take these events, which are now on disk. On the saving thread, after each save."""
        self.settled = self.journal.settled
        size = sum(map(size_of, events))
        for consumer in list(self._by_number.values()):
            consumer.committed(events, size, self.settled)
        self.bound.look(events, size)

    def note_ended(self, *, many: bool) -> None:
        """Save that attempts have ended: at once if there are many, else soon."""
        if many:
            self.flush_soon()
        elif not self._asked:
            self._asked = True
            self._snapshot.save_acks_soon(SAVED_AFTER_S)

    def flush_soon(self) -> None:
        """Arrange that all ended deliveries are saved soon."""
        if not self._many:
            self._many = True
            self._snapshot.save_acks_soon(0.0)

    def flush(self) -> None:
        """Return once all ended deliveries are saved. Raises StorageError."""
        self._snapshot.ask(Flush()).get()

    def collect(self, *, everything: bool) -> list[ConsumerChange]:
        """Return what the current save has to write about consumers.

        On the saving thread. Each save could write a little. Without `everything` it only does so from time to time, or
        if there is much.
        """
        now_s = self.dispatcher.monotonic()
        if not everything and not self._many and now_s < self._next_s:
            self.bound.fresh = False
            return []
        self.bound.fresh = True
        self._many = self._asked = False
        self._next_s = now_s + SAVED_AFTER_S / 2
        changes = [(consumer, consumer.collect()) for consumer in list(self._by_number.values())]
        self._collected = [(consumer, change) for consumer, change in changes if change is not None]
        return [change for _, change in self._collected]

    def saved(self) -> None:
        """Note that the last result of `collect` is on disk. Without this call, the next `collect` returns it again."""
        for consumer, change in self._collected:
            consumer.saved(change)
        self._collected = []

    def acks_saved(self, acks: Iterable[tuple[int, int]]) -> None:
        """Note that these acknowledgements of transactions, as consumer and position, are on disk."""
        for number, position in acks:
            consumer = self._by_number.get(number)
            if consumer is not None:
                consumer.joined_is_saved(position)

    # --------------------------------------------------------------------------------------------------- dead letters

    def _number_of(self, consumer: str | None) -> int | None:
        """Return the number of a consumer; -1, which no consumer has, if it does not exist."""
        if consumer is None:
            return None
        found = self._by_name.get(consumer)
        return -1 if found is None else found.number

    def _letter(self, letter: Letter) -> DeadLetter | None:
        consumer = self._by_number.get(letter.consumer)
        if consumer is None:
            return None
        return DeadLetter(
            str(letter.id),
            consumer.name,
            letter.event,
            letter.attempts,
            letter.first_ms,
            letter.died_ms,
            letter.error,
            letter.traceback,
        )

    def letters(self, consumer: str | None, limit: int, after: str | None) -> list[DeadLetter]:
        self.flush()
        found = self.journal.letters(self._number_of(consumer), after=_id(after) if after else 0, most=limit)
        return [letter for one in found if (letter := self._letter(one)) is not None]

    def letter(self, letter_id: str) -> DeadLetter | None:
        self.flush()
        found = self.journal.letter(_id(letter_id))
        return None if found is None else self._letter(found)

    def replay(self, consumer: str | None, ids: Sequence[str] | None, *, reset: bool) -> int:
        self.flush()
        numbers = None if ids is None else [_id(one) for one in ids]
        replayed = self.journal.replay(numbers, self._number_of(consumer), reset=reset)
        by_consumer: dict[int, list[Pending]] = {}
        for number, pending in replayed:
            by_consumer.setdefault(number, []).append(pending)
        for number, deliveries in by_consumer.items():
            if (one := self._by_number.get(number)) is not None:
                one.reopen(deliveries)
        return len(replayed)

    def purge(self, consumer: str | None, ids: Sequence[str] | None, *, before_ms: int | None) -> int:
        self.flush()
        numbers = None if ids is None else [_id(one) for one in ids]
        count, released = self.journal.purge(numbers, self._number_of(consumer), before_ms=before_ms)
        held: dict[int, list[int]] = {}
        for number, position in released:
            held.setdefault(number, []).append(position)
        for number, one in list(self._by_number.items()):
            one.purged(held.get(number, []))
        if released:
            self.bound.ask()
        return count

    def count(self, consumer: str | None) -> int:
        self.flush()
        return self.journal.count_letters(self._number_of(consumer))


def _text(wanted: Filter) -> str:
    return msgspec.json.encode(wanted).decode()


def _id(letter_id: str) -> int:
    """Return the number of a letter; -1, which no letter has, for a text that is not an id."""
    return int(letter_id) if letter_id.isascii() and letter_id.isdigit() and len(letter_id) < 19 else -1


def no_memory_for(scope: str) -> str:
    """Return why a scope that is never saved has no durable trigger."""
    return (
        f"a durable trigger needs what is on disk, and scope {scope!r} has durability memory: give it "
        "`durability: interval` or `commit` under `scopes:`, or leave out `durable`"
    )


def position_of(cursor: str, feed: Feed, journal: Journal) -> int:
    """Return the position after which a consumer that starts at a cursor begins.

    Raises InvalidCursor, and Compacted if the journal does not have what follows it.
    """
    found = read_start(cursor)
    if found.store != feed.store_id:
        raise Compacted(cursor, "other store")
    if isinstance(found, ManyCursor):
        position = found.position or 0
        if (gone := journal.gone(found.epoch, position)) is not None:
            raise Compacted(cursor, gone)
        return position
    revision = found.revision or 0
    if (gone := journal.gone_in_scope(found.scope, revision)) is not None:
        raise Compacted(cursor, gone)
    following = journal.read_scope(found.scope, revision, most=1)
    return following[0].position - 1 if following else feed.position
