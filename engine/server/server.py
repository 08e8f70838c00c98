"""A server for iii workers: the engine's functions, triggers and events over WebSocket (docs/reference/protocol.md).

    with Engine.from_config("engine.yaml") as engine, Server(engine, port=49134) as server:
        ...                                   # on its own thread and event loop
    await Server(engine).serve()              # on the running event loop

Needs the extra `wire`. Paths: `/` for workers, `/otel` for telemetry, `/ws/channels/{id}`, `/healthz`, `/metrics`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qs

import msgspec

try:  # before modules whose import would fail without this message
    import picows
except ImportError as error:  # pragma: no cover - the extra is installed where tests run
    raise ImportError("a server needs the extra `wire`: pip install 'scopestate[wire]'") from error

from scopestate.config import AuthConfig, Config, ServerConfig
from scopestate.engine import Engine
from scopestate.errors import ConfigError, ScopestateError
from scopestate.figures import CONTENT_TYPE, exposition
from scopestate.ops.plain import Plain
from scopestate.server.access import METRICS_ID, Access, AccessCheck, cannot_be_rebound
from scopestate.server.channels import Channels
from scopestate.server.connections import GOING, POLICY, Batches, Connection, Registry
from scopestate.server.handshakes import Certificates, Handshakes, Request, Response
from scopestate.server.hub import Hub
from scopestate.server.skipping import Refusing, Telemetry
from scopestate.server.triggers import FUNCTIONS_AVAILABLE
from scopestate.server.worker import Worker, WorkerConnection
from scopestate.signals import Guard, join, wait_for
from scopestate.wire.frames import Error, ErrorBody, encode
from scopestate.wire.options import LIMIT_HEADER, limit_in
from scopestate.wire.session import SessionLimits

log = logging.getLogger("scopestate.server")

# What `picows.ws_create_server` makes for each connection; its stubs do not name it.
_WSProtocol: Final[Callable[..., asyncio.BufferedProtocol]] = picows.picows.WSProtocol  # type: ignore[attr-defined]

# picows reports every broken frame as an error with a traceback; the listeners say what matters.
logging.getLogger("picows").setLevel(logging.CRITICAL)

LOOK_S: Final = 1.0
"""Seconds between two checks for overrun workers."""
PROGRESS_LOOKS: Final = 15
"""A worker's connection is aborted if it reads nothing for this many checks while too much waits for it."""
FUNCTIONS_LOOKS: Final = 5
"""Checks between two comparisons of the functions for `engine::functions-available`."""
RECEIVE_BUFFER: Final = 256 * 1024
"""Bytes that the kernel buffers for a connection, which limits how much of one connection is handled at once."""
MAX_REFUSALS: Final = 64
"""Connections without a valid token that may be open to get their error message; further ones are answered with HTTP
401."""
RESERVED_SHARE: Final = 10
"""One in this many connections (rounded up) is reserved for workers whose tokens allow everything."""
START_TIMEOUT_S: Final = 30.0
CLOSE_WAIT_S: Final = 1.0
"""Seconds that a stopping server waits for the answers to its close frames."""

STOPS: Final = "the server stops"
"""The reason given when connections are closed."""
_WITHDRAWN: Final = "its token was withdrawn"
_UNAUTHORISED: Final = encode(Error(ErrorBody("AUTH_ERROR", "send `Authorization: Bearer TOKEN` with a valid token")))


class ServerStatus(Plain, msgspec.Struct, frozen=True):
    """The state of a server at one moment."""

    url: str
    workers: int
    connections: int
    """All open connections: workers, telemetry, channels."""
    handshakes: int
    """Connections that were accepted and have sent no complete request yet."""
    turned_away: int
    """Connections that were closed since the start to keep descriptors for the engine, or for newer connections."""
    functions: int
    """Functions that workers have registered."""
    triggers: int
    """Triggers that workers have registered."""
    calls: int
    """Calls that workers made since the start."""
    refused: int
    """Connections, calls, registrations and deliveries refused since the start because a right was missing."""


