"""Watches: ordered, each change once, no gap, transactions whole, resumable, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from watching import PATIENCE_S, Gate, GatedStore, LoopThread, broken

from scopestate import Change, Compacted, Engine, StateEvent, WatchOverrun
from scopestate import polls as polls_module
from scopestate.actors import feed as feed_module
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.errors import DeserializationError, EngineClosed, InvalidCursor, StorageError, WouldDeadlock
from scopestate.ops.cursors import read_cursor
from scopestate.watching import Changes

OpenEngine = Callable[..., Engine]


HISTORY = [{"prefix": "", "history": {}}]


def plain(change: Change) -> tuple[str, str, Any]:
    return change.kind, change.key, change.value


def take(changes: Changes, count: int) -> list[tuple[str, str, Any]]:
    return [plain(changes.get(PATIENCE_S)) for _ in range(count)]


def nothing_waits(changes: Changes) -> bool:
    try:
        changes.get(0.02)
    except TimeoutError:
        return True
    return False


# ------------------------------------------------------------------------------------------------------------- order


def test_a_watch_begins_with_what_is_there_and_goes_on_with_what_changes(open_store: OpenEngine) -> None:
    engine = open_store()
    users = engine.scope("users")
    users.set("b", 1)
    users.set("a", 2)
    with users.watch() as changes:
        first = [changes.get(PATIENCE_S) for _ in range(2)]
        assert [(plain(change), change.initial, change.old_value) for change in first] == [
            (("put", "a", 2), True, None),
            (("put", "b", 1), True, None),
        ]
        users.set("a", 3)
        users.delete("b")
        users.set("c", {"n": 1})
        users.set("t", 1, ttl=0.03)
        changed = [changes.get(PATIENCE_S) for _ in range(5)]
    assert [plain(change) for change in changed] == [
        ("put", "a", 3),
        ("delete", "b", None),
        ("put", "c", {"n": 1}),
        ("put", "t", 1),
        ("expire", "t", None),
    ]
    assert [change.revision for change in changed] == list(range(3, 8))
    assert [change.old_value for change in changed] == [2, 1, None, None, 1]
    assert not any(change.initial for change in changed)
    assert changes.cursor == changed[-1].cursor


def test_an_expired_key_is_told_on_time_although_nothing_reads_it(engine: Engine) -> None:
    with engine.scope("s").watch() as changes:
        engine.set("s", "k", 1, ttl=0.05)
        began = time.monotonic()
        assert take(changes, 2) == [("put", "k", 1), ("expire", "k", None)]
    assert time.monotonic() - began < PATIENCE_S / 2


def test_the_changes_of_a_transaction_follow_one_another_and_name_its_last_one(open_store: OpenEngine) -> None:
    engine = open_store()
    scope = engine.scope("s")
    with scope.watch() as changes:
        with scope.batch() as batch:
            batch.set("a", 1)
            batch.set("b", 2)
            batch.delete("c")
        scope.transact(lambda tx: [tx.set("a", 3), tx.delete("b")])
        scope.set("z", 1)
        seen = [changes.get(PATIENCE_S) for _ in range(5)]
    assert [(change.key, change.revision, change.transaction) for change in seen] == [
        ("a", 1, 2),
        ("b", 2, 2),
        ("a", 3, 4),
        ("b", 4, 4),
        ("z", 5, 5),
    ]


def test_a_delete_of_a_key_that_does_not_exist_changes_nothing(engine: Engine) -> None:
    with engine.scope("s").watch() as changes:
        engine.delete("s", "k")
        engine.set("s", "k", 1)
        assert take(changes, 1) == [("put", "k", 1)]


def test_a_snapshot_beside_writers_has_no_gap_and_nothing_twice(open_store: OpenEngine) -> None:
    """Each watch that begins while threads write sees each key count up, from any number on."""
    engine = open_store()
    scope = engine.scope("s")
    counts = 300 if open_store.kind == "commit" else 3_000  # type: ignore[attr-defined]  # set by the fixture

    def write(which: int) -> None:
        for number in range(1, counts + 1):
            scope.set(f"k{which}", number)

    writers = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for writer in writers:
        writer.start()
    for _ in range(10):
        state: dict[str, int] = {}
        with scope.watch(buffer=100_000) as changes:
            begun = False
            for change in itertools.islice(changes, 200):
                if change.initial:
                    assert not begun
                    assert change.key not in state
                else:
                    begun = True
                    assert change.value == state.get(change.key, 0) + 1
                state[change.key] = change.value
                if state == {"k0": counts, "k1": counts}:
                    break
    for writer in writers:
        writer.join()


def test_many_scopes_are_told_in_one_order_each_scope_behind_its_own_snapshot(open_store: OpenEngine) -> None:
    engine = open_store()
    for number in range(3):
        engine.set(f"s{number}", "k", 0)
    with engine.watch() as changes:
        assert [changes.get(PATIENCE_S).scope for _ in range(3)] == ["s0", "s1", "s2"]
        for number in range(1, 20):
            engine.set(f"s{number % 5}", "k", number)
        seen = [changes.get(PATIENCE_S) for _ in range(19)]
    assert [change.value for change in seen] == list(range(1, 20))
    positions = [change.position for change in seen]
    assert positions == sorted(set(positions))


def test_a_prefix_of_scopes_holds_for_what_comes_from_the_journal(open_file_store: OpenEngine) -> None:
    with open_file_store(scopes=HISTORY) as engine, engine.watch(scope_prefix="a", snapshot=False) as changes:
        cursor = changes.cursor
        for number, scope in enumerate(("a1", "b1", "a2", "b2")):
            engine.set(scope, "k", number)
    with open_file_store(scopes=HISTORY) as engine, engine.watch(scope_prefix="a", since=cursor) as changes:
        assert [changes.get(PATIENCE_S).scope for _ in range(2)] == ["a1", "a2"]
        assert nothing_waits(changes)


def test_a_prefix_of_scopes_is_watched_also_in_scopes_that_come_later(engine: Engine) -> None:
    engine.set("a1", "k", 1)
    engine.set("b1", "k", 1)
    with engine.watch(scope_prefix="a") as changes:
        engine.set("b2", "k", 2)
        engine.set("a2", "k", 2)
        engine.set("a1", "k", 2)
        assert [(one.scope, one.value) for one in (changes.get(PATIENCE_S) for _ in range(3))] == [
            ("a1", 1),
            ("a2", 2),
            ("a1", 2),
        ]
        assert nothing_waits(changes)


# ----------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"key": "a1"}, ["a1 1", "a1 3", "a1 None"]),
        ({"prefix": "a"}, ["a1 1", "a2 2", "a1 3", "a1 None"]),
        ({"events": ["created"]}, ["a1 1", "a2 2", "b1 4"]),
        ({"events": ("deleted", "updated"), "prefix": "a"}, ["a1 3", "a1 None"]),
        ({"events": {"expired"}}, []),
        ({}, ["a1 1", "a2 2", "a1 3", "b1 4", "a1 None"]),
    ],
)
def test_a_watch_gets_what_it_asks_for(
    engine: Engine, many: bool, options: dict[str, Any], expected: list[str]
) -> None:
    scope = engine.scope("s")
    with engine.watch(**options) if many else scope.watch(**options) as changes:
        scope.set("a1", 1)
        scope.set("a2", 2)
        scope.set("a1", 3)
        scope.set("b1", 4)
        scope.delete("a1")
        seen = [changes.get(PATIENCE_S) for _ in expected]
        assert [f"{change.key} {change.value}" for change in seen] == expected
        assert nothing_waits(changes)


def test_the_snapshot_of_a_filtered_watch_has_what_it_asks_for(engine: Engine) -> None:
    scope = engine.scope("s")
    for key in ("a", "ab", "b"):
        scope.set(key, key)
    with scope.watch(key="a") as one, scope.watch(prefix="a") as some, scope.watch(snapshot=False) as none:
        assert take(one, 1) == [("put", "a", "a")]
        assert take(some, 2) == [("put", "a", "a"), ("put", "ab", "ab")]
        assert nothing_waits(one)
        assert nothing_waits(none)


def test_without_values_a_change_has_none(engine: Engine) -> None:
    engine.set("s", "k", 1)
    with engine.scope("s").watch(values=False) as changes:
        engine.set("s", "k", 2)
        for _ in range(2):
            change = changes.get(PATIENCE_S)
            assert (change.key, change.json, change.old_json) == ("k", None, None)


def test_each_watch_decodes_values_of_its_own(engine: Engine) -> None:
    seen: list[StateEvent] = []
    engine.on_change(scope="s")(lambda event: seen.append(event) or event.new_value.append(9))
    with engine.scope("s").watch() as one, engine.scope("s").watch() as other:
        engine.set("s", "k", [1])
        engine.drain(PATIENCE_S)
        change = one.get(PATIENCE_S)
        change.value.append(2)
        assert change.value == [1]
        assert other.get(PATIENCE_S).value == [1]
    assert seen[0].new_value == [1, 9]


@pytest.mark.parametrize(
    "options",
    [
        {"buffer": 0},
        {"buffer": "x"},
        {"events": []},
        {"events": ["changed"]},
        {"events": "created"},
        {"on_compacted": "ignore"},
        {"snapshot": 1},
        {"key": "a", "prefix": "b"},
        {"key": 7},
        {"since": -1},
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_begins(
    engine: Engine, options: dict[str, Any]
) -> None:
    with pytest.raises(DeserializationError):
        engine.scope("s").watch(**options)
    assert engine._router.feed.watchers() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefx": "a"}, r"'prefx': did you mean 'prefix'\?"),
        ({"since": 1.5}, "the cursor is not text"),
        ({"known": [("s", "a")]}, "`known` has no effect without"),
        ({"known": [("s", "a", 1)], "on_compacted": "resync"}, r"pairs \(scope, key\), not \('s', 'a', 1\)"),
        ({"known": ["ab"], "on_compacted": "resync"}, r"pairs \(scope, key\), not 'ab'"),
    ],
)
def test_a_wrong_option_is_named(engine: Engine, options: dict[str, Any], said: str) -> None:
    with pytest.raises((DeserializationError, InvalidCursor, TypeError), match=said):
        engine.watch(**options)
    assert engine._router.feed.watchers() == []


def test_a_cursor_that_is_damaged_or_of_other_scopes_is_refused(engine: Engine) -> None:
    with engine.scope("s").watch() as one, engine.watch() as many:
        of_one, of_many = one.cursor, many.cursor
    for cursor in ("", "x", of_one[:-1], of_one + "A", "é", 1.5):
        with pytest.raises(InvalidCursor):
            engine.scope("s").watch(since=cursor)  # type: ignore[arg-type]  # on purpose
    for watch in (lambda: engine.watch(since=of_one), lambda: engine.scope("t").watch(since=of_one)):
        with pytest.raises(DeserializationError):
            watch()
    with pytest.raises(DeserializationError):
        engine.scope("s").watch(since=of_many)
    with pytest.raises(DeserializationError):
        engine.watch(since=3)


# ------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("many", [False, True])
def test_a_watch_goes_on_behind_each_cursor_without_a_gap(open_store: OpenEngine, many: bool) -> None:
    engine = open_store()
    scope = engine.scope("s")

    def watch(**options: Any) -> Changes:
        return engine.watch(**options) if many else scope.watch(**options)

    with watch() as changes:
        for number in range(10):
            scope.set(f"k{number % 3}", number)
        with scope.batch() as batch:
            batch.set("k0", 10)
            batch.set("k1", 11)
        seen = [changes.get(PATIENCE_S) for _ in range(12)]
    scope.set("later", 12)
    for at, change in enumerate(seen):
        with watch(since=change.cursor) as again:
            rest = [again.get(PATIENCE_S) for _ in range(12 - at)]
            assert [one.value for one in rest] == list(range(at + 1, 13))
            assert nothing_waits(again)
            assert again.cursor == rest[-1].cursor


def test_a_watch_goes_on_behind_a_revision(engine: Engine) -> None:
    scope = engine.scope("s")
    with scope.watch():
        revision = scope.set("a", 1).revision
        scope.set("a", 2)
    with scope.watch(since=revision) as changes:
        assert take(changes, 1) == [("put", "a", 2)]


def test_a_revision_that_is_not_there_yet_is_refused(open_store: OpenEngine) -> None:
    scope = open_store().scope("s")
    with scope.watch() as changes:
        revision = scope.set("a", 1).revision
        assert take(changes, 1) == [("put", "a", 1)]  # so the ring has it
        with pytest.raises(Compacted) as caught:
            scope.watch(since=revision + 1)
        assert caught.value.reason == "lost in a crash"


def test_what_was_changed_before_is_found_without_waiting(engine: Engine, loop_thread: LoopThread) -> None:
    scope = engine.scope("s")
    with scope.watch() as changes:
        scope.set("a", 1)
        assert plain(changes.get(timeout=0)) == ("put", "a", 1)
        with pytest.raises(TimeoutError):
            changes.get(timeout=0)

    async def look() -> list[tuple[str, str, Any]]:
        async with engine.aio.watch(scope="s", snapshot=False) as watch:
            await engine.aio.set("s", "a", 2)
            return [plain(await watch.get(timeout=0))]

    assert loop_thread.do(look) == [("put", "a", 2)]


def test_the_cursor_within_a_snapshot_begins_it_again(engine: Engine) -> None:
    scope = engine.scope("s")
    for key in "abc":
        scope.set(key, 1)
    with scope.watch() as changes:
        first = changes.get()
        cursor = changes.cursor
        assert cursor == first.cursor
        take(changes, 2)
        whole = changes.cursor
    scope.set("d", 1)
    with scope.watch(since=cursor) as changes:
        assert [changes.get(PATIENCE_S).initial for _ in range(4)] == [True] * 4
    with scope.watch(since=whole) as changes:
        assert take(changes, 1) == [("put", "d", 1)]


def test_the_cursor_of_a_quiet_watch_moves_on_while_other_keys_change(open_store: OpenEngine) -> None:
    engine = open_store()
    scope = engine.scope("s")
    with scope.watch(key="quiet") as quiet, scope.watch(key="busy", snapshot=False) as busy, engine.watch() as many:
        for number in range(5):
            scope.set("busy", number)
        take(busy, 5)
        assert nothing_waits(quiet)
        assert read_cursor(quiet.cursor).revision == 5  # type: ignore[union-attr]  # of one scope
        before = read_cursor(many.cursor)
        changes = [many.get(PATIENCE_S) for _ in range(5)]
        assert before.position == changes[0].position - 1  # type: ignore[union-attr]  # of many
        assert many.cursor == changes[-1].cursor


def test_progress_marks_come_while_other_keys_change(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scopestate.watching.PROGRESS_S", 0.02)
    scope = engine.scope("s")
    scope.set("quiet", 0)
    with scope.watch(key="quiet", markers=True) as changes:
        assert [changes.get(PATIENCE_S).kind for _ in range(2)] == ["put", "synced"]
        scope.set("busy", 1)
        mark = changes.get(PATIENCE_S)
        assert (mark.kind, mark.key, mark.value, mark.revision) == ("progress", "", None, 2)
        assert nothing_waits(changes)  # nothing has changed since
    scope.set("quiet", 1)
    with scope.watch(key="quiet", since=mark.cursor) as changes:
        assert take(changes, 1) == [("put", "quiet", 1)]


def test_a_watch_opened_behind_what_is_kept_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "RING_EVENTS", 16)
    scope = engine.scope("s")
    with scope.watch() as changes, engine.watch() as many:
        scope.set("k", 0)
        old, old_many = changes.get(PATIENCE_S).cursor, many.get(PATIENCE_S).cursor
        for number in range(40):
            scope.set("k", number)
        take(changes, 40)
        for watch in (lambda: scope.watch(since=old), lambda: engine.watch(since=old_many)):
            with pytest.raises(Compacted) as caught:
                watch()
            assert caught.value.reason == "trimmed"
        assert caught.value.requested == old_many
        with pytest.raises(Compacted) as caught:
            scope.watch(since=old)
        oldest = caught.value.oldest
        assert oldest is not None
        with scope.watch(since=oldest) as again:  # exactly there
            revisions = [again.get(PATIENCE_S).revision for _ in range(14)]
        assert revisions == list(range(28, 42))


def test_a_watch_of_another_engine_in_memory_says_so(engine: Engine, open_engine: OpenEngine) -> None:
    with engine.scope("s").watch() as changes:
        cursor = changes.cursor
    with pytest.raises(Compacted) as caught:
        open_engine().scope("s").watch(since=cursor)
    assert caught.value.reason == "other store"


def test_what_was_changed_while_nothing_watched_is_not_passed_over(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 s after the last watch a scope is not fed any more: a change from then on cannot be told."""
    monkeypatch.setattr(feed_module, "LINGER_S", 0.0)
    scope = engine.scope("s")
    with scope.watch() as changes, engine.watch() as many:
        scope.set("k", 1)
        cursor, of_many = changes.get(PATIENCE_S).cursor, many.get(PATIENCE_S).cursor
    engine._router.feed.forget_unused()
    with scope.watch(since=cursor) as again:  # nothing has changed
        assert nothing_waits(again)
    engine._router.feed.forget_unused()
    assert not engine._scopes["s"]._watch.fed
    scope.set("k", 2)
    with pytest.raises(Compacted):
        scope.watch(since=cursor)
    with pytest.raises(Compacted):
        engine.watch(since=of_many)


