"""Conditions: asked before a handler, with the event. They look at the event only, never at the engine.

`old_value` and `new_value` are the two sides of one atomic write, so "has it changed?" has one right answer here, which
a condition that read the engine would not get: by then the next write may have come.
"""

from __future__ import annotations

from scopestate import StateEvent
from weather import rules


def is_new(event: StateEvent) -> bool:
    """A reading that was not there before: one that is sent again is not counted again."""
    return event.event_type == "state:created"


def extremes_moved(event: StateEvent) -> bool:
    """This hour is the highest or the lowest of its day so far."""
    return event.old_value is None or rules.extremes(event.old_value) != rules.extremes(event.new_value)


def heat_begins(event: StateEvent) -> bool:
    """The write that makes a day hot, and no other one of that day: its high only rises."""
    return rules.is_hot(event.new_value) and not (event.old_value and rules.is_hot(event.old_value))


def cold_begins(event: StateEvent) -> bool:
    """The write that makes a day cold, and no other one of that day: its low only falls."""
    return rules.is_cold(event.new_value) and not (event.old_value and rules.is_cold(event.old_value))