class Server:
    """Serves one engine. `start` and `stop` may be called from any thread; `serve` on any event loop, once."""

    _close_wait_s = CLOSE_WAIT_S
    _public = True
    """Whether the program can also call the server's functions, `engine::*`."""

    def __init__(
        self,
        engine: Engine,
        host: str | None = None,
        port: int | None = None,
        *,
        config: ServerConfig | None = None,
        owns_engine: bool = False,
    ) -> None:
        """`host` and `port` replace those of the configuration. With `owns_engine`, stopping also closes the engine.

        Raises ConfigError for a token or certificate that cannot be read, and for an address that needs a token.
        """
        given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
        self.config = msgspec.structs.replace(config or ServerConfig(), **given)
        self.engine = engine
        given_engine: object = engine  # the program may pass anything
        if not isinstance(given_engine, Engine):
            raise ConfigError(
                f"Server() takes an Engine, not {type(given_engine).__name__}: for a file or a mapping use "
                "Server.from_config(...)"
            )
        engine._parts.config.adapter.config.refuse_server(self.config.host, self.config.port)
        self._owns_engine = owns_engine
        self._follows = config is not None and config is engine._parts.config.server
        self._access_check = AccessCheck(self.config)
        self._certificates = None if self.config.tls is None else Certificates(self.config.tls)
        self._handshakes = self._make_handshakes()
        self._batches = Batches()
        self._connections = Registry()
        self._telemetry = Registry()
        self._refusals = Registry()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hub: Hub | None = None
        self._scrape: asyncio.Task[Response] | None = None
        """The task that reads the figures for `/metrics`; None: no request has come since the last answer."""
        self._channels: Channels | None = None
        self._thread: threading.Thread | None = None
        self._listening = threading.Event()
        self._failure: BaseException | None = None
        self._stop: asyncio.Event | None = None
        self._exclusive = Guard()
        self._looks = 0
        self.host = self.config.host
        self.port = self.config.port
        """The port on which it listens; before that, the configured one."""

    @classmethod
    def from_config(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any] | Config | None = None,
        *,
        host: str | None = None,
        port: int | None = None,
        **options: Any,
    ) -> Self:
        """Open an engine as `Engine.from_config` does, and make the server of its `iii-worker-manager` entry.

        Stopping the server closes that engine. Raises ConfigError and StorageError.
        """
        engine = Engine.from_config(source, **options)
        try:
            return cls(engine, host, port, config=engine._parts.config.server, owns_engine=True)
        except BaseException:
            engine.close()
            raise

    @property
    def url(self) -> str:
        """The address to which workers connect."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self._certificates else 'ws'}://{host}:{self.port}"

    def status(self) -> ServerStatus:
        """Return the current state. From any thread."""
        hub = self._hub
        workers: list[Worker] = [] if hub is None else list(hub.workers.values())
        return ServerStatus(
            self.url,
            len(workers),
            len(self._connections) + len(self._telemetry),
            len(self._handshakes),
            self._handshakes.turned_away,
            sum(len(worker.functions) for worker in workers),
            0 if hub is None else len(hub.triggers),
            0 if hub is None else hub.calls,
            0 if hub is None else hub.refused,
        )

    # ------------------------------------------------------------------------------------------- starting, stopping

    def start(self) -> Self:
        """Serve on a thread of its own; return once it listens. Raises OSError, such as for a port in use."""
        if not self._exclusive.run(self._start):
            return self
        assert self._thread is not None
        if not wait_for(self._listening.wait, START_TIMEOUT_S):
            raise ScopestateError("the server did not start in time")
        if self._failure is not None:
            join(self._thread)
            self._thread = None
            self._listening.clear()
            failure, self._failure = self._failure, None
            raise failure
        return self

    def stop(self) -> None:
        """Close every connection with code 1012, end the thread, and close the engine if it owns it. Idempotent."""
        self._exclusive.run(self._end)
        if self._owns_engine:
            self.engine.close()

    def _start(self) -> bool:
        if self._thread is not None:
            return False
        self._thread = threading.Thread(target=self._run, name="scopestate-server", daemon=True)
        self._thread.start()
        return True

    def _end(self) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has already ended
                loop.call_soon_threadsafe(self._ask_to_stop)
        if self._thread is not None:
            join(self._thread)
        self._thread = None
        self._listening.clear()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            loop = new_loop()
            asyncio.set_event_loop(loop)
            try:
                loop.run_until_complete(self.serve())
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()
        except BaseException as error:
            self._failure = error
            if self._listening.is_set():
                log.exception("the server has failed")
        finally:
            self._listening.set()

    def _ask_to_stop(self) -> None:
        if self._stop is not None:
            self._stop.set()

    async def serve(self) -> None:
        """Serve on the running event loop until cancelled, or until `stop` is called on another thread.

        Raises OSError if it cannot listen.
        """
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        config = self.config
        self._channels = Channels(self._batches, config.max_message_bytes, config.max_unsent_bytes)
        limits = SessionLimits(
            registrations=config.max_registrations,
            calls=config.max_calls,
            call_bytes=config.max_call_bytes,
            message_bytes=config.max_message_bytes,
        )
        timeout_s = config.call_timeout_ms / 1000
        self._hub = Hub(
            self.engine,
            self._channels,
            limits,
            timeout_s,
            config.max_waiting_events,
            config.max_waiting_bytes,
            batches=self._batches,
            public=self._public,
        )
        listeners: list[socket.socket] = []
        tasks = [asyncio.create_task(self._look_after_workers())]
        try:
            listeners += self._listen()
            tasks += [asyncio.create_task(self._handshakes.accept_from(listener)) for listener in listeners]
            log.info("serving %s", self._what)
            self._follow_reloads()
            self._listening.set()
            await self._stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # before the sockets for which they wait are closed
            for listener in listeners:
                listener.close()
            self._handshakes.close()
            if self._follows:
                self.engine._parts.reconfigured = None
            await self._close_connections()

    def _listen(self) -> list[socket.socket]:
        """Return the listening sockets. Raises OSError."""
        listeners = _bind(self.config.host, self.config.port)
        for listener in listeners:
            listener.listen(1024)
            self.port = listener.getsockname()[1]
        return listeners

    @property
    def _what(self) -> str:
        """What it serves and where, for the log."""
        return f"workers on {self.url}"

    def _refuse_connection(self, accepted: socket.socket) -> str | None:
        """Return why a connection that was accepted is closed at once; None: it is not."""
        del accepted
        return None

    def _make_handshakes(self) -> Handshakes:
        def make_protocol() -> asyncio.BufferedProtocol:
            return _WSProtocol(
                None,  # host and port: a client's
                None,  # path: a client's
                False,  # it is the server's side
                self._admit,
                logging.getLogger("picows.server"),
                True,  # an exception in a listener ends the connection
                None,  # `Handshakes` has a time limit of its own
                False,  # no pings to clients
                20,
                20,
                picows.WSAutoPingStrategy.PING_WHEN_IDLE,
                False,  # pings of clients are answered by the listeners
                self.config.max_message_bytes,
                None,
                4096,
            )

        return Handshakes(
            self._respond, make_protocol, self._certificates, self.config.max_connections, self._refuse_connection
        )

    async def _close_connections(self) -> None:
        if self._owns_engine:
            # While the workers are still connected: they run the handlers of events already fired.
            await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
        await self._say_goodbye()
        if self._hub is not None:
            await self._hub.close(STOPS)
        if self._channels is not None:
            self._channels.close(GOING, STOPS)
        for connection in self._all_connections():
            connection.close(GOING, STOPS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._close_wait_s):
                for registry in (self._connections, self._telemetry, self._refusals):
                    await registry.wait_until_empty()
        for connection in self._all_connections():
            connection.abort()
        await asyncio.sleep(0)
        self._hub = self._channels = self._loop = None

    async def _say_goodbye(self) -> None:
        """End the connections that need a special goodbye. The others are closed after this."""

    def _follow_reloads(self) -> None:
        """Apply changed tokens, if the configuration is the engine's own."""
        parts, loop = self.engine._parts, asyncio.get_running_loop()
        if self._follows:

            def take_up(config: Config) -> None:
                with contextlib.suppress(RuntimeError):  # the loop was closed in between
                    loop.call_soon_threadsafe(self._reload_tokens, config.server)

            parts.reconfigured = take_up

    def _reload_tokens(self, config: ServerConfig | None) -> None:
        """Apply the tokens of a reloaded configuration. Connections of workers whose token was removed are closed."""
        hub = self._hub
        if hub is None:
            return
        try:
            withdrawn = self._access_check.reload(AuthConfig() if config is None else config.auth)
        except ConfigError as error:
            log.warning(
                "the tokens of the new configuration could not be loaded, and the previous ones stay in use: %s", error
            )
            return
        for worker in list(hub.workers.values()):
            if worker.access in withdrawn:
                hub.channels.end_all_of(worker.worker_id, POLICY, _WITHDRAWN)
                worker.close(POLICY, _WITHDRAWN)
            else:
                hub.withdraw_forbidden(worker)
        for sink in self._telemetry.all():
            if isinstance(sink, Telemetry) and sink.access in withdrawn:
                sink.close(POLICY, _WITHDRAWN)

    def _all_connections(self) -> list[Connection]:
        return [*self._connections.all(), *self._telemetry.all(), *self._refusals.all()]

    # ---------------------------------------------------------------------------------------------------- admission

    def _admit(self, request: picows.WSUpgradeRequest) -> Any:
        """Choose the purpose of a connection by its path, or refuse it."""
        path, _, query = request.path.decode("latin-1").partition("?")
        headers = request.headers
        if not self._access_check.admits_origin(headers.get("Origin")):
            return _refusal(HTTPStatus.FORBIDDEN, "web pages of this origin may not connect: see `origins`")
        hub, channels = self._hub, self._channels
        if hub is None or channels is None:
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the server stops")
        if path.startswith("/ws/channels/"):
            # Only the key counts here. A worker with any token may have made the channel, so it gets no reserved place.
            if self._is_full(all_places=False):
                return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
            fields = parse_qs(query)
            key, direction = fields.get("key", [""])[0], fields.get("dir", [""])[0]
            end = channels.take(path.removeprefix("/ws/channels/"), key, direction)
            if end is not None:
                end.belong_to(self._connections)
            return end  # None is answered 404
        if path not in ("/", "/otel"):
            return None
        admitted, access = self._access_check.admits(headers.get("Authorization"))
        if not admitted:
            hub.refused += 1
            return self._refuse(path)
        return self._take_in(hub, access, path, request)

    def _take_in(self, hub: Hub, access: Access | None, path: str, request: picows.WSUpgradeRequest) -> Any:
        config = self.config
        if path == "/otel":
            # Counted separately: telemetry does not use up the connections of workers.
            if len(self._telemetry) >= config.max_connections:
                return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many telemetry connections")
            sink = Telemetry(access, self._batches)
            sink.belong_to(self._telemetry)
            return sink
        if self._is_full(all_places=access is None or access.full):
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
        announced = request.headers.get(LIMIT_HEADER)
        worker = WorkerConnection(
            hub,
            access,
            self._batches,
            config.max_message_bytes,
            config.max_unsent_bytes,
            limit_in(announced, config.max_message_bytes),
            carries_depth=announced is not None,  # it is scopestate's own client
        )
        worker.belong_to(self._connections)
        response = picows.WSUpgradeResponse.create_101_response({LIMIT_HEADER: str(config.max_message_bytes)})
        return picows.WSUpgradeResponseWithListener(response, worker)

    def _refuse(self, path: str) -> Any:
        """Refuse a connection without a valid token: with a message of the protocol, or with HTTP if there are many."""
        if path == "/" and len(self._refusals) < MAX_REFUSALS:
            refusing = Refusing(_UNAUTHORISED, self._batches)
            refusing.belong_to(self._refusals)
            return refusing
        return _refusal(HTTPStatus.UNAUTHORIZED, "send `Authorization: Bearer TOKEN` with a valid token")

    def _is_full(self, *, all_places: bool) -> bool:
        """Return whether one more connection is too many. The last are reserved for tokens that allow everything."""
        most = self.config.max_connections
        if not all_places and self.config.auth.tokens and most > 1:
            most -= -(-most // RESERVED_SHARE)
        return len(self._connections) >= most

    def _respond(self, request: Request) -> Response | Awaitable[Response]:
        """Answer a request that does not ask for a WebSocket."""
        websocket = request.path in ("/", "/otel")
        path = request.path if websocket else request.path.removesuffix("/")
        if path not in ("/healthz", "/metrics") and not websocket:
            return Response(HTTPStatus.NOT_FOUND, b"404 Not Found")
        if request.method not in ("GET", "HEAD"):
            return Response(HTTPStatus.METHOD_NOT_ALLOWED, b"405 Method Not Allowed", {"Allow": "GET, HEAD"})
        if websocket:
            return Response(HTTPStatus.UPGRADE_REQUIRED, b"this path is for WebSockets", {"Upgrade": "websocket"})
        if path == "/metrics":
            return self._metrics(request)
        return self._health(request.headers.get("authorization"))

    def _metrics(self, request: Request) -> Response | Awaitable[Response]:
        """Answer with the figures of the engine. The token must be full, or name `METRICS_ID`.

        Without tokens it answers only requests to a host name that no web page can have chosen: see
        `cannot_be_rebound`.
        """
        admitted, access = self._access_check.admits(request.headers.get("authorization"))
        if not admitted:
            self._note_refused()
            words = b"send `Authorization: Bearer TOKEN` with a valid token"
            return Response(HTTPStatus.UNAUTHORIZED, words, {"WWW-Authenticate": "Bearer"})
        if access is not None and not access.reads_metrics:
            self._note_refused()
            words = b"this token may not read the figures of the engine: name " + METRICS_ID.encode()
            return Response(HTTPStatus.FORBIDDEN, words + b" in its `functions`")
        if access is None and not cannot_be_rebound(request.headers.get("host"), self.config.host):
            words = b"without `auth.tokens`, ask by an IP address or as localhost: any other name may be a web page's"
            return Response(HTTPStatus.FORBIDDEN, words)
        if self._scrape is None:
            self._scrape = asyncio.ensure_future(self._read_figures())
        # Requests that come while the figures are read get the same answer: many scrapes take one thread and one
        # reading.
        return asyncio.shield(self._scrape)

    async def _read_figures(self) -> Response:
        # Not on the threads for handlers: the figures matter most when all of those are in use.
        try:
            figures = await asyncio.get_running_loop().run_in_executor(None, exposition, self.engine)
        finally:
            self._scrape = None
        return Response(HTTPStatus.OK, figures, {"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})

    def _note_refused(self) -> None:
        if self._hub is not None:
            self._hub.refused += 1

    def _health(self, authorization: str | None) -> Response:
        """Answer whether the engine is healthy; list the problems only for a token that may do everything.

        Without tokens the problems are never listed: a web page that has tricked a browser could read them.
        """
        health = self.engine.health()
        status = HTTPStatus.OK if health.ok else HTTPStatus.SERVICE_UNAVAILABLE
        told: dict[str, Any] = {"status": "ok" if health.ok else "failing"}
        admitted, access = self._access_check.admits(authorization)
        if admitted and access is not None and access.full:
            told["health"] = health
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
        return Response(status, msgspec.json.encode(told), headers)

    async def _look_after_workers(self) -> None:
        """Once a second: close overrun workers, and fire `engine::functions-available` if functions have changed."""
        while True:
            await asyncio.sleep(LOOK_S)
            hub = self._hub
            if hub is None:
                return
            self._looks += 1
            hub.triggers.close_overrun()
            if self._looks % PROGRESS_LOOKS == 0:
                for connection in self._all_connections():
                    connection.look_for_progress()
            if self._looks % FUNCTIONS_LOOKS == 0 and hub.triggers.watches(FUNCTIONS_AVAILABLE):
                hub.tell_changed_functions()


def _refusal(status: HTTPStatus, reason: str) -> picows.WSUpgradeResponseWithListener:
    response = picows.WSUpgradeResponse.create_error_response(status, reason.encode())
    return picows.WSUpgradeResponseWithListener(response, None)


def _bind(host: str, port: int) -> list[socket.socket]:
    """Bind to every address of `host`. With port 0 all get the port that the first one was given."""
    bound: list[socket.socket] = []
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            bound.append(listener)
            listener.setblocking(False)
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Accepted sockets inherit these. Keep-alive probes notice a peer that has vanished.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
            listener.bind((address[0], bound[0].getsockname()[1], *address[2:]) if len(bound) > 1 else address)
    except OSError as error:
        for listener in bound:
            listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return bound


def new_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop of uvloop if it is installed, otherwise of asyncio."""
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
