"""The cache with the calls of diskcache, in memory, in a directory, and through the owner of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_behaviour import CacheBehaviour

from scopestate import Engine
from scopestate.integrations.cache import Cache


def file_config(folder: Path) -> dict[str, Any]:
    kv = {"store_method": "file_based", "file_path": str(folder)}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}


@pytest.fixture(params=["memory", "directory", "engine", "follower"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cache]:
    match request.param:
        case "memory":
            with Cache() as cache:
                yield cache
        case "directory":
            with Cache(tmp_path / "cache") as cache:
                yield cache
        case "engine":
            with Engine() as engine:
                yield Cache(engine, scope="other")
        case "follower":
            with Engine.from_config(file_config(tmp_path)), Engine.from_config(file_config(tmp_path)) as follower:
                yield Cache(follower)


class TestCache(CacheBehaviour):
    """Each of them, in each place."""
