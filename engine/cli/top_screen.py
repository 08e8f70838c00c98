"""The live view of `scopestate top`."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final

from rich.filesize import decimal
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Sparkline, Static, TabbedContent, TabPane
from textual.widgets.data_table import ColumnKey

from scopestate.cli.people import duration, moment, number
from scopestate.cli.terminal import Exit, shown
from scopestate.cli.top_figures import Rates, Reading, calls_per_s, summary
from scopestate.cli.top_sources import Source
from scopestate.errors import ScopestateError

HISTORY: Final = 120
"""Readings that the line of calls per second shows."""
SLOWEST_S: Final = 60.0
FASTEST_S: Final = 0.25

HELP: Final = """\
1 2 3 4    scopes, calls, consumers, workers
Tab        to the tabs; arrow keys choose one, or scroll a table
s          sort the table by the next column
p, space   pause or continue
+ -        read more often, less often
?          this help; Escape closes it
q          quit
"""

Column = tuple[str, Callable[[Any], Any], Callable[[Any], str]]
"""Heading, the value by which rows are sorted, and how it is shown. Numbers are sorted with the largest first."""

TABLES: Final[dict[str, tuple[Column, ...]]] = {
    "scopes": (
        ("scope", lambda one: one.scope, lambda one: one.scope or "(empty name)"),
        ("keys", lambda one: one.keys, lambda one: number(one.keys)),
        ("size", lambda one: one.bytes or 0, lambda one: "" if one.bytes is None else decimal(one.bytes)),
        (
            "writes/s",
            lambda one: one.writes_per_s or 0.0,
            lambda one: "" if one.writes_per_s is None else number(one.writes_per_s),
        ),
        ("last write", lambda one: one.revision or 0, lambda one: "" if one.revision is None else number(one.revision)),
    ),
    "calls": (
        ("function", lambda one: one[0], lambda one: one[0]),
        ("calls/s", lambda one: one[2], lambda one: number(one[2])),
        ("calls", lambda one: one[1], lambda one: number(one[1])),
    ),
    "consumers": (
        ("consumer", lambda one: one.name, lambda one: one.name),
        ("waiting", lambda one: one.lag_events, lambda one: number(one.lag_events)),
        ("oldest", lambda one: one.lag_seconds, lambda one: duration(one.lag_seconds) if one.lag_events else ""),
        ("running", lambda one: one.in_flight, lambda one: number(one.in_flight)),
        ("dead", lambda one: one.dead, lambda one: number(one.dead)),
        ("state", lambda one: one.paused or "", lambda one: "active" if one.paused is None else f"paused {one.paused}"),
    ),
    "workers": (
        ("worker", lambda one: one["name"] or "", lambda one: one["name"] or one["id"]),
        ("running", lambda one: one["active_invocations"], lambda one: number(one["active_invocations"])),
        ("functions", lambda one: one["function_count"], lambda one: number(one["function_count"])),
        ("runtime", lambda one: one["runtime"] or "", lambda one: one["runtime"] or ""),
        ("address", lambda one: one["ip_address"] or "", lambda one: one["ip_address"] or ""),
        ("connected", lambda one: -one["connected_at_ms"], lambda one: moment(one["connected_at_ms"])),
    ),
}


class HelpScreen(ModalScreen[None]):
    """The keys."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,question_mark,q,enter", "dismiss", "Close")]
    CSS = "HelpScreen {align: center middle;} #help {width: 62; height: auto; border: round $primary; padding: 1 2;}"

    def compose(self) -> ComposeResult:
        yield Static(HELP.rstrip(), id="help", markup=False)


