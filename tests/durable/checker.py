"""Decides whether a recorded history keeps what durable triggers and watches promise.

A history is a list of facts in the order in which they were recorded: deliveries with their ends, ends of processes
with what was on disk then, listings of dead letters, and what each watch yielded. Real processes, killed with SIGKILL,
and simulated engines record the same facts. `violations` returns a text for each promise that is broken, with its name.

The writes of each key in a history are numbered 1, 2, 3, and the value contains the number. So the number on disk after
the end of a process shows which writes were committed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Place = tuple[str, str]
"""(scope, key)"""


class Began(NamedTuple):
    """A handler was called with an event."""

    consumer: str
    id: str
    scope: str
    key: str
    number: int
    attempt: int


class Ended(NamedTuple):
    """A handler has ended: `done`; `failed`: the event is tried again; `dead`: it was given up."""

    consumer: str
    id: str
    verdict: str = "done"


class Over(NamedTuple):
    """A process has ended: it was killed, or it closed its engine cleanly."""

    durable: Mapping[Place, int]
    """The number of each key that is on disk."""
    killed: bool = True


class Asked(NamedTuple):
    """Dead letters are about to be replayed or purged together."""

    consumer: str
    ids: frozenset[str]


class Left(NamedTuple):
    """The dead letters that a consumer has."""

    consumer: str
    ids: frozenset[str]


class Counted(NamedTuple):
    """How often the effect of each event is in the store, by deliveries that wrote it in their transaction.

    A delivery whose effect is there is over, even if the process was killed before the handler could say so.
    """

    consumer: str
    effects: Mapping[tuple[str, str, int], int]
    is_all: bool = True
    """False: of what was handled, some may not have been saved yet."""


class Finished(NamedTuple):
    """Every consumer says that it has nothing left."""

    durable: Mapping[Place, int]


Fact = Began | Ended | Over | Asked | Left | Counted | Finished


class Consumer:
    """What is known about one consumer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ids: dict[str, tuple[str, str, int]] = {}
        """Delivery id -> its event."""
        self.events: dict[tuple[str, str, int], str] = {}
        self.attempts: dict[str, tuple[int, int]] = {}
        """Delivery id -> its last attempt, and how many processes were killed before it."""
        self.over: dict[Place, set[int]] = defaultdict(set)
        """The numbers of each key that are handled or given up."""
        self.open: dict[Place, int] = {}
        """Key -> the number that a handler is handling now, in this process."""
        self.last: dict[Place, int] = {}
        """Key -> the number that began last, in this process."""
        self.highest: dict[Place, int] = {}
        """Key -> the highest number of this process."""
        self.settled: set[str] = set()
        """Deliveries that were over when an engine was closed cleanly."""
        self.done: set[str] = set()
        self.asked: frozenset[str] | None = None
        self.replayed: set[str] = set()
        """Dead letters whose replay was requested: they may be delivered again at any time, with attempts from 1 on."""