@pytest.mark.parametrize("many", [False, True])
def test_resync_gives_a_new_snapshot_and_deletes_of_the_keys_that_are_gone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    """etcd 18089: a client that comes back behind a compaction must learn of the deletes in between."""
    monkeypatch.setattr(feed_module, "RING_EVENTS", 16)
    scope = engine.scope("s")

    def watch(**options: Any) -> Changes:
        return engine.watch(**options) if many else scope.watch(**options)

    cache: dict[str, Any] = {}

    def follow(changes: Iterable[Change]) -> str:
        cursor = ""
        for change in changes:
            if change.kind in ("delete", "expire"):
                del cache[change.key]
            elif change.kind == "put":
                cache[change.key] = change.value
            cursor = change.cursor
            if change.kind == "synced":
                break
        return cursor

    for key in "abc":
        scope.set(key, 1)
    with watch(markers=True) as changes:
        cursor = follow(changes)
        assert cache == {"a": 1, "b": 1, "c": 1}
        for number in range(40):
            scope.set("d", number)
        scope.delete("b")
        scope.set("a", 2)
        engine.drain()
        engine._router.feed.number()
    known: Any = [("s", key) for key in cache] if many else list(cache)
    with watch(since=cursor, on_compacted="resync", known=known, markers=True) as changes:
        follow(changes)
        assert cache == {"a": 2, "c": 1, "d": 39}
        scope.set("e", 1)
        assert take(changes, 1) == [("put", "e", 1)]


