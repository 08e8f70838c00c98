"""An engine whose scopes live in another one."""

from __future__ import annotations

from typing import Any

from scopestate.actors.directory import Directory
from scopestate.actors.loop_reply import LoopReply
from scopestate.actors.router import HandlerFull, TriggerRouter
from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.errors import EngineClosed
from scopestate.persistence.bridge.adapter import Change
from scopestate.persistence.bridge.scope import RemoteChange, RemoteScopeActor
from scopestate.wire.depth import event_depth


class RemoteScopes:
    """Makes the scopes of a bridged engine, and brings them the changes that the remote reports."""

    def __init__(self, adapter: Any, directory: Directory, router: TriggerRouter) -> None:
        self._remote = adapter
        self._directory = directory
        self._router = router
        if adapter.reports_changes:
            adapter.watch(self._report)

    def make_scope(self, scope: str, around: Surroundings) -> ScopeActor:
        """Make the actor of one scope."""
        return RemoteScopeActor(scope, around, self._remote)

    async def _report(self, change: Change) -> None:
        """Fire the local triggers of one change. While a handler must catch up it waits, and so does the remote."""
        scope, key, old, new = change
        depth = max(0, event_depth.get() - 1)  # the depth of the event; that of this handler is one more
        room: LoopReply | None = None
        while True:
            told = LoopReply()
            try:
                self._directory[scope].take_in(RemoteChange(key, old, new, told, depth))  # type: ignore[attr-defined]
                await told.future
                return
            except EngineClosed:
                return
            except HandlerFull:
                # Asked for before the next attempt, so that room made in between is not missed.
                if room is not None:
                    await room.future
                room = LoopReply()
                self._router.when_room(room.set)
