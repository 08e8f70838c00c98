"""An application under a real uvicorn in a thread of the test, and a client that reads server-sent events."""

from __future__ import annotations

import http.client
import threading
from types import TracebackType
from typing import Any, Self

import msgspec
import uvicorn

PATIENCE_S = 60.0


class Served:
    """`with Served(app) as served:` runs the application on this machine; `port` 0: on a free port."""

    def __init__(self, app: Any, *, port: int = 0, **options: Any) -> None:
        config = uvicorn.Config(app, port=port, log_level="warning", ws="websockets-sansio", **options)
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, name="uvicorn")

    def __enter__(self) -> Self:
        self._thread.start()
        while not self.server.started:
            self._thread.join(0.01)
            assert self._thread.is_alive(), "the application did not start"
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it cleanly, as SIGTERM does."""
        self.server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server did not end"

    def ask(self, method: str, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        """Make a request on a connection of its own; return the response and its body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def stream(self, path: str, last_event_id: str | None = None) -> EventSource:
        """Open a stream of server-sent events."""
        return EventSource(self.port, path, last_event_id)


class ServerSentEvent(msgspec.Struct, frozen=True):
    """One event, as the `EventSource` of a browser gives it."""

    kind: str
    data: str
    id: str | None
    """None: the event has none, and the last one holds."""

    def json(self) -> Any:
        """Return its data, which is JSON."""
        return msgspec.json.decode(self.data)


class EventSource:
    """Reads a stream line by line, as a browser does (HTML, section 9.2.6)."""

    def __init__(self, port: int, path: str, last_event_id: str | None = None) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        headers = {"Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        self.connection.request("GET", path, headers=headers)
        self.response = self.connection.getresponse()
        self.last_event_id = last_event_id or ""
        self.comments = 0
        self.retry_ms: int | None = None

    def next(self) -> ServerSentEvent | None:
        """Return the next event; None at the end of the stream."""
        kind, data, own_id = "message", list[str](), None
        while line := self.response.readline():
            name, _, text = line.decode().rstrip("\n").partition(":")
            text = text.removeprefix(" ")
            match name:
                case "" if line == b"\n":
                    if own_id is not None:
                        self.last_event_id = own_id
                    if data:
                        return ServerSentEvent(kind, "\n".join(data), own_id)
                    kind, own_id = "message", None
                case "":
                    self.comments += 1
                case "event":
                    kind = text
                case "data":
                    data.append(text)
                case "id":
                    own_id = text
                case "retry":
                    self.retry_ms = int(text)
        return None

    def until(self, kind: str) -> list[ServerSentEvent]:
        """Return the next events up to one of a kind, with it."""
        found = []
        while (event := self.next()) is not None:
            found.append(event)
            if event.kind == kind:
                return found
        raise AssertionError(f"the stream has ended: {found}")

    def close(self) -> None:
        """Go, as a client does whose page is closed."""
        self.response.close()
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
