"""What `scopestate serve` shows on a terminal: facts, the log, and a status line."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from scopestate.cli.people import many
from scopestate.cli.progress import REFRESHES_PER_S, keys
from scopestate.cli.serving import Lines, SafeFormatter
from scopestate.cli.terminal import shown, standard_error
from scopestate.engine import Engine
from scopestate.server.server import Server

REFRESH_S = 1.0


class TerminalScreen:
    """The screen of a server whose standard error is a terminal."""

    def __init__(self) -> None:
        self._console = standard_error()

    def log_handler(self) -> logging.Handler:
        """Return the handler that shows the log."""
        if not self._console.is_terminal:  # rich found another reason, such as TTY_COMPATIBLE=0
            return Lines().log_handler()
        handler = RichHandler(console=self._console, show_path=False, markup=False)
        handler.setFormatter(SafeFormatter("%(message)s", "[%X]"))
        return handler

    def announce(self, url: str, facts: Sequence[tuple[str, str]]) -> None:
        """Show where the server listens, and more about it, as a table."""
        table = Table.grid(padding=(0, 2))
        table.add_row("[bold]scopestate[/]", f"[bold green]{url}[/]")
        for name, text in facts:
            table.add_row(f"[dim]{name}[/]", self._console.render_str(text, markup=False))
        self._console.print(table)

    def say(self, text: str) -> None:
        """Show a line."""
        self._console.print(text, style="dim")

    def wait(self, server: Server, came: Callable[[float | None], bool]) -> None:
        """Show a status line until a signal has come."""
        if not self._console.is_terminal:
            Lines().wait(server, came)
            return
        line = StatusLine(server)
        # No spinner: redrawing many times a second would cost a server too much.
        with Live(line.text(), console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(line.text(), refresh=True)
                if came(REFRESH_S):
                    return

    @contextmanager
    def stopping(self, server: Server) -> Iterator[None]:
        """Show what the stopping server still has to do while the block runs."""
        if not self._console.is_terminal:
            yield
            return
        with Live(
            get_renderable=lambda: Text(stopping_line(server.engine), style="dim", no_wrap=True, overflow="ellipsis"),
            console=self._console,
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
        ):
            yield


def stopping_line(engine: Engine) -> str:
    """Return what an engine that is being closed still has to do, for people. From any thread."""
    parts = engine._parts
    store, snapshot = parts.backend.store, parts.snapshot
    if store is not None and (total := snapshot.saving_keys):
        return f"saving {keys(min(store.keys_written(), total), total)}"
    handlers = parts.router.triggers.working()
    if events := sum(handler.waiting() + len(handler.under_way()) for handler in handlers):
        return f"delivering {many(events, 'event')}"
    return "" if store is None else "saving"


class StatusLine:
    """The status line of a server: `up 0:02:10 | 3 workers | 1,200 calls/s | ...`, with problems first.

    The first rate is that of the engine's own functions, from any caller. The rate of workers follows: their calls of
    such functions are in both, their calls of one another are not in the first.
    """

    def __init__(self, server: Server, clock: Any = time.monotonic) -> None:
        self._server = server
        self._clock = clock
        self._began = self._last = clock()
        self._calls = self._of_workers = 0

    def text(self) -> Text:
        """Return the current line. The rate is that since the previous line."""
        now, status, stats = self._clock(), self._server.status(), self._server.engine.stats()
        passed_s = now - self._last if now > self._last else math.inf
        calls = sum(stats.calls.values())
        rate, of_workers = (calls - self._calls) / passed_s, (status.calls - self._of_workers) / passed_s
        self._calls, self._of_workers, self._last = calls, status.calls, now
        minutes, seconds = divmod(int(now - self._began), 60)
        parts = [
            f"up {minutes // 60}:{minutes % 60:02}:{seconds:02}",
            many(status.workers, "worker"),
            f"{rate:,.0f} calls/s",
            *([f"{of_workers:,.0f} calls/s of workers"] if of_workers else ()),
            many(status.functions, "function"),
            many(status.triggers, "trigger"),
            f"{many(stats.scopes, 'scope')}, {many(stats.keys, 'key')} in memory",
        ]
        if stats.unsaved_scopes:
            parts.append(f"{many(stats.unsaved_scopes, 'scope')} to save")
        line = Text(no_wrap=True, overflow="ellipsis")
        problems = self._server.engine.health().problems
        if problems:
            line.append(shown(f"{'; '.join(problems)} | ", keep=""), style="bold red")
        return line.append(" | ".join(parts))
