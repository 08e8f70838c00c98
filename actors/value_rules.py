"""What the values of a scope must fit, by a rule of the configuration: checked in the turn that writes, on any backend.

The check sees what a turn has decided, so it is about results: of an update, a function, a whole transaction. What
raises in it refuses the turn, before anything has changed. A rule with versions also gives turns another view, which
has each value as the current version has it; what is stored stays as it is until its key is written.
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
"""A scope with many values that do not fit is logged once in so many seconds."""
_MOST_SCOPES: Final = 1000
"""So many scopes are logged one by one."""


class Misfits:
    """The values of an engine that are let through although they do not fit: counted, and logged now and then."""

    def __init__(self) -> None:
        self.written: Final = Tally()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}
        """Scope and what was done -> when it was logged last, and the count at that time."""

    def note(self, violation: SchemaViolation) -> None:
        """Note a value that is written. From any thread; two threads may both log."""
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
        """Note a value that cannot be brought up to date, and is listed as it is stored. From any thread."""
        if self._told_before(violation.scope, "listed", 0) is not None:
            log.warning("%s: lists give it as it is stored", violation.what_is_wrong())

    def _told_before(self, scope: str, what: str, count: int) -> int | None:
        """Return the count at the last line about it; None if it is not time for another one."""
        told = self._told
        about = (scope if (scope, what) in told or len(told) < _MOST_SCOPES else "", what)
        last_s, before = told.get(about, (-_TELL_EVERY_S, 0))
        now_s = monotonic()
        if now_s - last_s < _TELL_EVERY_S:
            return None
        told[about] = now_s, count
        return before


class ValueRule:
    """What the values of one scope must fit, and which version of them is current."""

    def __init__(
        self,
        scope: str,
        kind: ValueType[Any] | None,
        misfits: Misfits,
        versions: Versions | None = None,
        *,
        refuses: bool = True,
    ) -> None:
        """`kind`: what they must fit; None: anything. `refuses`: False for a rule that only counts what does not."""
        self._scope = scope
        self._kind = kind
        self._misfits = misfits
        self.versions: Final = versions
        self._refuses = refuses
        self._name = "the rule of the scope" if kind is None else kind.name

    def decide(self, turn: Turn[A], view: View) -> Effects[A]:
        """Have a turn decide. Raises what it raises, and SchemaViolation for a value that does not fit."""
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
                    raise violation from error  # it may have failed because of a value that is not current
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
        """Raise SchemaViolation if a value that is to be written does not fit, or note it."""
        violation = self.violation(key, data, written=True)
        if violation is None:
            return
        if self._refuses:
            raise violation from violation.__cause__
        self._misfits.note(violation)

    def violation(self, key: str, data: bytes, *, written: bool) -> SchemaViolation | None:
        """Return why a value does not fit; None if it does. One of an earlier version must fit as what it becomes.

        `written`: it is to be written; False: it was found.
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
        """Return the JSON schema of the values; None if there is none."""
        return None if self._kind is None else self._kind.json_schema()

    def current(self, key: str, data: bytes) -> bytes:
        """Return a value as the current version has it, one of a later version as it is. Raises SchemaViolation."""
        if self.versions is None:
            return data
        try:
            return self._current(self.versions, data)
        except Misfit as misfit:
            raise self._violation(key, misfit, written=False) from misfit.__cause__

    def known(self, key: str, data: bytes) -> bytes:
        """As `current`, for a reader that can do nothing with a later version. Raises SchemaViolation for one."""
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
    """A view with each value as the current version has it. What cannot be brought up to date is given as stored."""

    def __init__(self, view: View, rule: ValueRule) -> None:
        self._view = view
        self._rule = rule
        self.outdated: dict[str, SchemaViolation] = {}
        """Key -> why its value could not be brought up to date, of those that were looked at."""

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
        return None  # not a version: nothing that a newer program has written


def _rests_on(turn: Turn[Any], key: str) -> bool:
    """Return whether what a turn does depends on the value of a key, and not only its answer on it.

    A read of one key does, one of many does not: one value must not make the others unreadable.
    """
    asked = unwrapped(turn)
    if isinstance(asked, Set | SetAll | Delete | DeleteWith | DeleteRange | Touch | Ttl):
        return False
    if isinstance(asked, Batch):
        updated = any(isinstance(step, UpdateStep) and step.key == key for step in asked.steps)
        return updated or any(check.key == key and check.value is not msgspec.UNSET for check in asked.checks)
    return asked.writes or asked.keys is not None


def _guarded(name: str, scope: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """Call code of the program in a turn: what it calls of an engine is refused."""
    if get_ident() in IN_CALLBACK:
        return function(argument)
    return run_callback(name, scope, function, argument)