class TopScreen(App[int]):
    """Reads a source repeatedly, and shows its figures."""

    TITLE = "scopestate top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #place, #figures {height: auto; padding: 0 1;}
    #trouble {height: auto; padding: 0 1; color: $error; text-style: bold;}
    #rate {height: 2; margin: 0 1;}
    TabbedContent {height: 1fr;}
    TabPane {padding: 0;}
    DataTable {height: 1fr;}
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "End"),
        Binding("question_mark", "help", "Keys"),
        Binding("p,space", "pause", "Pause"),
        Binding("s", "sort", "Sort"),
        Binding("plus,equals_sign", "interval(0.5)", "Faster", show=False),
        Binding("minus", "interval(2)", "Slower", show=False),
        Binding("ctrl+c", "interrupt", "Interrupt", show=False, priority=True),
        *(
            Binding(str(place), f"table('{name}')", name.capitalize(), show=False)
            for place, name in enumerate(TABLES, 1)
        ),
    ]

    def __init__(self, source: Source, interval_s: float = 1.0) -> None:
        super().__init__()
        self.interval_s = interval_s
        self.paused = False
        self.readings = 0
        """Readings that were shown."""
        self.trouble = ""
        """Why there are no figures now; empty if there are."""
        self.sorted_by: dict[str, int] = dict.fromkeys(TABLES, 1)
        self._source = source
        self._rates = Rates()
        # Two values: Textual draws a single one as a full bar.
        self._calls: deque[float] = deque([0.0, 0.0], maxlen=HISTORY)
        self._seen: Reading | None = None
        self._wake = asyncio.Event()
        # Kept instead of looked up by id: a reading may end when the view has been removed.
        self._place = Static("", id="place", markup=False)
        self._trouble = Static("", id="trouble", markup=False)
        self._figures = Static("reading", id="figures", markup=False)
        self._rate = Sparkline(list(self._calls), id="rate")
        self._tabs = TabbedContent()
        self._tables: dict[str, DataTable[Text]] = {
            name: DataTable(id=f"table-{name}", cursor_type="row", zebra_stripes=True) for name in TABLES
        }

    def compose(self) -> ComposeResult:
        yield from (self._place, self._trouble, self._figures, self._rate)
        with self._tabs:
            for name, table in self._tables.items():
                with TabPane(name.capitalize(), id=name):
                    yield table
        yield Footer()

    def on_mount(self) -> None:
        for name, columns in TABLES.items():
            table = self._tables[name]
            for heading, _, _ in columns:
                table.add_column(heading, key=heading)
        loop = asyncio.get_running_loop()
        for ends in ("SIGTERM", "SIGHUP"):
            with suppress(AttributeError, NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(getattr(signal, ends), self.action_interrupt)
        self._heading()
        self.run_worker(self._follow(), name="reading")

    async def on_unmount(self) -> None:
        await self._source.close()

    async def _follow(self) -> None:
        while True:
            if not self.paused:
                await self._read()
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.interval_s)

    async def _read(self) -> None:
        try:
            reading = await self._source.read()
        except ScopestateError as error:
            old = (
                "" if self._seen is None else f"; these figures are {duration(time.monotonic() - self._seen.at_s)} old"
            )
            self.trouble = f"no figures: {error}{old}. Trying again"
        else:
            self.trouble = ""
            self._show(reading, self._rates.of(reading))
        self._trouble.update(shown(self.trouble, keep=""))

    def _show(self, reading: Reading, rates: dict[str, float]) -> None:
        self._seen = reading
        self._calls.append(calls_per_s(reading, rates))
        self._rate.data = list(self._calls)
        where, figures = summary(reading, rates)
        place = Text(shown(where, keep=""))
        if not reading.ok:
            place.stylize("bold red")
        self._place.update(place)
        self._figures.update(figures)
        rows: dict[str, Sequence[Any]] = {
            "scopes": reading.scopes,
            "calls": [(name, count, rates.get(name, 0.0)) for name, count in reading.calls.items()],
            "consumers": reading.consumers,
            "workers": reading.workers,
        }
        for name, found in rows.items():
            self._fill(name, found)
        self.readings += 1

    def _fill(self, name: str, rows: Sequence[Any]) -> None:
        columns = TABLES[name]
        _, sort_key, _ = columns[self.sorted_by[name]]
        numbers = not rows or not isinstance(sort_key(rows[0]), str)
        table = self._tables[name]
        row, scrolled = table.cursor_row, table.scroll_y
        table.clear()
        for one in sorted(rows, key=sort_key, reverse=numbers):
            cells = [Text(shown(show(one), keep="")) for _, _, show in columns]
            for (_, value, _), cell in zip(columns, cells, strict=True):
                if not isinstance(value(one), str):
                    cell.justify = "right"
            table.add_row(*cells)
        if rows:
            table.move_cursor(row=min(row, len(rows) - 1), animate=False)
            table.scroll_to(y=scrolled, animate=False)

    def _heading(self) -> None:
        """Mark the column by which each table is sorted."""
        for name, columns in TABLES.items():
            for place, (heading, _, _) in enumerate(columns):
                label = Text(heading, style="underline" if place == self.sorted_by[name] else "")
                self._tables[name].columns[ColumnKey(heading)].label = label

    # ------------------------------------------------------------------------------------------------------- the keys

    def action_table(self, name: str) -> None:
        """Show a table."""
        self._tabs.active = name
        self._tables[name].focus()

    def action_sort(self) -> None:
        """Sort the table that is shown by its next column."""
        name = self._tabs.active
        self.sorted_by[name] = (self.sorted_by[name] + 1) % len(TABLES[name])
        self._heading()
        self._again()

    def action_pause(self) -> None:
        """Stop reading, or continue."""
        self.paused = not self.paused
        self.sub_title = "paused" if self.paused else ""
        self._trouble.update("paused: press p to continue" if self.paused else "")
        self._again()

    def action_interval(self, factor: float) -> None:
        """Read more or less often."""
        self.interval_s = min(max(self.interval_s * factor, FASTEST_S), SLOWEST_S)
        self.notify(f"a reading every {self.interval_s:g} s", timeout=2)
        self._again()

    async def action_help(self) -> None:
        """Show the keys."""
        await self.push_screen(HelpScreen())

    def action_interrupt(self) -> None:
        """End with the exit code for an interruption."""
        self.exit(int(Exit.INTERRUPTED))

    def _again(self) -> None:
        self._wake.set()