# ------------------------------------------------------------------------------------------------------- too slow


def test_a_watch_that_is_too_slow_is_told_where_to_go_on(open_store: OpenEngine) -> None:
    engine = open_store()
    scope = engine.scope("s")
    with scope.watch(buffer=3) as changes:
        with scope.batch() as batch:
            for number in range(5):
                batch.set(f"k{number}", number)
        for number in range(5, 12):
            scope.set("k", number)
        engine.drain()
        engine._router.feed.number()
        seen: list[Any] = []
        with pytest.raises(WatchOverrun) as caught:
            for change in changes:
                seen.append(change.value)  # noqa: PERF401 - those before the exception count
        assert seen == [0, 1, 2, 3, 4]  # the transaction is whole, although the buffer is smaller
        assert caught.value.waiting > 3
    with scope.watch(since=caught.value.cursor) as changes:
        assert [changes.get(PATIENCE_S).value for _ in range(7)] == list(range(5, 12))


def test_what_was_missed_does_not_count_as_waiting(open_store: OpenEngine) -> None:
    engine = open_store()
    scope = engine.scope("s")
    with scope.watch() as changes, engine.watch() as many:
        cursor, of_many = changes.cursor, many.cursor
        for number in range(50):
            scope.set("k", number)
        with scope.watch(since=cursor, buffer=3) as again, engine.watch(since=of_many, buffer=3) as again_many:
            for watch in (again, again_many):
                assert [watch.get(PATIENCE_S).value for _ in range(50)] == list(range(50))
        with scope.watch(since=cursor, latest=True) as latest:
            assert take(latest, 1) == [("put", "k", 49)]
            assert nothing_waits(latest)