class Checker:
    """Processes the facts one after the other, and keeps the violations."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._consumers: dict[str, Consumer] = {}
        self._kills = 0

    def take(self, fact: Fact) -> None:
        """Process one more fact."""
        match fact:
            case Began():
                self._began(self._consumer(fact.consumer), fact)
            case Ended():
                self._ended(self._consumer(fact.consumer), fact)
            case Over():
                self._check_committed(fact.durable)
                self._over(killed=fact.killed)
            case Asked():
                consumer = self._consumer(fact.consumer)
                consumer.asked = fact.ids
                consumer.replayed |= fact.ids
            case Left():
                self._left(self._consumer(fact.consumer), fact.ids)
            case Counted():
                self._counted(fact)
            case Finished():
                self._check_committed(fact.durable)
                self._finished(fact.durable)

    @property
    def consumers(self) -> list[str]:
        """The names of the consumers that were called."""
        return list(self._consumers)

    def _consumer(self, name: str) -> Consumer:
        return self._consumers.setdefault(name, Consumer(name))

    def _say(self, promise: str, text: str) -> None:
        self.violations.append(f"{promise}: {text}")

    def _began(self, consumer: Consumer, fact: Began) -> None:
        place, event = (fact.scope, fact.key), (fact.scope, fact.key, fact.number)
        what = f"{consumer.name} gets {fact.scope}/{fact.key} number {fact.number} as {fact.id}, attempt {fact.attempt}"
        if consumer.ids.setdefault(fact.id, event) != event:
            self._say("same id", f"{what}; the id was that of {consumer.ids[fact.id]}")
        if consumer.events.setdefault(event, fact.id) != fact.id:
            self._say("same id", f"{what}; the event was {consumer.events[event]}")
        if fact.id in consumer.replayed:
            return
        self._check_attempt(consumer, fact, what)
        if fact.id in consumer.settled:
            self._say("not again", f"{what}; it was over when the engine was closed")
        if place in consumer.open:
            self._say("order", f"{what}, while the handler has number {consumer.open[place]}")
        if fact.number < consumer.last.get(place, 0):
            self._say("order", f"{what}, after number {consumer.last[place]}")
        missing = [number for number in range(1, fact.number) if number not in consumer.over[place]]
        if missing:
            self._say("order", f"{what}; not over are {missing[:3]}")
        consumer.open[place] = consumer.last[place] = fact.number
        consumer.highest[place] = max(consumer.highest.get(place, 0), fact.number)

    def _check_attempt(self, consumer: Consumer, fact: Began, what: str) -> None:
        """An attempt that a kill interrupted before its handler began may count too: at most one for each kill."""
        before, kills = consumer.attempts.get(fact.id, (0, 0))
        if not before < fact.attempt <= before + 1 + self._kills - kills:
            self._say("attempts", f"{what}; attempt {before} was before, and {self._kills - kills} kills since then")
        consumer.attempts[fact.id] = fact.attempt, self._kills

    def _ended(self, consumer: Consumer, fact: Ended) -> None:
        scope, key, number = consumer.ids[fact.id]
        if consumer.open.get((scope, key)) == number:
            del consumer.open[scope, key]
        if fact.verdict != "failed":
            consumer.over[scope, key].add(number)
            consumer.done.add(fact.id)

    def _check_committed(self, durable: Mapping[Place, int]) -> None:
        for consumer in self._consumers.values():
            for place, number in consumer.highest.items():
                if number > durable.get(place, 0):
                    text = f"{consumer.name} got {'/'.join(place)} number {number}, on disk is {durable.get(place, 0)}"
                    self._say("committed", text)

    def _over(self, *, killed: bool) -> None:
        self._kills += killed
        for consumer in self._consumers.values():
            if not killed:
                consumer.settled |= consumer.done
            consumer.open.clear()
            consumer.last.clear()
            consumer.highest.clear()

    def _left(self, consumer: Consumer, ids: frozenset[str]) -> None:
        asked, consumer.asked = consumer.asked, None
        if asked is None:
            return
        kept = asked & ids
        if kept and kept != asked:
            self._say("all or nothing", f"{consumer.name}: of {len(asked)} letters, {len(kept)} are left")

    def _counted(self, fact: Counted) -> None:
        for event, count in fact.effects.items():
            if count != 1:
                self._say("exactly once", f"{fact.consumer}: the effect of {event} is there {count} times")
        consumer = self._consumer(fact.consumer)
        for scope, key, number in fact.effects:
            consumer.over[scope, key].add(number)
        for place, numbers in consumer.over.items():
            for number in numbers if fact.is_all else ():
                if (*place, number) not in fact.effects:
                    self._say("exactly once", f"{fact.consumer}: {(*place, number)} is handled, without its effect")

    def _finished(self, durable: Mapping[Place, int]) -> None:
        for consumer in self._consumers.values():
            for place, last in durable.items():
                missing = [number for number in range(1, last + 1) if number not in consumer.over[place]]
                if missing:
                    text = f"{consumer.name} never handled {'/'.join(place)} numbers {missing[:3]} of {last}"
                    self._say("at least once", text)


def violations(facts: Iterable[Fact]) -> list[str]:
    """Return the broken promises of a history; empty if it keeps all."""
    checker = Checker()
    for fact in facts:
        checker.take(fact)
    return checker.violations


# -------------------------------------------------------------------------------------------------------------- watches


class Change(NamedTuple):
    """One of the changes that the engine made, in their order: the truth that watches are compared with."""

    scope: str
    key: str
    kind: str
    """`put`, `delete` or `expire`."""
    revision: int
    transaction: int
    lost: bool = False
    """True: the change was lost in a crash."""


class Watched(NamedTuple):
    """What one watch has yielded, from its opening to its end."""

    since: int
    """The watch continues after this many changes of the truth: the cursor that it was opened with is after those."""
    saw: Sequence[tuple[str, str, str, int]]
    """(scope, key, kind, revision) of each change, in order."""
    marks: Mapping[int, int] = {}
    """After how many yielded changes a `progress` mark came -> how many changes of the truth it covered."""
    refused: str | None = None
    """The reason of `Compacted`, if the watch was refused."""
    overrun: bool = False
    """True: the watch ended because its reader was too slow. It yields the remaining changes when it continues."""
    complete: bool = True
    """True: the watch was read until it yielded nothing more."""
    there: int = 0
    """A watch without a cursor may leave out the changes made before it began: this many."""
    is_mark: bool = False
    """True: the cursor is from a mark of many scopes, which may be older than what was saved before a crash."""


def watch_violations(truth: Sequence[Change], watched: Watched, wanted: Iterable[int], trimmed: int = 0) -> list[str]:
    """Return the promises that a watch has broken. `wanted`: the places in the truth that its filters match.

    `trimmed`: this many changes of the truth are no longer kept, so that an earlier cursor may be refused.
    """
    wants = sorted(wanted)
    places = {(*_told(truth[place]),): place for place in wants}
    found: list[str] = []
    if watched.refused is not None:
        lost = watched.is_mark or any(truth[place].lost for place in range(watched.since))
        if watched.refused == "lost in a crash" and not lost:
            found.append("resumable: refused as lost in a crash, and nothing was")
        if watched.refused == "trimmed" and watched.since >= trimmed:
            found.append(f"resumable: refused as trimmed at {watched.since}, and only {trimmed} are")
        return found
    expected = [place for place in wants if place >= max(watched.since, watched.there) and not truth[place].lost]
    seen: list[int] = []
    for change in watched.saw:
        place = places.get(change)
        if place is None:
            found.append(f"ordered: {change} never happened, or is not asked for")
            continue
        if place in seen:
            found.append(f"unique: {change} comes twice")
        elif seen and place < max(seen):
            found.append(f"ordered: {change} comes after {_told(truth[max(seen)])}")
        elif place < watched.since:
            found.append(f"resumable: {change} was told before the cursor")
        seen.append(place)
    end = max(seen, default=watched.since - 1)
    if watched.complete and not watched.overrun:
        end = len(truth)
    gaps = [place for place in expected if place <= end and place not in seen]
    found += [f"no gap: {_told(truth[place])} is missing" for place in gaps[:3]]
    found += _torn(truth, seen, wants, complete=watched.complete and not watched.overrun)
    for after, told in watched.marks.items():
        early = [place for place in expected if place < told and place not in seen[:after]]
        found += [f"bookmarks: {_told(truth[place])} comes after a mark that stands behind it" for place in early[:3]]
    return found


def _told(change: Change) -> tuple[str, str, str, int]:
    return change.scope, change.key, change.kind, change.revision


def _torn(truth: Sequence[Change], seen: Sequence[int], wants: Sequence[int], *, complete: bool) -> list[str]:
    """Return the transactions whose changes do not come together."""
    found = []
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place in wants:
        groups[truth[place].scope, truth[place].transaction].append(place)
    order = {place: number for number, place in enumerate(seen)}
    for (scope, number), group in groups.items():
        there = [order[place] for place in group if place in order]
        between = len(there) > 1 and there[-1] - there[0] != len(there) - 1
        if between or (complete and 0 < len(there) < len(group) and group[0] in order):
            found.append(f"atomic: transaction {number} of {scope} is torn")
    return found
