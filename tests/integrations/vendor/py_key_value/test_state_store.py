"""py-key-value's own store tests on `StateStore`: in memory, in a directory, behind its owner, and in Redis.

It runs in a process of its own, from this folder, because those tests are in a package called `tests`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

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


@pytest.fixture(scope="module")
def file_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    options = {"store_method": "file_based", "file_path": str(tmp_path_factory.mktemp("state"))}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]}


@pytest.fixture(scope="module")
def owner(file_config: dict[str, Any]) -> Iterator[Engine]:
    with Engine.from_config(file_config) as engine:
        yield engine


@pytest.fixture(scope="module")
def follower(owner: Engine, file_config: dict[str, Any]) -> Iterator[Engine]:
    with Engine.from_config(file_config) as engine:
        yield engine


class TestInADirectory(BaseStoreTests):
    @pytest.fixture
    async def store(self, owner: Engine) -> StateStore:
        return StateStore(owner, prefix=f"{uuid4()}:", max_entries_per_collection=MOST)


class TestBehindTheOwner(BaseStoreTests):
    @pytest.fixture
    async def store(self, follower: Engine) -> StateStore:
        return StateStore(follower, prefix=f"{uuid4()}:", max_entries_per_collection=MOST)


class TestInRedis(BaseStoreTests):
    @pytest.fixture
    async def store(self, state_redis_config: dict[str, Any]) -> AsyncIterator[StateStore]:
        with Engine.from_config(state_redis_config) as engine:
            yield StateStore(engine, max_entries_per_collection=MOST)
