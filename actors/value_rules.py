"""Rules for the values of a scope, from the configuration. They are checked in the turn that writes, on any backend.

The check sees the changes that a turn has decided: the result of an update, of a function, or of a whole transaction.
If the check raises, the turn is refused before anything has changed. If a rule has versions, turns get a view with each
value in the form of the current version. Stored values stay as they are until their keys are written.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from time import monotonic
from typing import Any, Final, TypeVar

import msgspec

from scopestate.actors.backlog import Tally
from scopestate.actors.callbacks import IN_CALLBACK, run_callback
from scopestate.actors.containment import Log
from scopestate.errors import SchemaViolation, ScopestateError
from scopestate.ops.ranges import DeleteRange
from scopestate.ops.transactions import Batch, SetAll, UpdateStep
from scopestate.ops.turns import Change, Delete, Effects, Entry, Set, Turn, View
from scopestate.ops.value_types import Misfit, ValueType
from scopestate.ops.versions import Versions
from scopestate.ops.writes import DeleteWith, Touch, Ttl, unwrapped

A = TypeVar("A")

log: Final = Log("scopestate.scope")

_TELL_EVERY_S: Final = 60.0
"""A scope with many values that do not fit is logged at most once in this many seconds."""
_MOST_SCOPES: Final = 1000
"""At most this many scopes are logged separately. All others share one entry."""


class Misfits:
    """Counts the values that an engine accepts although they do not fit, and logs them from time to time."""

    def __init__(self) -> None:
        self.written: Final = Tally()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}
        """(scope, what was done) -> when that was last logged, and the count at that time."""

    def note(self, violation: SchemaViolation) -> None:
        """Note a value that is written. May be called from any thread; two threads may both log."""
        self.written.add()
        before = self._told_before(violation.scope, "written", self.written.value())
        if before is not None:
            log.warning(
                "%s, and was written, as the rule of the scope says `enforce: warn`; %d such writes of this engine "
                "since the last line like this",
                violation.what_is_wrong(),
                self.written.value() - before,
            )

    def note_old(self, violation: SchemaViolation) -> None:
        """Note a value that cannot be upgraded, and is listed as it is stored. May be called from any thread."""
        if self._told_before(violation.scope, "listed", 0) is not None:
            log.warning("%s: lists give it as it is stored", violation.what_is_wrong())

    def _told_before(self, scope: str, what: str, count: int) -> int | None:
        """Return the count at the last log line about this; None if it is too soon for another line."""
        told = self._told
        about = (scope if (scope, what) in told or len(told) < _MOST_SCOPES else "", what)
        last_s, before = told.get(about, (-_TELL_EVERY_S, 0))
        now_s = monotonic()
        if now_s - last_s < _TELL_EVERY_S:
            return None
        told[about] = now_s, count
        return before


class ValueRule:
    """The rule for the values of one scope: the type that they must fit, and their current version."""

    def __init__(
        self,
        scope: str,
        kind: ValueType[Any] | None,
        misfits: Misfits,
        versions: Versions | None = None,
        *,
        refuses: bool = True,
    ) -> None:
        """`kind`: the type of the values; None: any. `refuses`: if False, values that do not fit are only counted."""
        self._scope = scope
        self._kind = kind
        self._misfits = misfits
        self.versions: Final = versions
        self._refuses = refuses
        self._name = "the rule of the scope" if kind is None else kind.name

    def decide(self, turn: Turn[A], view: View) -> Effects[A]:
        """Return what a turn decides. Raises what that raises, and SchemaViolation for a value that does not fit."""
        versions = self.versions
        effects = turn.decide(view) if versions is None else self._decide_over_current(turn, view, versions)
        for one in effects[0]:
            if type(one) is Change and one.after is not None:
                self.check(one.key, one.after)
        return effects

    def _decide_over_current(self, turn: Turn[A], view: View, versions: Versions) -> Effects[A]:
        current = _CurrentView(view, self)
        try:
            effects = turn.decide(current)
        except ScopestateError as error:
            for key, violation in current.outdated.items():
                if _rests_on(turn, key):
                    raise violation from error  # the turn may have failed because this value is outdated
            raise
        for key, violation in current.outdated.items():
            if _rests_on(turn, key):
                raise violation
            self._misfits.note_old(violation)
        for one in effects[0]:
            if type(one) is Change and one.after is not None and one.before is not None:
                stored = view.get(one.key)
                misfit = None if stored is None else _too_new(versions, stored)
                if misfit is not None:
                    reason = f"{misfit.reason}, which this write would destroy"
                    raise self._violation(one.key, Misfit(misfit.path, reason), written=True)
        return effects

    def check(self, key: str, data: bytes) -> None:
        """Check a value that is to be written. If it does not fit, raise SchemaViolation, or only count it."""
        violation = self.violation(key, data, written=True)
        if violation is None:
            return
        if self._refuses:
            raise violation from violation.__cause__
        self._misfits.note(violation)

    def violation(self, key: str, data: bytes, *, written: bool) -> SchemaViolation | None:
        """Return why a value does not fit; None if it fits. A value of an earlier version is upgraded and then checked.

        `written`: True: the value is to be written. False: it was read.
        """
        try:
            if self.versions is not None:
                if (too_new := self.versions.is_too_new(data)) is not None:
                    raise too_new
                data = self._current(self.versions, data)
            if self._kind is not None:
                _guarded(f"the type {self._name}", self._scope, self._kind.check, data)
        except Misfit as misfit:
            return self._violation(key, misfit, written=written)
        return None

    def json_schema(self) -> dict[str, Any] | None:
        """Return the JSON schema of the values; None if the rule has no type."""
        return None if self._kind is None else self._kind.json_schema()

    def current(self, key: str, data: bytes) -> bytes:
        """Return a value upgraded to the current version; one of a later version as it is. Raises SchemaViolation."""
        if self.versions is None:
            return data
        try:
            return self._current(self.versions, data)
        except Misfit as misfit:
            raise self._violation(key, misfit, written=False) from misfit.__cause__

    def known(self, key: str, data: bytes) -> bytes:
        """As `current`, but raises SchemaViolation for a later version too, which the reader cannot use."""
        data = self.current(key, data)
        if self.versions is not None and (misfit := self.versions.is_too_new(data)) is not None:
            raise self._violation(key, misfit, written=False)
        return data

    def _current(self, versions: Versions, data: bytes) -> bytes:
        current: bytes = _guarded("the upgrade", self._scope, versions.current, data)
        return current

    def _violation(self, key: str, misfit: Misfit, *, written: bool) -> SchemaViolation:
        violation = SchemaViolation(self._scope, key, misfit.path, misfit.reason, self._name, written)
        violation.__cause__ = misfit.__cause__
        return violation


class _CurrentView:
    """A view with each value upgraded to the current version. A value that cannot be upgraded is as it is stored."""

    def __init__(self, view: View, rule: ValueRule) -> None:
        self._view = view
        self._rule = rule
        self.outdated: dict[str, SchemaViolation] = {}
        """Key that was read -> why its value could not be upgraded."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def _current(self, key: str, data: bytes) -> bytes:
        try:
            return self._rule.current(key, data)
        except SchemaViolation as violation:
            self.outdated[key] = violation
            return data

    def get(self, key: str) -> bytes | None:
        data = self._view.get(key)
        return None if data is None else self._current(key, data)

    def entry(self, key: str) -> Entry | None:
        entry = self._view.entry(key)
        if entry is None or (data := self._current(key, entry.json)) is entry.json:
            return entry
        return msgspec.structs.replace(entry, json=data)

    def values(self) -> list[bytes]:
        return [data for _, data in self.items()]

    def items(self) -> list[tuple[str, bytes]]:
        return [(key, self._current(key, data)) for key, data in self._view.items()]


def _too_new(versions: Versions, data: bytes) -> Misfit | None:
    try:
        return versions.is_too_new(data)
    except Misfit:
        return None  # its version is not a number, so no newer program has written it


def _rests_on(turn: Turn[Any], key: str) -> bool:
    """Return whether the effects of a turn depend on the value of a key. If so, an outdated value fails the turn.

    For a read of one key this is true. For a read of many keys it is false, because one value must not make the others
    unreadable.
    """
    asked = unwrapped(turn)
    if isinstance(asked, Set | SetAll | Delete | DeleteWith | DeleteRange | Touch | Ttl):
        return False
    if isinstance(asked, Batch):
        updated = any(isinstance(step, UpdateStep) and step.key == key for step in asked.steps)
        return updated or any(check.key == key and check.value is not msgspec.UNSET for check in asked.checks)
    return asked.writes or asked.keys is not None


def _guarded(name: str, scope: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """Call code of the program in a turn. Calls that it makes to an engine are refused."""
    if get_ident() in IN_CALLBACK:
        return function(argument)
    return run_callback(name, scope, function, argument)
