"""The work of `scopestate console`: the web console of a running engine or of a file, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.cli.arguments import given_text
from scopestate.cli.current_folder import import_from_here
from scopestate.cli.terminal import errors_to_exit_codes, json_of, out, shown, standard_error
from scopestate.config import load
from scopestate.engine import Engine
from scopestate.errors import ConfigError, ScopestateError, StorageError

if TYPE_CHECKING:
    from scopestate.console.sessions import Sessions

HOST: Final = "127.0.0.1"
LAST_WORDS_S: Final = 3
"""Seconds that open pages and streams may take when the command ends."""


def console(
    source: str, port: int, token: str | None, ca_file: str | None, *, write: bool, open_browser: bool, as_json: bool
) -> None:
    """See `console.console`."""
    with errors_to_exit_codes(as_json=as_json):
        try:
            import uvicorn  # noqa: F401, PLC0415 - of an extra

            from scopestate.console.sessions import Sessions  # noqa: PLC0415 - of an extra
        except ImportError as error:
            raise ConfigError(
                f"the console needs the extra `console` ({error}): pip install 'scopestate[console]'"
            ) from error
        with _engine(given_text(source, "the argument"), token, ca_file) as engine, _listener(port) as listener:
            sessions = Sessions()
            address = f"http://{HOST}:{listener.getsockname()[1]}/"
            _announce(engine, sessions, address, write=write, as_json=as_json)
            if open_browser:
                webbrowser.open(_link(sessions, address))
            _serve(engine, sessions, listener, write=write)


@contextlib.contextmanager
def _engine(source: str, token: str | None, ca_file: str | None) -> Iterator[Engine]:
    """Open the engine to show, without any functions, triggers or servers of a program."""
    if source.startswith(("ws://", "wss://", "ws+unix://")):
        options: dict[str, Any] = {"bridge_url": source, "token": token, "tls_ca_file": ca_file}
        given = {name: value for name, value in options.items() if value is not None}
        engine = Engine.from_config(
            {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "bridge", "config": given}}}]},
            handle_sigterm=False,
        )
    else:
        import_from_here()
        config = msgspec.structs.replace(load(source), functions={}, triggers=(), server=None)
        engine = Engine(config, handle_sigterm=False)
    with engine:
        try:
            engine.list_groups()
        except StorageError as error:
            raise (error.__cause__ if isinstance(error.__cause__, ScopestateError) else error) from error
        yield engine


@contextlib.contextmanager
def _listener(port: int) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise ConfigError(f"{HOST}:{port}: {error.strerror or error}; `--port 0` takes any free port") from error
    with listener:
        yield listener


def _link(sessions: Sessions, address: str) -> str:
    return f"{address}?token={sessions.new_token()}"


def _announce(engine: Engine, sessions: Sessions, address: str, *, write: bool, as_json: bool) -> None:
    if as_json:
        out(json_of({"url": _link(sessions, address), "pid": os.getpid(), "write": write, "engine": repr(engine)}))
        return
    console = standard_error()
    console.print(shown(f"{engine!r}, {'read and write' if write else 'read only'}; Ctrl-C ends it"), markup=False)
    out(_link(sessions, address))
    if sys.stdin is not None and sys.stdin.isatty():
        console.print("each address admits one browser, once; press Enter for another", style="dim")
        threading.Thread(target=_print_links, args=(sessions, address), name="scopestate-console", daemon=True).start()


def _print_links(sessions: Sessions, address: str) -> None:
    """Print another address for each line at the terminal."""
    for _ in sys.stdin:
        out(_link(sessions, address))


def _serve(engine: Engine, sessions: Sessions, listener: socket.socket, *, write: bool) -> None:
    """Serve the console until a signal."""
    import uvicorn  # noqa: PLC0415 - of an extra

    from scopestate.console import console as make_console  # noqa: PLC0415 - of an extra
    from scopestate.console.security import LOOPBACK  # noqa: PLC0415 - of an extra

    class Server(uvicorn.Server):
        """Leaves signals to the command, which ends in order and with the right exit code."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    app = make_console(engine, auth=sessions.auth, write=write, hosts=LOOPBACK, log_out=sessions.log_out)
    # No access log: it would contain the tokens.
    server = Server(
        uvicorn.Config(
            app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=LAST_WORDS_S
        )
    )

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(NotImplementedError):
                    loop.add_signal_handler(number, _end, server)
        await server.serve([listener])

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())


def _end(server: Any) -> None:
    server.should_exit = True
