"""`scopestate serve`: run an engine with its server until a signal."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from scopestate.cli.config import import_from_here
from scopestate.cli.terminal import AsJson, errors_to_exit_codes, json_of, out, shown, standard_error
from scopestate.config import Config
from scopestate.errors import ConfigError
from scopestate.server.server import Server
from scopestate.signals import SignalPipe

REFRESH_S = 1.0

_LISTEN_HINTS = {
    errno.EADDRINUSE: "; is another engine running there? `--port 0` takes a free port",
    errno.EACCES: "; ports below 1024 need root, choose a higher one",
    errno.EADDRNOTAVAIL: "; this machine has no such address",
}

Level = Literal["debug", "info", "warning", "error"]


def serve(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file; without it: state in memory, default address.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on, instead of the file's.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", "-p", min=0, max=65535, help="Port, instead of the file's; 0: a free one.")
    ] = None,
    log_level: Annotated[Level, typer.Option("--log-level", help="What to log on standard error.")] = "info",
    as_json: AsJson = False,
) -> None:
    """Serve an engine to workers and bridges until SIGINT, SIGTERM or SIGHUP.

    It then ends gracefully: fired events reach their handlers, and everything is saved. A second signal ends it at
    once. Changes of the file apply while it runs. With --json, a line of JSON on standard output says where it listens.
    """
    console = standard_error()
    import_from_here()
    signals = _Signals()
    with _logs_to(console, log_level), errors_to_exit_codes(as_json=as_json), signals.caught():
        server = Server.from_config(config, host=host, port=port, handle_sigterm=False)
        try:
            try:
                server.start()
            except OSError as error:
                hint = _LISTEN_HINTS.get(error.errno or 0, "")
                raise ConfigError(f"{error.strerror or error}{hint}") from error
            _announce(server, console, as_json=as_json)
            _wait(server, signals, console)
            console.print(
                f"stopping: events are delivered{', then everything is saved' if _keeps(server) else ''}", style="dim"
            )
        finally:
            server.stop()
        console.print("stopped, everything is saved" if _keeps(server) else "stopped", style="dim")


class _Signals:
    """The signals that end the program: the first gracefully, the second at once."""

    def __init__(self) -> None:
        self._pipe = SignalPipe()
        self._count = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handle SIGINT, SIGTERM and SIGHUP while the block runs."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
            numbers.append(hangup)  # under `nohup` it is ignored, so that the process outlives its terminal
        with self._pipe.open():
            before = {number: signal.signal(number, self._take) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def came(self, timeout_s: float | None = None) -> bool:
        """Wait for a signal, at most `timeout_s` seconds; return whether one came."""
        if not self._count:
            self._pipe.wait(timeout_s)
        return self._count > 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            os._exit(128 + number)


def _wait(server: Server, signals: _Signals, console: Console) -> None:
    """Wait for a signal. On a terminal, show a status line until then."""
    if not console.is_terminal:
        while not signals.came():
            pass
        return
    line = StatusLine(server)
    # No spinner: redrawing many times a second would cost a server too much.
    with Live(line.text(), console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(line.text(), refresh=True)
            if signals.came(REFRESH_S):
                return


class StatusLine:
    """The status line of a server: `up 0:02:10 | 3 workers | 1,200 calls/s | ...`, with problems first."""

    def __init__(self, server: Server, clock: Any = time.monotonic) -> None:
        self._server = server
        self._clock = clock
        self._began = self._last = clock()
        self._calls = 0

    def text(self) -> Text:
        """Return the current line. The rate is that since the previous line."""
        now, status, stats = self._clock(), self._server.status(), self._server.engine.stats()
        calls = status.calls + sum(stats.calls.values())
        rate = (calls - self._calls) / (now - self._last) if now > self._last else 0.0
        self._calls, self._last = calls, now
        minutes, seconds = divmod(int(now - self._began), 60)
        parts = [
            f"up {minutes // 60}:{minutes % 60:02}:{seconds:02}",
            f"{status.workers} workers",
            f"{rate:,.0f} calls/s",
            f"{status.functions} functions",
            f"{status.triggers} triggers",
            f"{stats.scopes:,} scopes, {stats.keys:,} keys in memory",
        ]
        if stats.unsaved_scopes:
            parts.append(f"{stats.unsaved_scopes} scopes to save")
        line = Text(no_wrap=True, overflow="ellipsis")
        problems = self._server.engine.health().problems
        if problems:
            line.append(shown(f"{'; '.join(problems)} | ", keep=""), style="bold red")
        return line.append(" | ".join(parts))


def _announce(server: Server, console: Console, *, as_json: bool) -> None:
    config = server.engine._parts.config
    if as_json:
        facts = {
            "url": server.url,
            "pid": os.getpid(),
            "config": config.source,
            "state": config.adapter.config.described(),
        }
        out(json_of(facts))
        return
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]scopestate[/]", f"[bold green]{server.url}[/]")
    for name, text in (
        ("config", config.source or "none: defaults"),
        ("state", config.adapter.config.described()),
        ("functions", _count(config)),
        ("access", describe_access(server)),
        ("process", f"{os.getpid()}; Ctrl-C or SIGTERM stops it"),
    ):
        table.add_row(f"[dim]{name}[/]", console.render_str(text, markup=False))
    console.print(table)


def describe_access(server: Server) -> str:
    """Describe which programs may connect."""
    config = server.config
    who = (
        f"bearers of {len(config.auth.tokens)} token(s)"
        if config.auth.tokens
        else "every program that reaches the address"
    )
    return f"{who}, {'TLS' if config.tls else 'no TLS'}"


def _count(config: Config) -> str:
    return f"{len(config.functions)} configured, {len(config.triggers)} triggers"


def _keeps(server: Server) -> bool:
    return server.engine._parts.backend.keeps


class _Shown(logging.Formatter):
    """Escapes control characters: the log contains names and texts of workers, which must not control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), keep="\n\t")


@contextmanager
def _logs_to(console: Console, level: str) -> Iterator[None]:
    """Show the log on standard error while the block runs."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False)
        handler.setFormatter(_Shown("%(message)s", "[%X]"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Shown("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root, websockets = logging.getLogger(), logging.getLogger("websockets")
    before = root.level, websockets.level
    root.addHandler(handler)
    root.setLevel(level.upper())
    websockets.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        websockets.setLevel(before[1])
