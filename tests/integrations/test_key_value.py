"""The store for py-key-value: its project's own tests, and what they do not ask."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from key_value.aio import errors
from key_value.aio.protocols.key_value import (
    AsyncCullProtocol,
    AsyncDestroyCollectionProtocol,
    AsyncDestroyStoreProtocol,
    AsyncEnumerateCollectionsProtocol,
    AsyncEnumerateKeysProtocol,
)
from key_value.aio.wrappers.prefix_collections import PrefixCollectionsWrapper
from reliability.living import untraced_environment

from scopestate import Engine
from scopestate.errors import ConfigError, DeserializationError, EngineClosed, InvalidValue
from scopestate.integrations.key_value import StateStore

SUITE = Path(__file__).parent / "vendor" / "py_key_value"
PLACES = {"TestInMemory": 134, "TestInADirectory": 67, "TestBehindTheOwner": 67, "TestInRedis": 67}
"""How many of their tests run in each place."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.timeout(300)
def test_it_passes_the_store_tests_of_py_key_value(place: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", "--rootdir", ".", "--confcutdir", "."),
            *("--basetemp", str(tmp_path / "theirs"), f"test_state_store.py::{place}"),
        ],
        cwd=SUITE,
        env=untraced_environment() | {"PYTHONPATH": str(SUITE), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(rf"^{PLACES[place]} passed in ", ran.stdout, re.MULTILINE), ran.stdout[-500:]


@pytest.mark.asyncio
async def test_it_has_every_protocol_of_a_store() -> None:
    async with StateStore() as store:
        for protocol in (
            AsyncCullProtocol,
            AsyncDestroyCollectionProtocol,
            AsyncDestroyStoreProtocol,
            AsyncEnumerateCollectionsProtocol,
            AsyncEnumerateKeysProtocol,
        ):
            assert isinstance(store, protocol)


@pytest.mark.asyncio
async def test_a_collection_is_a_scope_and_a_value_is_stored_as_it_is() -> None:
    with Engine() as engine:
        store = StateStore(engine, prefix="mcp:", default_collection="things")
        await store.put("ada", {"name": "Ada"}, collection="users", ttl=600)
        await store.put("ada", {"n": 1})
        assert engine.get("mcp:users", "ada") == {"name": "Ada"}
        assert 599 < (engine.ttl("mcp:users", "ada") or 0) <= 600
        assert engine.get("mcp:things", "ada") == {"n": 1}
        await store.put("ada", {"n": 2}, collection="users")
        assert await store.ttl("ada", collection="users") == ({"n": 2}, None)
        await store.put("soon", {"n": 1}, ttl=1e-9)
        while await store.get("soon") is not None:  # noqa: ASYNC110 - a millisecond
            await asyncio.sleep(0)
        assert repr(store) == "<StateStore 'mcp:' in an engine>"
        await store.close()
        assert not engine.closed


@pytest.mark.asyncio
async def test_names_of_any_kind_do_not_collide(tmp_path: Path) -> None:
    names = ["", " ", "a", "a:b", "a::b", "a/b", "A", "å", "\0", "*", "x" * 3000, "状态", "..", "'; --"]
    async with StateStore(tmp_path / "state") as store:
        places = [(collection, key) for collection in names if collection for key in names]
        for number, (collection, key) in enumerate(places):
            await store.put(key, {"n": number}, collection=collection)
        for number, (collection, key) in enumerate(places):
            assert await store.get(key, collection=collection) == {"n": number}
        assert await store.collections() == sorted(names[1:], key=str.encode)
        assert await store.keys("a:b") == sorted(names, key=str.encode)
        assert await store.keys("a:b", limit=3) == sorted(names, key=str.encode)[:3]
        assert await store.keys("a:b", limit=0) == []
        assert await store.collections(limit=2) == sorted(names[1:], key=str.encode)[:2]
        assert await store.keys("none of them") == []
        with pytest.raises(errors.InvalidKeyError, match="surrogate"):
            await store.put("\ud800", {})
    with pytest.raises(DeserializationError, match="`prefix` is empty"):
        StateStore(prefix="")


@pytest.mark.asyncio
async def test_many_keys_take_several_steps() -> None:
    with Engine.from_config({"limits": {"max_batch_bytes": 20_000}}) as engine:
        store = StateStore(engine)
        keys = [f"k{number:04}" for number in range(2500)]
        await store.put_many(keys, [{"n": number} for number in range(2500)], ttl=600)
        assert await store.get_many(keys) == [{"n": number} for number in range(2500)]
        await store.put_many(keys[:50], [{"text": "x" * 1_000}] * 50)
        assert (await store.ttl_many(keys[49:51]))[0] == ({"text": "x" * 1_000}, None)
        assert ((await store.ttl("k0050"))[1] or 0) > 500
        with pytest.raises(errors.SerializationError, match="over the limit of 20000"):
            await store.put_many(["large"], [{"text": "x" * 30_000}])
        assert await store.delete_many([*keys, "none", "k0000"]) == 2500
        assert await store.delete_many([]) == 0
        with pytest.raises(ValueError, match="different number"):
            await store.put_many(["a", "b"], [{}])


@pytest.mark.asyncio
async def test_a_bad_value_among_many_leaves_the_others_unwritten() -> None:
    async with StateStore() as store:
        with pytest.raises(errors.SerializationError, match=r"set") as raised:
            await store.put_many(["a", "b"], [{"n": 1}, {"n": {1}}])
        assert isinstance(raised.value.__cause__, InvalidValue)
        assert await store.get_many(["a", "b"]) == [None, None]


@pytest.mark.asyncio
async def test_destroy_takes_nothing_of_others() -> None:
    with Engine() as engine:
        one, other = StateStore(engine, prefix="one:"), StateStore(engine, prefix="other:")
        engine.set("oneself", "k", 1)
        for store in (one, other):
            await store.put_many(["a", "b"], [{}, {}], collection="x")
            await store.put("a", {}, collection="y")
        assert await one.destroy_collection("x") is True
        assert await one.destroy_collection("x") is False
        assert await one.collections() == ["y"]
        assert await one.destroy() is True
        assert engine.list_groups() == ["oneself", "other:x", "other:y"]


@pytest.mark.asyncio
async def test_the_oldest_entries_of_a_collection_go_first() -> None:
    with Engine() as engine:
        store = StateStore(engine, max_entries_per_collection=100)
        for number in range(100):
            await store.put(f"{number:03}", {})
        await store.put("000", {"again": True})
        await store.put_many([f"{number:03}" for number in range(100, 150)], [{}] * 50)
        await store.put("apart", {}, collection="other")
        keys = await store.keys()
        assert 90 <= len(keys) <= 113
        assert {"000", "149"} < set(keys)
        assert "001" not in keys
        entries = [(entry.revision, entry.key, 0) for entry in engine.entries("kv:default_collection", limit=3)]
        await store.put(entries[0][1], {"newer": True})
        await store._remove(engine.aio, "kv:default_collection", entries)
        assert await store.get_many([key for _, key, _ in entries]) == [{"newer": True}, None, None]
        bare = StateStore(engine, max_entries_per_collection=10)
        await bare.cull()
        assert len(await bare.keys()) == 9
        await StateStore(engine).cull()
        assert len(await bare.keys()) == 9
    with pytest.raises(DeserializationError, match="whole number"):
        StateStore(max_entries_per_collection=0)


@pytest.mark.asyncio
async def test_a_write_is_made_though_the_limit_cannot_be_looked_after(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(collection: str) -> None:
        raise errors.StoreConnectionError("the disk is full")

    async with StateStore(max_entries_per_collection=1) as store:
        monkeypatch.setattr(store, "_cull_collection", fail)
        for number in range(3):
            await store.put("k", {"n": number})
        assert await store.get("k") == {"n": 2}
    assert "could not be culled: the disk is full" in caplog.text


@pytest.mark.asyncio
async def test_errors_are_those_of_py_key_value(tmp_path: Path) -> None:
    with Engine.from_config({"limits": {"max_value_bytes": 1_000}}) as engine:
        store = StateStore(engine)
        with pytest.raises(errors.ValueTooLargeError, match="max_size: 1000"):
            await store.put("k", {"text": "x" * 2_000})
        engine.set("kv:default_collection", "other", 5)
        with pytest.raises(errors.DeserializationError, match="'other' holds int"):
            await store.get("other")
        assert await store.delete("other") is True
    with pytest.raises(errors.KeyValueStoreError) as closed:
        await store.get("k")
    assert isinstance(closed.value.__cause__, EngineClosed)
    (tmp_path / "file").touch()
    with pytest.raises(errors.StoreSetupError, match="Failed to setup"):
        await StateStore(tmp_path / "file").get("k")
    with pytest.raises(ConfigError, match="an engine has its own"):
        StateStore(engine, durability="commit")


@pytest.mark.asyncio
async def test_it_opens_again_after_close(tmp_path: Path) -> None:
    store, same = StateStore(tmp_path / "state", durability="commit"), None
    await store.put("k", {"n": 1})
    engine: Any = store.engine
    await store.close()
    assert engine.closed
    assert await store.get("k") == {"n": 1}
    same = StateStore(tmp_path / "state", durability="commit")
    assert same.engine is store.engine
    await store.close()
    assert await same.get("k") == {"n": 1}
    assert repr(same) == f"<StateStore 'kv:' in {tmp_path / 'state'}>"
    await same.close()


@pytest.mark.asyncio
async def test_event_loops_of_several_threads_use_one_store(tmp_path: Path) -> None:
    async with StateStore(tmp_path / "state") as store:
        failed: list[BaseException] = []

        async def work(name: str) -> None:
            for number in range(20):
                await store.put(name, {"n": number}, collection=name)
                assert await store.get(name, collection=name) == {"n": number}

        def run(name: str) -> None:
            try:
                asyncio.run(work(name))
            except BaseException as error:  # noqa: BLE001 - the test shows it
                failed.append(error)

        threads = [threading.Thread(target=run, args=(f"t{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
        assert not failed
        assert await store.collections() == ["t0", "t1", "t2", "t3"]


@pytest.mark.asyncio
async def test_wrappers_of_py_key_value_work_on_it() -> None:
    async with StateStore() as store:
        wrapped = PrefixCollectionsWrapper(store, prefix="app")
        await wrapped.put("k", {"n": 1}, collection="c")
        assert await store.collections() == ["app__c"]
        assert await wrapped.get("k", collection="c") == {"n": 1}


def test_without_the_library_the_extra_is_named() -> None:
    script = "import sys; sys.modules['key_value.aio'] = None; import scopestate.integrations.key_value"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "pip install 'scopestate[key-value]'" in ran.stderr
