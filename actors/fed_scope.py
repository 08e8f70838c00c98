"""What the feed keeps about one scope."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from scopestate.actors.ports import Durability
from scopestate.ops.cursors import ScopeCursors
from scopestate.ops.results import StateEvent

if TYPE_CHECKING:
    from scopestate.actors.watcher import Watcher


class FedScope:
    """What the feed keeps about one scope. Changed under the feed's guard."""

    __slots__ = (
        "awaited",
        "begin",
        "by_key",
        "cursors",
        "floor",
        "journaled",
        "kept",
        "last",
        "many",
        "name",
        "ring",
        "unsaved",
        "unsaved_from",
    )

    def __init__(self, name: str, store: str, kept: Durability, *, journaled: bool) -> None:
        self.name = name
        self.cursors = ScopeCursors(store, name)
        self.kept = kept
        self.journaled = journaled
        self.awaited = False
        """True if a durable trigger waits for its changes, which are saved soon for that."""
        self.ring: deque[StateEvent] = deque()
        """Its changes that are in the ring, or will be as soon as those before them are settled."""
        self.floor: int | None = None
        """Every change after this revision is in `ring`. None: not known yet."""
        self.begin: int | None = None
        """Every change after this revision was entered into the feed."""
        self.last = 0
        """The revision of the last change that was given to the watches of this scope."""
        self.unsaved: deque[StateEvent] = deque()
        """Changes that no save has taken, of a scope that is journaled."""
        self.unsaved_from: int | None = None
        """The position of the oldest change that no save has taken, where `unsaved` does not tell."""
        self.by_key: dict[str | None, tuple[Watcher, ...]] = {}
        """key (None: every key) -> the watches of this scope."""
        self.many: tuple[Watcher, ...] = ()
        """The watches of many scopes that want this one."""

    def begins_at(self, revision: int) -> None:
        """Note that every change after this revision is entered."""
        if self.floor is None:
            self.floor = revision
        if self.begin is None:
            self.begin = revision


class Hold(msgspec.Struct, eq=False):
    """The changes of one scope in one commit. They have positions, and are shown when the commit is on disk."""

    events: list[StateEvent]
