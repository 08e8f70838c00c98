"""The figures of an engine, and its health."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from scopestate.ops.plain import Plain
from scopestate.sharing import SharingStatus

if TYPE_CHECKING:
    from scopestate.parts import Parts


class Mailboxes(Plain, msgspec.Struct, frozen=True):
    """Messages that wait now."""

    scopes: int
    """In all scopes together."""
    deepest_scope: int
    router: int
    handlers: int
    """In all handlers together."""
    deepest_handler: int
    snapshot: int


class Stats(Plain, msgspec.Struct, frozen=True):
    """Counts since the engine was made, and current sizes. They are not all read at one moment."""

    calls: dict[str, int]
    """Calls of each `state::` function from Python, by function id; refused calls count too."""
    events: int
    """Changes that matched at least one trigger."""
    deliveries: int
    """Handler calls that succeeded."""
    skipped: int
    """Events that a condition skipped."""
    failures: int
    """Events that were given up: the handler or condition failed, or the depth was too large."""
    retries: int
    timeouts: int
    dropped: int
    """Events that reached no handler: the mailbox was full, the trigger unregistered, or the engine closed."""
    blocked: int
    """Attempts to write that found a handler's mailbox full (`handler_when_full: block`)."""
    refused: int
    """Calls refused with `OVERLOADED`: a mailbox was full."""
    loops_cut: int
    saves: int
    """Transactions written. 0 in Redis and behind a bridge, as are the next three."""
    saved_keys: int
    failed_saves: int
    unsaved_scopes: int
    """Scopes with changes that are not on disk yet."""
    scopes: int
    """Scopes that have an actor now. Those in Redis or behind a bridge hold no values here."""
    keys: int
    """Keys in the memory of this engine; 0 in Redis and behind a bridge."""
    expired: int
    """Keys removed because their deadline had passed. 0 in Redis and behind a bridge, as are the next two."""
    expiry_late_ms: int
    """How many milliseconds after its deadline the oldest key of the last removal was removed."""
    expiring_scopes: int
    """Scopes that have keys with deadlines, in memory or not. A scope may be counted with a short delay."""
    misfits: int
    """Writes of values that do not fit the type or schema of their scope, under a rule with `enforce: warn`. In Redis a
    write that is decided again because the key has changed meanwhile counts again."""
    mailboxes: Mailboxes
    threads: int
    """Live worker threads."""
    store: dict[str, int] = {}
    """Counts of the backend: in Redis, for example, attempts to update and conflicts; otherwise empty."""
    sharing: SharingStatus | None = None
    """Which process owns the directory of a `file_based` store, and how many engines follow; None: there is no
    directory."""

    def __repr__(self) -> str:
        counted = {name: getattr(self, name) for name in self.__struct_fields__}
        counted["calls"] = {function_id: calls for function_id, calls in self.calls.items() if calls}
        return f"Stats({', '.join(f'{name}={count!r}' for name, count in counted.items() if count)})"


class Health(Plain, msgspec.Struct, frozen=True):
    """Whether the engine works as it should."""

    ok: bool
    problems: tuple[str, ...] = ()
    """A description of each problem; empty if ok."""
    unsaved_scopes: int = 0
    last_save_ms: float = 0.0
    """Duration of the last successful save; 0 if there was none."""
    sharing: SharingStatus | None = None
    """As in `Stats`."""


def measure(parts: Parts) -> Stats:
    """Return the figures of a running engine."""
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
        blocked=parts.router.backlog.blocked.value(),
        refused=parts.router.backlog.refused.value(),
        loops_cut=parts.router.loops_cut,
        saves=snapshot.saves,
        saved_keys=snapshot.saved_keys,
        failed_saves=snapshot.failed_saves,
        unsaved_scopes=snapshot.waiting_scopes(),
        scopes=len(actors),
        keys=sum(actor.key_count() for actor in actors),
        expired=parts.expiry.expired,
        expiry_late_ms=parts.expiry.late_ms,
        expiring_scopes=parts.expiry.scopes(),
        misfits=parts._around.misfits.written.value(),
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
        sharing=None if parts.sharing is None else parts.sharing.status(),
    )


def check_health(parts: Parts, *, closed: bool, forked: str | None = None) -> Health:
    """Return the health of an engine. `forked` says what is wrong in a child process that has inherited it."""
    problems: list[str] = [] if forked is None else [forked]
    snapshot = parts.snapshot
    if closed:
        problems.append("the engine is closed")
    if snapshot.failing is not None:
        problems.append(f"saving fails: {snapshot.failing}; changes stay in memory and are saved later")
    elif (late_s := snapshot.overdue_s()) > 0:
        problems.append(
            f"the save that was due {late_s:.1f} s ago has not ended: a crash would lose the changes since then; the "
            "disk may hang, or the machine may be overloaded"
        )
    problems += [f"not saved: {why}" for why in list(dict.fromkeys(list(snapshot.unsavable.values())))[:10]]
    if (problem := parts.backend.problem()) is not None:
        problems.append(problem)
    if parts.sharing is not None and (problem := parts.sharing.problem()) is not None:
        problems.append(problem)
    problems += parts.expiry.problems()
    if parts.consumers is not None:
        problems += parts.consumers.problems()
    problems += [
        f"the handler {handler.trigger.function_id!r} of trigger {handler.trigger.trigger_id!r} is overdue"
        for handler in parts.router.triggers.handlers()
        if handler.is_overdue()
    ]
    problems += parts.services.loop_calls.problems()
    if left_out := parts.services.reporter.left_out:
        problems.append(f"{left_out} failed deliveries were not reported: the hooks or the log are too slow")
    held = parts.dispatcher.held()
    if held:
        problems.append(
            f"all threads for handlers and functions are in use, and {held} calls wait for one: handlers hang, or too "
            "many wait for something at the same time"
        )
    sharing = None if parts.sharing is None else parts.sharing.status()
    return Health(not problems, tuple(problems), snapshot.waiting_scopes(), snapshot.last_save_s * 1000, sharing)