def test_what_waits_for_a_slow_watch_is_bounded_in_bytes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "RING_BYTES", 100_000)
    scope = engine.scope("s")
    with scope.watch() as changes:
        for number in range(30):
            scope.set("k", f"{number}" + 10_000 * "x")
            engine._router.feed.number()
        with pytest.raises(WatchOverrun):
            for _ in range(30):
                changes.get(PATIENCE_S)
        assert sum(len(event.new_json or b"") for event in engine._router.feed._ring) <= 100_000


def test_a_watch_of_the_latest_is_never_too_slow(engine: Engine) -> None:
    scope = engine.scope("s")
    with scope.watch(latest=True, buffer=1) as changes:
        for number in range(100):
            scope.set(f"k{number % 3}", number)
        engine._router.feed.number()
        assert [plain(changes.get(PATIENCE_S)) for _ in range(3)] == [
            ("put", "k0", 99) if key == 0 else ("put", f"k{key}", 96 + key) for key in (1, 2, 0)
        ]
        assert nothing_waits(changes)


# ------------------------------------------------------------------------------------------------- ends and restarts


def test_a_watch_hears_of_a_write_whose_thread_keeps_the_turn_of_the_router(engine: Engine) -> None:
    """As the server does for calls of workers. Such a write publishes nothing: only the feed has its change."""
    router = engine._router
    with engine.scope("s").watch() as changes:
        seen: list[Change] = []
        reader = threading.Thread(target=lambda: seen.append(changes.get(PATIENCE_S)))
        reader.start()
        while not router.feed.awaited:
            time.sleep(0.001)
        router.hold()
        engine.set("s", "k", 1)
        router.run_held()
        assert changes._watcher.has_next() or not changes._watcher.waiters
        reader.join(PATIENCE_S)
    assert [plain(change) for change in seen] == [("put", "k", 1)]


