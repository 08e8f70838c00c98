"""Handlers: they keep derived state, exactly, while seven writers and seven handlers work at the same time.

Why the result is exact, and not nearly so:

- One trigger sees the events of one scope in the order of the writes, one at a time. The last event of a day is the one
  after which all its hours are there; `record_extremes` writes what that event says, so it ends with the right value.
- Several handlers share keys (`bands`, `alerts`). Each change is one `update`, computed within the scope's turn: two of
  them never start from the same old value. `get`, add and `set` would lose counts here.
- `record_extremes` may run twice for one event without harm. `count_band` and `report_*` may not: adding is no
  repeatable act. They rely on one delivery for each event (`handler_attempts: 1`, the default), and on conditions that
  let exactly one event through for each fact.

A crash loses events that were not handled yet; a service would compute derived state anew when it starts.
"""

from __future__ import annotations

from scopestate import Engine, StateEvent, ops
from weather import rules


class Desk:
    """The handlers, and the engine they write to."""

    engine: Engine
    """Set by the program: a configuration file can name functions, but not the engine that is being made from it."""

    def count_band(self, event: StateEvent) -> None:
        """Count a reading into its ten degrees."""
        station = event.scope.removeprefix("readings/")
        self.engine.update("bands", rules.band(event.new_value["tenths"]), [ops.Increment(station, 1)])

    def record_extremes(self, event: StateEvent) -> None:
        """Note a day's highest and lowest temperature so far."""
        _, station, date = event.scope.split("/")
        self.engine.set(f"extremes/{station}", date, rules.extremes(event.new_value))

    async def report_heat(self, event: StateEvent) -> None:
        """Add a hot day to the alerts."""
        await self._alert("heat", event)

    async def report_cold(self, event: StateEvent) -> None:
        """Add a cold day to the alerts."""
        await self._alert("cold", event)

    async def _alert(self, kind: str, event: StateEvent) -> None:
        # `alerts` has commit durability: this suspends until the alert is on disk. No thread waits with it.
        station = event.scope.removeprefix("extremes/")
        # An object, because text appended to nothing starts a text, not a list.
        await self.engine.aio.update("alerts", kind, [ops.Append(station, {"date": event.key})])


desk = Desk()
"""The one that engine.yaml names."""
