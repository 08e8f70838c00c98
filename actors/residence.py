"""How much memory the saved scopes of an engine take: the actor that keeps it below `max_resident_bytes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.dispatcher import weakly
from scopestate.actors.keyed import LOADED_WHOLE, KeyedScope, Shed
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.scope import Passivate
from scopestate.actors.turn import TurnActor

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits
    from scopestate.actors.directory import Directory
    from scopestate.actors.dispatcher import Dispatcher, Timer
    from scopestate.actors.snapshot import SnapshotActor

PAUSE_S: Final = 0.25
"""The time between two looks; longer, if a look itself takes long."""
_PART: Final = 1 / 8
"""Keys of a scope that takes more than this part of the limit leave one by one, even if they are few. If more than
this part of its keys are not saved, they are saved."""
_SHARE: Final = 20
"""A look takes at most one part in so many of the time."""


class Look(msgspec.Struct, frozen=True):
    """Measure the scopes, and have keys leave memory if they take too much."""


class Residence(TurnActor):
    """Has keys leave memory while the scopes take more than `max_resident_bytes`.

    Scopes that were not used lately come first, then the largest. Small ones leave as a whole while no call waits, and
    of the others keys that are saved. If many are not, all scopes are saved at once, and they leave after that. The
    limit is not exact: sizes are estimated, and writes do not wait (docs/design/0081-scopes-larger-than-memory.md).
    """

    def __init__(self, dispatcher: Dispatcher, directory: Directory, limits: Limits, snapshot: SnapshotActor) -> None:
        super().__init__(dispatcher)
        self._directory = directory
        self._limits = limits
        self._snapshot = snapshot
        self._timer: Timer | None = None
        self._asked: dict[str, Reply[Any]] = {}
        """Scopes whose keys are to leave memory, and have not answered yet."""
        self._ended = False

    def arm(self) -> None:
        """Begin to look, or follow a new limit. From any thread."""
        if self._limits.max_resident_bytes and not self._ended:
            self.tell(Look())  # only turns set the timer, so there is one

    def end(self) -> None:
        """Look no more. From any thread, idempotent."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self) -> None:
        self.tell(Look())

    def on_receive(self, message: Any) -> Any:
        if not isinstance(message, Look):
            raise TypeError(f"this actor does not understand {message!r:.80}")
        if self._timer is not None:
            self._timer.cancel()
        began_s = self._dispatcher.monotonic()
        try:
            if not self._ended and self._limits.max_resident_bytes:
                self._look(self._limits.max_resident_bytes)
        finally:
            took_s = self._dispatcher.monotonic() - began_s
            if self._limits.max_resident_bytes and not self._ended:
                self._timer = self._dispatcher.call_later(max(PAUSE_S, _SHARE * took_s), weakly(self._ring))

    def _look(self, limit: int) -> None:
        actors = [actor for actor in list(self._directory.values()) if isinstance(actor, KeyedScope)]
        sizes = [(actor.resident_bytes(), actor) for actor in actors]
        if sum(size for size, _ in sizes) <= limit:
            return
        left = sum(size for size, _ in sizes) - limit * 7 // 8
        self._asked = {scope: reply for scope, reply in self._asked.items() if not reply.done}
        # Those that are idle first, and of the others the largest.
        sizes.sort(key=lambda one: (one[1].touched, -one[0]))
        unsaved = False
        for size, actor in sizes:
            if left <= 0:
                break
            if actor.key_count() > LOADED_WHOLE or size > limit * _PART:
                left -= self._shed(actor, min(size, left))
                unsaved = unsaved or actor.unsaved_count() > actor.key_count() * _PART
            elif actor.housekeep_now(Passivate()) is True:
                left -= size
            else:
                unsaved = unsaved or not actor.is_clean()
        if unsaved:
            self._snapshot.end_interval()

    def _shed(self, actor: KeyedScope, wanted: int) -> int:
        """Ask a scope to let keys leave memory, if it is not doing so. Returns how many bytes are expected of it."""
        if actor.scope in self._asked or actor.is_shedding:
            return wanted
        if actor.rests_until_s > self._dispatcher.monotonic():
            return 0
        reply: Reply[int] = self._dispatcher.reply()
        self._asked[actor.scope] = reply
        actor._enqueue(Envelope(Shed(wanted), reply))
        return wanted
