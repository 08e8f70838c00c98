"""Changes that fired no trigger of an engine because another one had the scopes when they were made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from scopestate.actors.containment import Log
from scopestate.errors import Compacted, StorageError
from scopestate.ops.cursors import ManyCursor, read_cursor

if TYPE_CHECKING:
    from scopestate.actors.handler import HandlerActor
    from scopestate.actors.journal import Journal
    from scopestate.actors.router import EventRouter

log = Log("scopestate.triggers")

PAGE: Final = 1_000
"""Events that are read from the journal at a time."""


def fire_missed(router: EventRouter, cursor: str) -> None:
    """Fire the events of all changes after a cursor that the journal still has; report the rest.

    This runs before the engine makes its first change, so each event is fired once, in order. Limits of mailboxes do
    not apply, as other processes wait for this one.
    """
    handlers = router.triggers.plain()
    if not handlers:
        return
    journal = router.feed.journal
    try:
        found = read_cursor(cursor)
        if journal is None or not isinstance(found, ManyCursor) or found.store != router.feed.store_id:
            _report(router, handlers, cursor, "other store")
        else:
            _fire_from(router, handlers, journal, found)
    except StorageError as error:
        log.error("could not read the changes that triggers have missed: %s", error)  # noqa: TRY400 - the text says it all
        _report(router, handlers, cursor, "trimmed")


def _fire_from(router: EventRouter, handlers: list[HandlerActor], journal: Journal, behind: ManyCursor) -> None:
    position = behind.position or 0
    if journal.gone(behind.epoch, position) == "lost in a crash":
        log.warning(
            "triggers were fired for changes that the previous process had not saved: the state does not contain "
            "these changes"
        )

    def has_missed(handler: HandlerActor) -> bool:
        trigger = handler.trigger
        # Only of the present epoch: changes that an earlier one lost do not exist, so their events are not missing.
        return journal.gone(journal.epoch, position, scope=trigger.scope, prefix=trigger.scope_prefix or "") is not None

    if missed := [handler for handler in handlers if has_missed(handler)]:
        _report(router, missed, behind.text(), "trimmed")
    while events := journal.read(position, most=PAGE):
        for event in events:
            router.publish_read(event)
        position = events[-1].position


def _report(router: EventRouter, handlers: list[HandlerActor], cursor: str, reason: str) -> None:
    error = Compacted(cursor, reason)
    log.warning(
        "%d triggers of this process may have missed changes that were made just before the previous owner of the "
        "store ended (%s); changes of scopes with the rule `history` are never missed",
        len(handlers),
        error.reason,
    )
    router.report_missed(handlers, error)
