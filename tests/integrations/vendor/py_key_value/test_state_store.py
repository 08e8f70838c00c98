"""py-key-value's own store tests on `StateStore`: in memory, in a directory, behind its owner, and in Redis.

It runs in a process of its own, from this folder, because those tests are in a package called `tests`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.stores.base import BaseStoreTests, ContextManagerStoreTestMixin

from scopestate import Engine
from scopestate.integrations.key_value import StateStore

MOST = 500
"""Entries of a collection: `test_not_unbounded` writes 1,000, and wants the first one gone."""


class TestInMemory(ContextManagerStoreTestMixin, BaseStoreTests):
    @pytest.fixture
    async def store(self) -> StateStore:
        return StateStore(max_entries_per_collection=MOST)


class TestInADirectory(BaseStoreTests):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[StateStore]:
        async with StateStore(tmp_path / "state", max_entries_per_collection=MOST) as store:
            yield store


class TestBehindTheOwner(BaseStoreTests):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[StateStore]:
        options = {"store_method": "file_based", "file_path": str(tmp_path / "state")}
        config = {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]}
        with Engine.from_config(config), Engine.from_config(config) as follower:
            yield StateStore(follower, max_entries_per_collection=MOST)


class TestInRedis(BaseStoreTests):
    @pytest.fixture
    async def store(self, state_redis_config: dict[str, Any]) -> AsyncIterator[StateStore]:
        with Engine.from_config(state_redis_config) as engine:
            yield StateStore(engine, max_entries_per_collection=MOST)
