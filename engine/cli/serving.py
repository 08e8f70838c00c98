"""The work of `scopestate serve`: an engine with its server, until a signal. Needs no Typer."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, Literal, Protocol

from scopestate.cli.current_folder import import_from_here
from scopestate.cli.terminal import errors_to_exit_codes, json_of, note, out, shown
from scopestate.errors import ConfigError
from scopestate.signals import SignalPipe

if TYPE_CHECKING:
    from scopestate.config import Config
    from scopestate.server.server import Server

_CLEARED: Final = "\r\x1b[K\x1b[?25h"
"""For a terminal: the line is cleared, the cursor is visible."""

_LISTEN_HINTS = {
    errno.EADDRINUSE: "; is another engine running there? `--port 0` takes any free port",
    errno.EACCES: "; ports below 1024 need root, choose a higher one",
    errno.EADDRNOTAVAIL: "; this machine has no such address",
}

Level = Literal["debug", "info", "warning", "error"]


def run(config: Path | None, host: str | None, port: int | None, log_level: Level, *, as_json: bool) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. The arguments are those of `scopestate serve`.

    Raises SystemExit, with the exit code, after an error that was printed.
    """
    from scopestate.server.server import Server  # noqa: PLC0415 - screens need only the rest

    import_from_here()
    signals, screen = _Signals(), _screen()
    with _logs_to(screen.log_handler(), log_level), errors_to_exit_codes(as_json=as_json), signals.caught():
        server = Server.from_config(config, host=host, port=port, handle_sigterm=False)
        signals.last_words = _ended_at_once(server)
        try:
            try:
                server.start()
            except OSError as error:
                hint = _LISTEN_HINTS.get(error.errno or 0, "")
                raise ConfigError(f"{error.strerror or error}{hint}") from error
            _announce(server, screen, as_json=as_json)
            screen.wait(server, signals.came)
            saved = ", then everything is saved" if _keeps(server) else ""
            screen.say(f"stopping: events are delivered{saved}; a second signal ends it at once")
        finally:
            with screen.stopping(server):
                server.stop()
        screen.say("stopped, everything is saved" if _keeps(server) else "stopped")


class Screen(Protocol):
    """What standard error shows while a server runs."""

    def log_handler(self) -> logging.Handler:
        """Return the handler that shows the log."""

    def announce(self, url: str, facts: Sequence[tuple[str, str]]) -> None:
        """Show where the server listens, and more about it."""

    def say(self, text: str) -> None:
        """Show a line."""

    def wait(self, server: Server, came: Callable[[float | None], bool]) -> None:
        """Return when a signal has come; `came` waits for one, for some seconds."""

    def stopping(self, server: Server) -> AbstractContextManager[object]:
        """Show what the stopping server still has to do while the block runs."""


class Lines:
    """The screen of a server whose standard error is a file or a pipe: plain lines, without rich and its memory."""

    def log_handler(self) -> logging.Handler:
        """Return the handler that shows the log."""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        return handler

    def announce(self, url: str, facts: Sequence[tuple[str, str]]) -> None:
        """Print a line for each fact."""
        rows = [("scopestate", url), *facts]
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            note(f"{name:<{width}}  {shown(text)}")

    def say(self, text: str) -> None:
        """Print a line."""
        note(text)

    def wait(self, server: Server, came: Callable[[float | None], bool]) -> None:
        """Return when a signal has come."""
        while not came(None):
            pass

    def stopping(self, server: Server) -> AbstractContextManager[object]:
        """Print nothing."""
        return nullcontext()


def _screen() -> Screen:
    if sys.stderr is None or not (
        sys.stderr.isatty() or os.environ.get("FORCE_COLOR") or os.environ.get("TTY_COMPATIBLE") == "1"
    ):
        return Lines()
    from scopestate.cli.serve_screen import TerminalScreen  # noqa: PLC0415 - rich is slow to import

    return TerminalScreen()


class _Signals:
    """The signals that end the program: the first gracefully, the second at once."""

    def __init__(self) -> None:
        self._pipe = SignalPipe()
        self._count = 0
        self.last_words = ""
        """What to print if a second signal ends the program."""

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
            # Not through rich, whose lock the interrupted code may hold. It has hidden the cursor of a terminal.
            with suppress(OSError):
                os.write(2, f"{_CLEARED if os.isatty(2) else ''}{self.last_words}\n".encode())
            os._exit(128 + number)


def _ended_at_once(server: Server) -> str:
    saved = " and changes that were not saved" if _keeps(server) else ""
    return f"ended at once by a second signal: events that were not delivered{saved} may be lost"


def _announce(server: Server, screen: Screen, *, as_json: bool) -> None:
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
    facts_shown = (
        ("config", config.source or "none: defaults"),
        ("state", config.adapter.config.described()),
        ("functions", _count(config)),
        ("access", describe_access(server)),
        ("process", f"{os.getpid()}; Ctrl-C or SIGTERM stops it"),
    )
    screen.announce(server.url, facts_shown)


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


class SafeFormatter(logging.Formatter):
    """Escapes control characters: the log contains names and texts of workers, which must not control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), keep="\n\t")


@contextmanager
def _logs_to(handler: logging.Handler, level: str) -> Iterator[None]:
    """Show the log while the block runs."""
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
