"""The peers of scopestate. Each sets and gets dicts in the way of its own documentation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import burner_redis
import diskcache
import msgspec
import pykka
import sqlitedict

from benchmarks.harness import Batch, Pairs, Value


class Peer(NamedTuple):
    """Two batches over the same store; `get` reads the keys and leaves the values alone."""

    set: Batch
    get: Batch


class DictActor(pykka.ThreadingActor):
    """The plainest Pykka actor that keeps state: one dict, one thread, no encoding."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, Value] = {}

    def on_receive(self, message: tuple[str, Value | None]) -> Any:
        key, value = message
        if value is None:
            return self._values.get(key)
        self._values[key] = value
        return None


@contextmanager
def pykka_ref() -> Iterator[pykka.ActorRef[DictActor]]:
    """Start a DictActor; `ref.ask((key, value))` sets, `ref.ask((key, None))` gets."""
    ref = DictActor.start()
    try:
        yield ref
    finally:
        ref.stop()


@contextmanager
def plain_pykka() -> Iterator[Peer]:
    """Plain Pykka: each ask is passed to the actor's thread, and its answer back."""
    with pykka_ref() as ref:
        ask = ref.ask

        def set_all(pairs: Pairs) -> None:
            for pair in pairs:
                ask(pair)

        def get_all(pairs: Pairs) -> None:
            for key, _ in pairs:
                ask((key, None))

        yield Peer(set_all, get_all)


@contextmanager
def floor() -> Iterator[Peer]:
    """The minimum that keeps JSON safely: a lock, an encoder, a dict. No actor, no events, no old value, no saving."""
    lock = threading.Lock()
    encode = msgspec.json.Encoder().encode
    decode = msgspec.json.Decoder().decode
    values: dict[str, bytes] = {}

    def set_all(pairs: Pairs) -> None:
        for key, value in pairs:
            encoded = encode(value)
            with lock:
                values[key] = encoded

    def get_all(pairs: Pairs) -> None:
        for key, _ in pairs:
            with lock:
                encoded = values[key]
            decode(encoded)

    yield Peer(set_all, get_all)


@contextmanager
def disk_cache() -> Iterator[Peer]:
    """diskcache: SQLite, one transaction per set, values pickled."""
    with TemporaryDirectory() as folder, diskcache.Cache(folder) as cache:

        def set_all(pairs: Pairs) -> None:
            for key, value in pairs:
                cache.set(key, value)

        def get_all(pairs: Pairs) -> None:
            for key, _ in pairs:
                cache.get(key)

        yield Peer(set_all, get_all)


@contextmanager
def sqlite_dict() -> Iterator[Peer]:
    """sqlitedict: SQLite on a thread of its own, values pickled; one commit per batch, its quickest way to be safe."""
    with TemporaryDirectory() as folder, sqlitedict.SqliteDict(str(Path(folder) / "peer.sqlite")) as table:

        def set_all(pairs: Pairs) -> None:
            for key, value in pairs:
                table[key] = value
            table.commit()

        def get_all(pairs: Pairs) -> None:
            for key, _ in pairs:
                table[key]

        yield Peer(set_all, get_all)


@contextmanager
def burner() -> Iterator[Peer]:
    """burner-redis: an in-process Redis in Rust for asyncio, in memory; a hash field per key, values as JSON."""
    with asyncio.Runner() as runner:
        encode = msgspec.json.Encoder().encode
        decode = msgspec.json.Decoder().decode
        loop = runner.get_loop()

        async def open_store() -> burner_redis.BurnerRedis:
            return burner_redis.BurnerRedis()

        store = runner.run(open_store())

        async def set_each(pairs: Pairs) -> None:
            for key, value in pairs:
                await store.hset("state:bench", key, encode(value))

        async def get_each(pairs: Pairs) -> None:
            for key, _ in pairs:
                decode(await store.hget("state:bench", key))

        # Not `runner.run`, which sets a signal handler each time.
        def set_all(pairs: Pairs) -> None:
            loop.run_until_complete(set_each(pairs))

        def get_all(pairs: Pairs) -> None:
            loop.run_until_complete(get_each(pairs))

        yield Peer(set_all, get_all)


IN_MEMORY: dict[str, Callable[[], AbstractContextManager[Peer]]] = {"burner-redis": burner}
ON_DISK: dict[str, Callable[[], AbstractContextManager[Peer]]] = {"diskcache": disk_cache, "sqlitedict": sqlite_dict}
