"""Shared code of the tests that compare an engine on Redis with every other engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from opening import open_at
from reliability.living import Seen
from servers import Server

from scopestate import Engine

OpenRedis = Callable[..., Engine]


class Noted(Seen):
    """A handler that remembers its events, until they are taken."""

    def take(self) -> list[dict[str, Any]]:
        """Return what is here as plain dicts, and forget it."""
        with self._changed:
            events, self.events = self.events, []
        return [event.to_json() for event in events]


@pytest.fixture
def open_redis(nothing_left_behind: None) -> Iterator[OpenRedis]:
    """Open engines: `open_redis(url, key_prefix="x:", ...)`; closed at the end."""
    opened: list[Engine] = []

    def open_(url: str, **options: Any) -> Engine:
        engine = open_at(url, **options)
        opened.append(engine)
        return engine

    yield open_
    for engine in reversed(opened):
        engine.close()


def bytes_client(server: Server) -> redis.Redis:
    """A client like that of any other program: bytes in, bytes out."""
    return server.client(decode_responses=False)
