"""What an engine tells about itself."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from scopestate.parts import Parts


class Mailboxes(msgspec.Struct, frozen=True):
    """Messages that wait now."""

    scopes: int
    """In all scopes together."""
    deepest_scope: int
    router: int
    handlers: int
    """In all handlers together."""
    deepest_handler: int
    snapshot: int


class Stats(msgspec.Struct, frozen=True):
    """Counts since the engine was made, and sizes now. Read without stopping anything: not one instant's picture."""

    calls: dict[str, int]
    """Function id -> calls that were made of it from Python, refused ones included."""
    events: int
    """Changes that at least one trigger matched."""
    deliveries: int
    """Handler calls that ended well."""
    skipped: int
    """Events that a condition turned away."""
    failures: int
    """Events that their handler, condition or depth failed for good."""
    retries: int
    timeouts: int
    dropped: int
    """Events that reached no handler: full mailbox, unregistered trigger, or closed engine."""
    blocked: int
    """How often a write found a mailbox on its way full, at each attempt (`handler_when_full: block`)."""
    refused: int
    """Calls refused with `OVERLOADED`: a mailbox was full."""
    loops_cut: int
    saves: int
    """Transactions written."""
    saved_keys: int
    failed_saves: int
    unsaved_scopes: int
    """Scopes with changes that are not on disk yet."""
    scopes: int
    """Scopes in memory."""
    keys: int
    """Keys in memory."""
    mailboxes: Mailboxes
    threads: int
    """Worker threads alive."""
    store: dict[str, int] = {}
    """What the adapter counts of its own, as Redis does attempts to update and conflicts; empty for kv and bridge."""


class Health(msgspec.Struct, frozen=True):
    """Whether the engine does what it promises."""

    ok: bool
    problems: tuple[str, ...] = ()
    """What is wrong, in words; empty if ok."""
    unsaved_scopes: int = 0
    last_save_ms: float = 0.0
    """How long the last successful save took."""


class Tally:
    """A counter that any thread may add to without losing one."""

    __slots__ = ("_count", "add")

    def __init__(self) -> None:
        # itertools.count is advanced in C, in one step; `+= 1` on an attribute is several.
        self._count = itertools.count()
        self.add = self._count.__next__

    def value(self) -> int:
        """What was added so far."""
        return int(repr(self._count)[len("count(") : -1])


def measure(parts: Parts) -> Stats:
    """Take the figures of a running engine."""
    counts = parts.router.triggers.counts()
    actors = list(parts.directory.values())
    waiting = [len(actor._mailbox) for actor in actors]
    handlers = [handler.depth() for handler in parts.router.triggers.handlers()]
    snapshot = parts.snapshot
    return Stats(
        calls={function_id: tally.value() for function_id, tally in parts.tally.items()},
        events=parts.router.routed,
        deliveries=counts.delivered,
        skipped=counts.skipped,
        failures=counts.failed,
        retries=counts.retried,
        timeouts=counts.timeouts,
        dropped=counts.dropped,
        blocked=parts.router.backlog.blocked,
        refused=parts.router.backlog.refused,
        loops_cut=parts.router.loops_cut,
        saves=snapshot.saves,
        saved_keys=snapshot.saved_keys,
        failed_saves=snapshot.failed_saves,
        unsaved_scopes=snapshot.waiting_scopes(),
        scopes=len(actors),
        keys=sum(actor.key_count() for actor in actors),
        mailboxes=Mailboxes(
            scopes=sum(waiting),
            deepest_scope=max(waiting, default=0),
            router=parts.router.depth(),
            handlers=sum(handlers),
            deepest_handler=max(handlers, default=0),
            snapshot=len(snapshot._mailbox),
        ),
        threads=parts.dispatcher.threads(),
        store=parts.backend.counts(),
    )


def check_health(parts: Parts, *, closed: bool) -> Health:
    """Say what is wrong with an engine, if anything is."""
    problems: list[str] = []
    snapshot = parts.snapshot
    if closed:
        problems.append("the engine is closed")
    if snapshot.failing is not None:
        problems.append(f"saving fails: {snapshot.failing}; what changed since stays in memory and is saved later")
    elif (late_s := snapshot.overdue_s()) > 0:
        problems.append(
            f"the save that was due {late_s:.1f} s ago has not ended: a crash would lose what changed since; the "
            "disk may hang, or the machine be overloaded"
        )
    problems += [f"not saved: {why}" for why in list(dict.fromkeys(list(snapshot.unsavable.values())))[:10]]
    if (problem := parts.backend.problem()) is not None:
        problems.append(problem)
    problems += [
        f"the handler {handler.trigger.function_id!r} of trigger {handler.trigger.trigger_id!r} is overdue"
        for handler in parts.router.triggers.handlers()
        if handler.is_overdue()
    ]
    problems += parts.services.loop_calls.problems()
    if left_out := parts.services.reporter.left_out:
        problems.append(f"{left_out} failed deliveries were not reported: the hooks, or the log, are behind")
    held = parts.dispatcher.held()
    if held:
        problems.append(
            f"all threads for handlers and functions are blocked, and {held} that are ready wait for one: a handler "
            "hangs, or too many wait for something at the same time"
        )
    return Health(not problems, tuple(problems), snapshot.waiting_scopes(), snapshot.last_save_s * 1000)
