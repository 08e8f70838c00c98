"""A scope with revisions, conditions and transactions, for the checker: simple, and independent of the engine's code.

A write whose answer has no revision leaves the revision of its key unknown, until a later answer contains it.
"""

from __future__ import annotations

import json
from typing import Any

from linearizability.checker import Call
from linearizability.model import MISSING, updated

Entry = tuple[str, str, int]
"""(key, value as JSON text, revision; UNKNOWN if no answer has contained it yet)."""

State = tuple[int, tuple[Entry, ...]]
"""(the largest revision in any answer, the entries in the order in which their keys were first set)."""

UNKNOWN = 0


class Misfit(Exception):
    """The result of a call cannot come from this state."""


class RevisedModel:
    """One scope as one object. `by_key`: lists are ordered by key, as in Redis, instead of by insertion."""

    initial: State = (0, ())

    def __init__(self, *, by_key: bool = False) -> None:
        self._by_key = by_key

    def step(self, state: State, call: Call) -> State | None:
        """Return the state after `call`, or None if its result does not fit. One that was cut off does what it can."""
        trial = Trial(state, self._by_key)
        try:
            getattr(trial, call.name)(call.result if call.certain else None, *call.arguments)
        except Misfit:
            return None
        return trial.state()


class Trial:
    """A state, and one call on it. Each method takes the result of its call, None if it was cut off."""

    def __init__(self, state: State, by_key: bool) -> None:
        self._last, entries = state
        self._entries = {key: (text, revision) for key, text, revision in entries}
        self._by_key = by_key

    def state(self) -> State:
        return self._last, tuple((key, text, revision) for key, (text, revision) in self._entries.items())

    # ------------------------------------------------------------------------------------------------- small parts

    def _text(self, key: str) -> str:
        return self._entries[key][0] if key in self._entries else MISSING

    def _put(self, key: str, text: str, revision: int = UNKNOWN) -> None:
        if text == MISSING:
            self._entries.pop(key, None)
            return
        if revision != UNKNOWN:
            self._rise(revision)
        self._entries[key] = text, revision

    def _rise(self, revision: int) -> None:
        """A new change has this revision, which must be larger than all before."""
        _expect(revision > self._last)
        self._last = revision

    def _settle(self, key: str, revision: int) -> None:
        """An answer contains the revision of a key; 0 if it does not exist."""
        if key not in self._entries:
            _expect(revision == 0)
            return
        text, known = self._entries[key]
        _expect(revision > 0 and known in (UNKNOWN, revision))
        self._entries[key] = text, revision
        self._last = max(self._last, revision)

    def _may_have(self, key: str, expected: int) -> bool:
        if key not in self._entries or expected == 0:
            return key not in self._entries and expected == 0
        return self._entries[key][1] in (UNKNOWN, expected)

    def _condition(self, result: Any, key: str, expected: int) -> bool:
        """Return whether a conditional write was made: by its result, or, without one, whether it can have been."""
        if result is None:
            return self._may_have(key, expected)
        if result[0] == "conflict":
            _expect(result[1] != expected)
            self._settle(key, result[1])
            return False
        _expect(self._may_have(key, expected))
        return True

    # ------------------------------------------------------------------------------------------------------- reads

    def get(self, result: Any, key: str) -> None:
        _expect(result in (None, self._text(key)))

    def entry(self, result: Any, key: str) -> None:
        if result is not None:
            text, revision = result
            _expect(text == self._text(key))
            self._settle(key, revision)

    def items(self, result: Any) -> None:
        _expect(result in (None, tuple(sorted((key, text) for key, (text, _) in self._entries.items()))))

    def list(self, result: Any) -> None:
        entries = sorted(self._entries.items()) if self._by_key else self._entries.items()
        _expect(result in (None, tuple(text for _, (text, _) in entries)))

    def in_groups(self, result: Any) -> None:
        _expect(result in (None, bool(self._entries)))

    def take(self, result: Any, *keys: str) -> None:
        """A transaction that only reads."""
        _expect(result in (None, ("gave up",), tuple(map(self._text, keys))))

    # ------------------------------------------------------------------------------------------------------ writes

    def set(self, result: Any, key: str, text: str) -> None:
        _expect(result is None or result[:2] == (self._text(key), text))
        self._put(key, text, UNKNOWN if result is None else result[2])

    def delete(self, result: Any, key: str) -> None:
        _expect(result in (None, self._text(key)))
        self._put(key, MISSING)

    def update(self, result: Any, key: str, ops: Any) -> None:
        old = self._text(key)
        new = updated(old, ops)
        _expect(result is None or result[:2] == (old, new))
        self._put(key, new, UNKNOWN if result is None else result[2])

    def set_if(self, result: Any, key: str, text: str, expected: int) -> None:
        if self._condition(result, key, expected):
            _expect(result is None or result[1] == self._text(key))
            self._put(key, text, UNKNOWN if result is None else result[2])

    def delete_if(self, result: Any, key: str, expected: int) -> None:
        if self._condition(result, key, expected):
            _expect(result is None or result[1] == self._text(key))
            self._put(key, MISSING)

    def compare_and_set(self, result: Any, key: str, expected: str, text: str) -> None:
        current = self._text(key)
        if result is not None and result[0] == "missed":
            _expect(current != expected and result[1] == current)
        elif current == expected:
            self._put(key, text, UNKNOWN if result is None else result[1])
        else:
            _expect(result is None)

    def modify(self, result: Any, key: str) -> None:
        if result == ("gave up",):
            return
        old = self._text(key)
        new = counted(old)
        _expect(result is None or result[:2] == (old, new))
        self._put(key, new, UNKNOWN if result is None else result[2])

    def swap(self, result: Any, one: str, other: str) -> None:
        """A transaction that gives each of two keys the value of the other."""
        if result == ("gave up",):
            return
        first, second = self._text(one), self._text(other)
        _expect(result in (None, (first, second)))
        self._put(one, second)
        self._put(other, first)

    def pair(self, result: Any, one: str, other: str, text: str, checked: str, expected: int) -> None:
        """A batch that sets two keys to one value, if a third has the expected revision."""
        if not self._condition(result, checked, expected):
            return
        _expect(result is None or result[1:3] == (self._text(one), self._text(other)))
        revision = UNKNOWN if result is None else result[3]
        self._put(one, text, revision and revision - 1)
        self._put(other, text, revision)


def counted(text: str) -> str:
    """The function for `modify`: returns the value plus one if it is a number, else 0."""
    value = None if text == MISSING else json.loads(text)
    return str(value + 1) if isinstance(value, int) else "0"


def _expect(fits: bool) -> None:
    if not fits:
        raise Misfit
