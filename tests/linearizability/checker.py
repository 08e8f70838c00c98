"""Decides whether a recorded history is linearizable: whether some order of its calls explains every result.

A call takes effect at one instant between its beginning and its end. The search is Wing and Gong's ("Testing and
verifying concurrent objects", 1993): take some call that nothing completed stands before, see whether the model gives
the same result, continue with the rest, and go back if that leads nowhere. Configurations that were reached before (the
set of calls taken, and the state they led to) are not searched again, as in Lowe's "Testing for linearizability" (2017)
and Knossos. A history is split by object first, which is sound because linearizability is local; `history.py` splits
by scope.

A call that was cut off (its caller timed out or was cancelled, or its process died) may or may not have happened. If
its end is not known, it may have happened at any time after it began. Each such call doubles the search, so give an end
if it is known. A call that was certainly refused is left out of the history.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call on one object."""

    name: str
    arguments: tuple[Any, ...]
    result: Any
    """The result; meaningless for a call that was cut off."""
    began: int
    """When the call began: a smaller number is earlier. No number occurs twice in a history."""
    ended: int | None
    """When the call ended; None if it was cut off and may still happen."""
    client: str = ""
    cut_off: bool = False
    """True: it is not known whether the call happened. If it did, it happened before `ended`."""

    @property
    def certain(self) -> bool:
        """True if it happened."""
        return self.ended is not None and not self.cut_off

    def __str__(self) -> str:
        outcome = repr(self.result) if self.certain else "cut off"
        arguments = ", ".join(map(repr, self.arguments))
        return f"[{self.began:>6} .. {self.ended or '?':>6}] {self.client:<8} {self.name}({arguments}) -> {outcome}"


class Model(Protocol):
    """The behaviour of the object without concurrent calls."""

    initial: Hashable

    def step(self, state: Any, call: Call) -> Hashable | None:
        """Return the state after `call`, or None if its result cannot come from `state`. A cut off call always fits."""


class NotLinearizable(AssertionError):
    """No order of the calls explains their results."""


@dataclass(slots=True)
class _Entry:
    """The beginning of a call (it knows its end), or the end of one (it knows its beginning), in a linked list."""

    call: Call | None
    bit: int = 0
    ends: _Entry | None = None
    begins: _Entry | None = field(default=None, repr=False)
    before: _Entry | None = field(default=None, repr=False)
    after: _Entry | None = field(default=None, repr=False)


def check(calls: Iterable[Call], model: Model, what: str = "the history") -> list[Call]:
    """Return the calls in an order that explains their results; a cut off call that need not have happened is left out.

    Raises NotLinearizable, and shows where the search got stuck.
    """
    history = sorted(calls, key=lambda call: call.began)
    head = _linked(history)
    open_calls = sum(call.certain for call in history)
    state: Any = model.initial
    taken = 0
    seen: set[tuple[int, Hashable]] = set()
    path: list[tuple[_Entry, Any, bool]] = []
    """(beginning, state before, whether it happened)."""
    longest: list[Call] = []
    entry = head.after
    while open_calls:
        call = None if entry is None else entry.call
        if entry is not None and call is not None:
            after = model.step(state, call)
            if after is not None and (taken | entry.bit, after) not in seen:
                seen.add((taken | entry.bit, after))
                path.append((entry, state, True))
                state = after
                taken |= entry.bit
                open_calls -= call.certain
                _lift(entry)
                entry = head.after
            else:
                entry = entry.after
            continue
        # Nothing is left, or the end of a call that must come before everything that follows.
        begins = None if entry is None else entry.begins
        if begins is not None and _call_of(begins).cut_off and (taken | begins.bit, state) not in seen:
            seen.add((taken | begins.bit, state))
            path.append((begins, state, False))
            taken |= begins.bit
            _lift(begins)
            entry = head.after
            continue
        if len(path) >= len(longest):
            longest = _happened(path)
        while True:
            if not path:
                raise NotLinearizable(_explanation(what, history, longest, model))
            begins, state, happened = path.pop()
            taken &= ~begins.bit
            _put_back(begins)
            if happened:
                break
        open_calls += _call_of(begins).certain
        entry = begins.after
    return _happened(path)


def _happened(path: list[tuple[_Entry, Any, bool]]) -> list[Call]:
    return [_call_of(step) for step, _, happened in path if happened]


def _call_of(entry: _Entry) -> Call:
    assert entry.call is not None
    return entry.call


def _linked(history: Sequence[Call]) -> _Entry:
    """Return the head of a list of beginnings and ends in the order of time."""
    moments: list[tuple[int, _Entry]] = []
    for number, call in enumerate(history):
        entry = _Entry(call, 1 << number)
        moments.append((call.began, entry))
        if call.ended is not None:
            entry.ends = _Entry(None, begins=entry)
            moments.append((call.ended, entry.ends))
    moments.sort(key=lambda moment: moment[0])
    head = last = _Entry(None)
    for _, entry in moments:
        last.after, entry.before = entry, last
        last = entry
    return head


def _lift(entry: _Entry) -> None:
    for part in (entry, entry.ends):
        if part is not None:
            assert part.before is not None
            part.before.after = part.after
            if part.after is not None:
                part.after.before = part.before


def _put_back(entry: _Entry) -> None:
    for part in (entry.ends, entry):
        if part is not None:
            assert part.before is not None
            part.before.after = part
            if part.after is not None:
                part.after.before = part


def _explanation(what: str, history: Sequence[Call], longest: list[Call], model: Model) -> str:
    state: Any = model.initial
    for call in longest:
        state = model.step(state, call)
    left = [call for call in history if call not in longest]
    first_end = min((call.ended or 0 for call in left if call.certain), default=0)
    stuck = [call for call in left if call.began < first_end]
    return "\n".join(
        [
            f"{what} is not linearizable: {len(longest)} of {len(history)} calls can be put in order",
            "the last of them:",
            *(f"  {call}" for call in longest[-8:]),
            f"lead to {state!r:.400}, from which none of these can come next:",
            *(f"  {call}" for call in stuck[:12]),
        ]
    )