def test_closing_a_watch_on_another_thread_ends_its_iterator(engine: Engine) -> None:
    engine.set("s", "k", 1)
    changes = engine.scope("s").watch()
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.extend(change.value for change in changes))
    reader.start()
    while not changes._watcher.waiters:
        time.sleep(0.001)
    changes.close()
    reader.join(PATIENCE_S)
    assert seen == [1]
    with pytest.raises(EngineClosed):
        changes.get(1)
    changes.close()


def test_closing_the_engine_ends_watches_behind_the_last_changes(open_store: OpenEngine) -> None:
    engine = open_store()
    changes, many = engine.scope("s").watch(), engine.watch()
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.extend(change.value for change in changes))
    reader.start()
    for number in range(50):
        engine.set("s", "k", number)
    engine.close()
    reader.join(PATIENCE_S)
    assert seen == list(range(50))
    assert [change.value for change in many] == list(range(50))
    with pytest.raises(EngineClosed):
        engine.watch()


@pytest.mark.parametrize("many", [False, True])
def test_a_watch_with_history_goes_on_after_a_restart(open_file_store: OpenEngine, many: bool) -> None:
    """nats.py 510: a watch that is silently dead after the server has restarted."""
    engine = open_file_store(scopes=HISTORY)
    for number in range(20):
        engine.set("s", f"k{number % 4}", number)
    with engine.watch() if many else engine.scope("s").watch() as changes:
        take(changes, 4)
        for number in range(20, 30):
            engine.set("s", "k", number)
        take(changes, 4)
        cursor = changes.cursor
    engine.close()
    engine = open_file_store(scopes=HISTORY)
    engine.set("s", "k", 30)
    with engine.watch(since=cursor) if many else engine.scope("s").watch(since=cursor) as changes:
        assert [changes.get(PATIENCE_S).value for _ in range(7)] == list(range(24, 31))
        engine.set("s", "k", 31)
        assert take(changes, 1) == [("put", "k", 31)]
        assert nothing_waits(changes)


def test_without_history_a_watch_goes_on_after_a_restart_only_if_nothing_has_changed(
    open_file_store: OpenEngine,
) -> None:
    engine = open_file_store()
    engine.set("s", "k", 1)
    with engine.scope("s").watch() as changes:
        take(changes, 1)
        behind_all = changes.cursor
    engine.close()
    engine = open_file_store()
    with engine.scope("s").watch(since=behind_all) as changes:
        engine.set("s", "k", 2)
        assert take(changes, 1) == [("put", "k", 2)]
    engine.close()
    engine = open_file_store()
    with pytest.raises(Compacted) as caught:
        engine.scope("s").watch(since=behind_all)
    assert caught.value.reason == "trimmed"


