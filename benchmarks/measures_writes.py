"""What conditions, deadlines and transactions cost: beside a plain `set`, and beside peers that do the same job."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import diskcache
import redis

from benchmarks.harness import Batch, Comparison, Measure, Pairs, Row, Sizes, Value, compare, make_pairs
from benchmarks.ours import SCOPE, increment_batch, on_disk
from benchmarks.redis_load import config, redis_server
from scopestate import Engine

ACCOUNTS = 100
MINUTE = 60

# ----------------------------------------------------------------------------------------------- beside a plain set


def _beside_set(name: str, what: str, limit: float, ours: Batch, engine: Engine, sizes: Sizes, *, keys: int = 1) -> Row:
    """Return the time of one of our calls, which writes `keys` keys, as a multiple of the time of a `set`."""
    pairs = make_pairs(sizes.calls // keys * keys)
    found = compare(ours, _noting(engine, {}), pairs, sizes.repeats)
    return Row(name, what, keys / found.ratio, "x", limit, figures=_each(found, keys), own="ours_us")


def _each(found: Comparison, keys: int) -> dict[str, float]:
    return {"ours_us": found.ours_s * keys * 1e6, "set_us": found.theirs_s * 1e6}


def _noting(engine: Engine, revisions: dict[str, int]) -> Batch:
    """A plain `set` of each pair that stores the revision, as the conditional ones have to."""
    set_value = engine.set

    def batch(pairs: Pairs) -> None:
        for key, value in pairs:
            revisions[key] = set_value(SCOPE, key, value).revision

    return batch


def set_if_revision(sizes: Sizes) -> list[Row]:
    """`set(if_revision=)` with the right revision."""
    with Engine() as engine:
        revisions: dict[str, int] = {}
        set_value = engine.set

        def batch(pairs: Pairs) -> None:
            for key, value in pairs:
                revisions[key] = set_value(SCOPE, key, value, if_revision=revisions[key]).revision

        plain = _noting(engine, revisions)
        pairs = make_pairs(sizes.calls)
        plain(pairs)
        found = compare(batch, plain, pairs, sizes.repeats)
    what = "set(if_revision=) / set"
    return [Row("set_if_revision", what, 1 / found.ratio, "x", 1.3, figures=_each(found, 1), own="ours_us")]


def set_ttl(sizes: Sizes) -> list[Row]:
    """`set(ttl=)` of keys of a scope, beside `set` of keys of another one, in which nothing expires."""
    with Engine() as engine:
        return [_beside_set("set_ttl", "set(ttl=) / set", 1.3, ttl_batch(engine, "expiring"), engine, sizes)]


def ttl_batch(engine: Engine, scope: str) -> Batch:
    """`set(ttl=)` of each pair."""
    set_value = engine.set

    def batch(pairs: Pairs) -> None:
        for key, value in pairs:
            set_value(scope, key, value, ttl=MINUTE)

    return batch


def compare_and_set(sizes: Sizes) -> list[Row]:
    """`compare_and_set` with the right value."""
    with Engine() as engine:
        last = dict(make_pairs(sizes.calls))
        for key, value in last.items():
            engine.set("swapped", key, value)
        swap = engine.compare_and_set

        def batch(pairs: Pairs) -> None:
            for key, value in pairs:
                swap("swapped", key, last[key], value)
                last[key] = value

        return [_beside_set("compare_and_set", "compare_and_set / set", 1.5, batch, engine, sizes)]


def modify(sizes: Sizes) -> list[Row]:
    """`modify` with a function that changes one field."""
    with Engine() as engine:
        for key, value in make_pairs(1_000):
            engine.set("modified", key, value)
        change = engine.modify

        def count(value: Any) -> Any:
            value["id"] += 1
            return value

        def batch(pairs: Pairs) -> None:
            for key, _ in pairs:
                change("modified", key, count)

        return [_beside_set("modify", "modify / set", 2, batch, engine, sizes)]


def batches(sizes: Sizes) -> list[Row]:
    """A batch of 2 and of 100 keys; and how often a scope with durability `commit` saves for one."""
    rows = []
    with Engine() as engine:
        for keys, limit in ((2, 3), (100, 60)):
            what = f"batch of {keys} keys / set"
            ours = batch_of(engine, "batched", keys)
            rows.append(_beside_set(f"batch_{keys}", what, limit, ours, engine, sizes, keys=keys))
    with TemporaryDirectory() as folder, Engine.from_config(committing(folder)) as engine:
        ours = batch_of(engine, "batched", 100)
        ours(make_pairs(100))
        before = engine.stats().saves
        ours(make_pairs(1_000))
        saves = (engine.stats().saves - before) / 10
    return [*rows, Row("batch_100_commit", "saves for a batch of 100 keys, durability commit", saves, "", 1)]


def batch_of(engine: Engine, scope: str, keys: int) -> Batch:
    """A batch for every `keys` pairs, which sets them."""
    open_batch = engine.batch

    def batch(pairs: Pairs) -> None:
        for first in range(0, len(pairs), keys):
            with open_batch(scope) as several:
                put = several.set
                for key, value in pairs[first : first + keys]:
                    put(key, value)

    return batch


def transact(sizes: Sizes) -> list[Row]:
    """`transact` that moves an amount from one key to another. Shown only: the targets are those of the peers."""
    with Engine() as engine:
        found = compare(moves(engine), _noting(engine, {}), make_pairs(sizes.calls), sizes.repeats)
    what = "transact that moves an amount / set"
    return [Row("transact", what, 1 / found.ratio, "x", figures=_each(found, 1), own="ours_us")]


def moves(engine: Engine) -> Batch:
    """For each pair, a transaction that moves 1 from one of ACCOUNTS keys to the next one."""
    with engine.batch("accounts") as accounts:
        for number in range(ACCOUNTS):
            accounts.set(f"account-{number}", 1_000_000)
    run = engine.transact

    def batch(pairs: Pairs) -> None:
        for place in range(len(pairs)):
            giver, taker = _accounts(place)

            def move(tx: Any, giver: str = giver, taker: str = taker) -> None:
                tx[giver] -= 1
                tx[taker] += 1

            run("accounts", move)

    return batch


def _accounts(place: int) -> tuple[str, str]:
    return f"account-{place % ACCOUNTS}", f"account-{(place + 1) % ACCOUNTS}"


# ----------------------------------------------------------------------------------------------------- beside peers


def committing(folder: str) -> dict[str, Any]:
    """Return the configuration of an engine in `folder` that answers a write when it is on disk."""
    found = on_disk(folder)
    found["workers"][0]["config"]["adapter"]["config"]["durability"] = "commit"
    return found


def peer_writes(sizes: Sizes) -> list[Row]:
    """The same jobs with diskcache, beside files.

    By default diskcache passes each write to the operating system: this is compared with `interval`, which answers
    earlier. For the comparison with `commit` it syncs each write to the disk, as `commit` does.
    """
    rows = []
    pairs = make_pairs(sizes.slow_calls)
    for durability, synchronous in (("interval", 1), ("commit", 2)):
        with TemporaryDirectory() as folder, TemporaryDirectory() as peer_folder:
            settings = committing(folder) if durability == "commit" else on_disk(folder, save_interval_ms=1_000)
            with (
                Engine.from_config(settings) as engine,
                diskcache.Cache(peer_folder, sqlite_synchronous=synchronous) as cache,
            ):
                with engine.batch(SCOPE) as batch:
                    for key, value in pairs[:1_000]:
                        batch.set(key, value)
                jobs: dict[str, tuple[str, Batch, Batch]] = {
                    "transact": ("moving an amount", moves(engine), _disk_moves(cache)),
                    "increment": ("incr", increment_batch(engine), _disk_increments(cache)),
                    "ttl": ("set with a deadline", ttl_batch(engine, "expiring"), _disk_ttls(cache)),
                }
                part = pairs if durability == "interval" else pairs[: max(1, len(pairs) // 10)]
                for name, (what, ours, theirs) in jobs.items():
                    found = compare(ours, theirs, part, sizes.repeats)
                    label = f"{what}: diskcache / ours, {durability}"
                    rows.append(_ahead(f"{name}_vs_diskcache_{durability}", label, found))
    return rows


def _ahead(name: str, what: str, found: Comparison) -> Row:
    return Row(name, what, found.ratio, "x", 1, at_least=True, figures=found.figures, own="ours_us")


def _disk_moves(cache: diskcache.Cache) -> Batch:
    with cache.transact():
        for number in range(ACCOUNTS):
            cache.set(f"account-{number}", 1_000_000)

    def batch(pairs: Pairs) -> None:
        for place in range(len(pairs)):
            giver, taker = _accounts(place)
            with cache.transact():
                cache[giver] -= 1
                cache[taker] += 1

    return batch


def _disk_increments(cache: diskcache.Cache) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, _ in pairs:
            cache.incr(f"counter-{key}")

    return batch


def _disk_ttls(cache: diskcache.Cache) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, value in pairs:
            cache.set(key, value, expire=MINUTE)

    return batch


def redis_peer_writes(sizes: Sizes) -> list[Row]:
    """The same jobs in Redis: WATCH and MULTI, and SET with EX, by redis-py."""
    pairs = make_pairs(sizes.slow_calls)
    with _on_redis() as (engine, client):
        jobs: dict[str, tuple[str, Batch, Batch]] = {
            "transact": ("moving an amount: WATCH and MULTI", moves(engine), _redis_moves(client)),
            "ttl": ("set with a deadline: SET EX", ttl_batch(engine, "expiring"), _redis_ttls(client)),
        }
        rows = []
        for name, (what, ours, theirs) in jobs.items():
            found = compare(ours, theirs, pairs, sizes.repeats)
            rows.append(_ahead(f"{name}_vs_redis_py", f"redis: {what}, redis-py / ours", found))
        return rows


@contextmanager
def _on_redis() -> Iterator[tuple[Engine, redis.Redis]]:
    with redis_server() as url, redis.Redis.from_url(url) as client, Engine.from_config(config(url)) as engine:
        yield engine, client


def _redis_moves(client: redis.Redis) -> Batch:
    client.hset("theirs", mapping={f"account-{number}": "1000000" for number in range(ACCOUNTS)})

    def move(giver: str, taker: str) -> Callable[[Any], None]:
        def work(pipe: Any) -> None:
            given, taken = (int(text) for text in pipe.hmget("theirs", [giver, taker]))
            pipe.multi()
            pipe.hset("theirs", mapping={giver: given - 1, taker: taken + 1})

        return work

    run: Any = client.transaction  # it has no types

    def batch(pairs: Pairs) -> None:
        for place in range(len(pairs)):
            run(move(*_accounts(place)), "theirs")

    return batch


def _redis_ttls(client: redis.Redis) -> Batch:
    texts: dict[int, str] = {}

    def encoded(value: Value) -> str:
        return texts.setdefault(value["id"], json.dumps(value))

    def batch(pairs: Pairs) -> None:
        for key, value in pairs:
            client.set(f"theirs:{key}", encoded(value), ex=MINUTE)

    return batch


MEASURES: dict[str, Measure] = {
    "set_if_revision": set_if_revision,
    "set_ttl": set_ttl,
    "compare_and_set": compare_and_set,
    "modify": modify,
    "batches": batches,
    "transact": transact,
    "peer_writes": peer_writes,
    "redis_peer_writes": redis_peer_writes,
}
