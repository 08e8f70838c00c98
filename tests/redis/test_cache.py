"""The cache with the calls of diskcache, in Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cache_behaviour import CacheBehaviour
from opening import open_at
from servers import Server

from scopestate.integrations.cache import Cache


@pytest.fixture
def cache(valkey: Server) -> Iterator[Cache]:
    with open_at(valkey.url) as engine:
        yield Cache(engine)


class TestCacheInRedis(CacheBehaviour):
    """Each of them."""