def test_the_journal_goes_on_where_the_ring_ends(open_file_store: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """etcd 19179: a watch opened exactly where memory ends and the disk begins."""
    monkeypatch.setattr(feed_module, "RING_EVENTS", 16)
    engine = open_file_store(scopes=HISTORY)
    with engine.scope("s").watch(buffer=1000) as changes, engine.watch(buffer=1000) as many:
        for number in range(60):
            engine.set("s", "k", number)
        seen = [changes.get(PATIENCE_S) for _ in range(60)]
        seen_many = [many.get(PATIENCE_S) for _ in range(60)]
        for at in range(0, 60, 4):
            with engine.scope("s").watch(since=seen[at].cursor) as again:
                assert [again.get(PATIENCE_S).value for _ in range(59 - at)] == list(range(at + 1, 60))
            with engine.watch(since=seen_many[at].cursor) as again:
                assert [again.get(PATIENCE_S).value for _ in range(59 - at)] == list(range(at + 1, 60))
                assert nothing_waits(again)


def test_history_applies_from_a_reload_on(open_engine: OpenEngine, tmp_path: Path) -> None:
    from scopestate.config import from_mapping

    files = {"store_method": "file_based", "file_path": str(tmp_path / "store")}
    worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": files}}}
    engine = open_engine(adapter=files)
    revision = engine.set("s", "k", 0).revision
    engine.reconfigure(from_mapping({"workers": [worker], "scopes": HISTORY}))
    with pytest.raises(Compacted):
        engine.scope("s").watch(since=revision - 1)
    for number in range(1, 4):
        engine.set("s", "k", number)
    engine.close()
    engine = open_engine(adapter=files, scopes=HISTORY)
    with engine.scope("s").watch(since=revision) as changes:
        assert take(changes, 3) == [("put", "k", number) for number in (1, 2, 3)]


def test_writers_wait_while_too_many_changes_cannot_be_saved(
    open_engine: OpenEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scopestate.persistence import FileAdapter

    monkeypatch.setattr(feed_module, "SAVE_BYTES", 1_000)
    monkeypatch.setattr(feed_module, "MOST_UNSAVED_BYTES", 100_000)
    monkeypatch.setattr("scopestate.actors.router.MOST_INCOMING", 10)
    files = {"store_method": "file_based", "file_path": str(tmp_path / "store")}
    engine = open_engine(adapter=files, scopes=HISTORY)
    save, broken = FileAdapter.save, threading.Event()
    broken.set()

    def fail(store: Any, *what: Any) -> None:
        if broken.is_set():
            raise StorageError("the disk is full")
        save(store, *what)

    monkeypatch.setattr(FileAdapter, "save", fail)
    written = 0

    def write() -> None:
        nonlocal written
        for written in range(50_000):
            engine.set("s", "k", written)

    writer = threading.Thread(target=write)
    writer.start()
    deadline = time.monotonic() + PATIENCE_S
    while engine.stats().blocked == 0:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert written < 40_000
    broken.clear()
    engine.flush()
    writer.join(PATIENCE_S)
    assert written == 49_999
    with engine.scope("s").watch(since=1) as changes:
        assert [changes.get(PATIENCE_S).value for _ in range(49_999)] == list(range(1, 50_000))


def test_a_watch_that_nothing_refers_to_is_forgotten(engine: Engine) -> None:
    changes = engine.scope("s").watch()
    here = weakref.ref(changes)
    del changes
    gc.collect()
    assert here() is None
    engine._router.feed.forget_unused()
    assert engine._router.feed.watchers() == []


def test_scopes_are_fed_no_longer_a_while_after_their_watch_was_dropped() -> None:
    dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
    with Engine(dispatcher=dispatcher) as engine:
        changes = engine.scope("s").watch()
        engine.set("s", "k", 1)
        assert engine._scopes["s"]._watch.fed
        del changes
        gc.collect()
        dispatcher.advance(3 * feed_module.LINGER_S)
        assert not engine._scopes["s"]._watch.fed


def test_a_history_in_memory_keeps_changes_although_nothing_watches(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "LINGER_S", 0.0)
    engine = open_engine(scopes=[{"name": "s", "history": {}}])
    with engine.scope("s").watch() as changes:
        cursor = changes.cursor
    engine._router.feed.forget_unused()
    for number in range(5):
        engine.set("s", "k", number)
    with engine.scope("s").watch(since=cursor) as changes:
        assert [changes.get(PATIENCE_S).value for _ in range(5)] == list(range(5))


def test_a_passivated_scope_stays_watched(open_file_store: OpenEngine) -> None:
    engine = open_file_store()
    with engine.scope("s").watch() as changes:
        engine.set("s", "k", 1)
        take(changes, 1)
        engine.flush()
        actor = engine._scopes["s"]
        actor.touched = False
        from scopestate.actors.scope import Passivate

        assert actor.housekeep(Passivate()) is True
        engine.set("s", "k", 2)
        assert engine._scopes["s"] is not actor
        assert take(changes, 1) == [("put", "k", 2)]


def test_a_change_of_a_commit_scope_is_told_when_it_is_on_disk(open_engine: OpenEngine) -> None:
    store, gate = GatedStore(), Gate()
    engine = open_engine(store=store, scopes=[{"name": "safe", "durability": "commit"}])
    with engine.scope("safe").watch() as changes, engine.watch() as many:
        store.at_save = gate
        writer = threading.Thread(target=lambda: engine.set("safe", "k", 1))
        writer.start()
        gate.wait_until_reached()
        engine.set("other", "k", 2)
        assert nothing_waits(changes)
        assert nothing_waits(many)  # behind a change that may still fail
        with engine.scope("other").watch() as beside:
            assert take(beside, 1) == [("put", "k", 2)]  # one scope waits for itself only
        gate.open()
        writer.join()
        assert take(changes, 1) == [("put", "k", 1)]
        assert {plain(many.get(PATIENCE_S)) for _ in range(2)} == {("put", "k", 1), ("put", "k", 2)}


def test_a_change_whose_commit_fails_is_not_told(open_engine: OpenEngine) -> None:
    store = GatedStore()
    engine = open_engine(store=store, scopes=[{"name": "safe", "durability": "commit"}])
    with engine.scope("safe").watch() as changes, engine.watch() as many:
        engine.set("safe", "k", 1)
        store.at_save = broken
        with pytest.raises(StorageError):
            engine.set("safe", "k", 2)
        store.at_save = lambda: None
        engine.set("safe", "k", 3)
        for watch in (changes, many):
            assert take(watch, 2) == [("put", "k", 1), ("put", "k", 3)]
            assert nothing_waits(watch)
        cursor, of_many = changes.cursor, many.cursor
        engine.set("safe", "k", 4)
        with engine.scope("safe").watch(since=cursor) as again, engine.watch(since=of_many) as again_many:
            assert take(again, 1) == take(again_many, 1) == [("put", "k", 4)]


def test_what_a_handler_does_to_its_event_changes_nothing_for_watches(engine: Engine) -> None:
    def spoil(event: StateEvent) -> None:
        event.key, event.new_json, event.revision = "spoilt", b"0", 99

    engine.on_change(scope="s")(spoil)
    with engine.scope("s").watch() as changes:
        cursor = changes.cursor
        engine.set("s", "k", 1)
        engine.drain(PATIENCE_S)
        with engine.scope("s").watch(since=cursor) as again:
            for watch in (changes, again):
                change = watch.get(PATIENCE_S)
                assert (change.key, change.value, change.revision) == ("k", 1, 1)


# --------------------------------------------------------------------------------------------------------- who watches


def test_a_thousand_watches_get_what_is_theirs(engine: Engine) -> None:
    watches = [engine.scope(f"s{number % 100}").watch(key=f"k{number // 100}") for number in range(1000)]
    for number in range(1000):
        engine.set(f"s{number % 100}", f"k{number // 100}", number)
    for number, changes in enumerate(watches):
        assert changes.get(PATIENCE_S).value == number
    engine._router.feed.number()
    assert not any(changes._watcher.has_next() for changes in watches)
    for changes in watches:
        changes.close()


def test_several_threads_share_a_watch(engine: Engine) -> None:
    seen: list[Any] = []
    with engine.scope("s").watch() as changes:
        readers = [threading.Thread(target=lambda: seen.extend(one.value for one in changes)) for _ in range(4)]
        for reader in readers:
            reader.start()
        for number in range(1000):
            engine.set("s", "k", number)
        while len(seen) < 1000:
            time.sleep(0.001)
    for reader in readers:
        reader.join(PATIENCE_S)
    assert sorted(seen) == list(range(1000))


@pytest.mark.parametrize("how", ["snapshot", "ring", "journal"])
def test_several_threads_share_what_comes_first(open_engine: OpenEngine, tmp_path: Path, how: str) -> None:
    files = {"store_method": "file_based", "file_path": str(tmp_path / "store")}
    engine = open_engine(adapter=files, scopes=HISTORY)
    for number in range(9_000):
        engine.set("s", f"{number}", number)
    if how == "journal":
        engine.close()
        engine = open_engine(adapter=files, scopes=HISTORY)
    seen: list[Any] = []
    with engine.watch("s", since=None if how == "snapshot" else 0) as changes:
        readers = [threading.Thread(target=lambda: seen.extend(one.value for one in changes)) for _ in range(4)]
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + PATIENCE_S
        while len(seen) < 9_000 and time.monotonic() < deadline:
            time.sleep(0.001)
    for reader in readers:
        reader.join(PATIENCE_S)
    assert sorted(seen) == list(range(9_000))


def test_another_thread_can_wait_until_the_snapshot_was_read(engine: Engine) -> None:
    engine.set("s", "k", 1)
    changes = engine.scope("s").watch()
    assert not changes.wait_synced(0.01)
    reader = threading.Thread(target=lambda: [change.value for change in changes])
    reader.start()
    assert changes.wait_synced(PATIENCE_S)
    changes.close()
    reader.join(PATIENCE_S)


def test_a_watch_in_a_handler_and_none_in_a_function_of_modify(engine: Engine) -> None:
    seen: list[Any] = []

    @engine.on_change(scope="s")
    def handle(event: StateEvent) -> None:
        with engine.scope("t").watch() as changes:
            seen.append(plain(changes.get(PATIENCE_S)))

    engine.set("t", "k", 1)
    engine.set("s", "k", 1)
    engine.drain(PATIENCE_S)
    assert seen == [("put", "k", 1)]
    with pytest.raises(WouldDeadlock):
        engine.modify("t", "k", lambda _: engine.scope("s").watch())


# -------------------------------------------------------------------------------------------------------------- asyncio


def test_asyncio_watches_as_threads_do(open_store: OpenEngine, loop_thread: LoopThread) -> None:
    engine = open_store()
    scope = engine.scope("s")
    scope.set("a", 1)

    async def watch() -> list[Any]:
        seen: list[Any] = []
        async with scope.aio.watch(markers=True) as changes:
            async for change in changes:
                seen.append((change.kind, change.key, change.value))
                if change.kind == "synced":
                    assert await changes.wait_synced(1)
                    await scope.aio.set("a", 2)
                if change.value == 2:
                    break
            with pytest.raises(TimeoutError):
                await changes.get(timeout=0.01)
            await scope.aio.set("a", 3)
            seen.append(plain(await changes.get(timeout=PATIENCE_S)))
            cursor = changes.cursor
        await scope.aio.set("a", 4)
        async with engine.aio.scope("s").watch(since=cursor) as changes, engine.aio.watch() as many:
            seen.append(plain(await changes.get(PATIENCE_S)))
            seen.append(plain(await many.get(PATIENCE_S)))
            asyncio.get_running_loop().call_later(0.01, changes.close)
            assert [change async for change in changes] == []
            with pytest.raises(EngineClosed):
                await changes.get()
        return seen

    assert loop_thread.do(watch) == [
        ("put", "a", 1),
        ("synced", "", None),
        ("put", "a", 2),
        ("put", "a", 3),
        ("put", "a", 4),
        ("put", "a", 4),
    ]


def test_asyncio_reads_the_journal_without_blocking(open_file_store: OpenEngine, loop_thread: LoopThread) -> None:
    engine = open_file_store(scopes=HISTORY)
    for number in range(50):
        engine.set("s", "k", number)
    engine.close()
    engine = open_file_store(scopes=HISTORY)

    async def watch() -> list[Any]:
        async with engine.aio.watch("s", since=10) as changes:
            return [(await changes.get(PATIENCE_S)).value for _ in range(40)]

    assert loop_thread.do(watch) == list(range(10, 50))
    with pytest.raises(Compacted):
        loop_thread.do(engine.aio.watch("never", since=10).__aenter__)


def test_a_task_that_is_cancelled_loses_no_change(engine: Engine, loop_thread: LoopThread) -> None:
    async def watch() -> list[Any]:
        async with engine.aio.watch("s") as changes:
            for _ in range(3):
                task = asyncio.ensure_future(changes.get())
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert not changes._watcher.waiters
            for number in range(3):
                await engine.aio.set("s", "k", number)
            return [(await changes.get(PATIENCE_S)).value for _ in range(3)]

    assert loop_thread.do(watch) == [0, 1, 2]


def test_a_task_that_is_cancelled_just_when_a_change_comes_is_cancelled(
    engine: Engine, loop_thread: LoopThread
) -> None:
    async def main() -> str:
        async with engine.aio.scope("s").watch(snapshot=False) as changes:
            task = asyncio.ensure_future(changes.get(PATIENCE_S))
            while not changes._watcher.waiters:  # noqa: ASYNC110 - nothing tells it
                await asyncio.sleep(0)
            changes._watcher.wake()  # what the task waits for is there, and it has not run since
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await engine.aio.set("s", "k", 1)
            return (await changes.get(PATIENCE_S)).key

    assert loop_thread.do(main) == "k"


def test_many_polls_leave_little_behind() -> None:
    dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
    with Engine(dispatcher=dispatcher) as engine:
        cursor = None
        timers = set()
        for _ in range(200):
            cursor = engine.call("state::changes", {"scope": "s", "cursor": cursor})["cursor"]
            timers.add(len(dispatcher._timers))
        assert max(timers) < 10
        assert len(engine._polls._kept) == 1
        dispatcher.advance(3 * polls_module.KEPT_S)
        assert not engine._polls._kept


def test_a_save_does_not_look_at_all_scopes_that_are_watched(open_file_store: OpenEngine) -> None:
    engine = open_file_store(scopes=[*HISTORY, {"name": "now", "durability": "commit"}])
    feed = engine._router.feed
    with engine.watch(scope_prefix="", snapshot=False) as changes:
        for number in range(100):
            engine.set(f"s{number}", "k", number)
        engine.flush()

        class Scopes(dict[str, Any]):
            def values(self) -> Any:
                raise AssertionError("all scopes are looked at")

            __iter__ = items = values

        feed._scopes = Scopes(feed._scopes)
        engine.set("now", "k", 1)  # a save which writes that one
        assert feed.settled() == feed.position
        feed._scopes = dict(dict.items(feed._scopes))
        assert [changes.get(PATIENCE_S).scope for _ in range(101)][-1] == "now"
