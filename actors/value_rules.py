"""What the values of a scope must fit, by a rule of the configuration: checked in the turn that writes, on any backend.

The check sees what a turn has decided, so it is about results: of an update, a function, a whole transaction. What
raises in it refuses the turn, before anything has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from time import monotonic
from typing import Any, Final, TypeVar

from scopestate.actors.backlog import Tally
from scopestate.actors.callbacks import IN_CALLBACK, run_callback
from scopestate.actors.containment import Log
from scopestate.errors import SchemaViolation
from scopestate.ops.turns import Change, Effects, Turn, View
from scopestate.ops.value_types import Misfit, ValueType

A = TypeVar("A")

log: Final = Log("scopestate.scope")

_TELL_EVERY_S: Final = 60.0
"""A scope with many values that do not fit is logged once in so many seconds."""
_MOST_SCOPES: Final = 1000
"""So many scopes are logged one by one."""


class Misfits:
    """The values of an engine that were written although they do not fit: counted, and logged now and then."""

    def __init__(self) -> None:
        self.written: Final = Tally()
        self._told: dict[str, tuple[float, int]] = {}
        """Scope -> when it was logged last, and the count at that time."""

    def note(self, violation: SchemaViolation) -> None:
        """Note a value that is written. From any thread; two threads may both log."""
        self.written.add()
        told = self._told
        scope = violation.scope if violation.scope in told or len(told) < _MOST_SCOPES else ""
        last_s, before = told.get(scope, (-_TELL_EVERY_S, 0))
        now_s = monotonic()
        if now_s - last_s < _TELL_EVERY_S:
            return
        count = self.written.value()
        told[scope] = now_s, count
        log.warning(
            "%s, and was written, as the rule of the scope says `enforce: warn`; %d such writes of this engine since "
            "the last line like this",
            violation.what_is_wrong(),
            count - before,
        )


class ValueRule:
    """What the values of one scope must fit."""

    def __init__(self, scope: str, kind: ValueType[Any], note: Callable[[SchemaViolation], object] | None) -> None:
        """`note`: what takes violations of values that are written all the same; None: they are refused."""
        self._scope = scope
        self._kind = kind
        self._note = note

    def decide(self, turn: Turn[A], view: View) -> Effects[A]:
        """Have the turn decide. Raises what it raises, and SchemaViolation for a value that does not fit."""
        effects = turn.decide(view)
        for one in effects[0]:
            if type(one) is Change and one.after is not None:
                self.check(one.key, one.after)
        return effects

    def check(self, key: str, data: bytes) -> None:
        """Raise SchemaViolation if a value that is to be written does not fit, or note it."""
        try:
            _guarded(f"the type {self._kind.name}", self._scope, self._kind.check, data)
        except Misfit as misfit:
            violation = self._kind.refuse(self._scope, key, misfit, written=True)
            if self._note is None:
                raise violation from misfit.__cause__
            self._note(violation)


def _guarded(name: str, scope: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """Call code of the program in a turn: what it calls of an engine is refused."""
    if get_ident() in IN_CALLBACK:
        return function(argument)
    return run_callback(name, scope, function, argument)
