"""What goes wrong elsewhere and must not here: a test per point of docs/reference/semantics.md section 8, by number.

Left out: 37 and 38 are the bridge's (tests/bridge). 13 and 30 name functions that do not exist here (compare-and-set,
transactions, TTL, paged lists): what there is instead is tested.
"""

from __future__ import annotations

import logging
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conformance import load, same
from load.engines import nothing_left, open_engine
from reliability.living import PATIENCE_S, InThread, Seen, saved, settings

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.errors import (
    ConfigError,
    EventNotDelivered,
    FunctionFailed,
    FunctionNotFound,
    StoreCorrupt,
    StoreLocked,
    ValueTooLarge,
)
from scopestate.ops.functions import from_payload

__all__ = ["nothing_left", "open_engine"]

sys.path.insert(0, str(Path(__file__).parent / "redis"))  # for `import one_server`

from one_server import Server

Open = Callable[..., Engine]
ADD = {"type": "increment", "path": "", "by": 1}


def test_semantics_8_01_racing_deletes_take_a_value_once(open_engine: Open) -> None:
    engine = open_engine()
    seen = Seen()
    engine.on_change(scope="s")(seen)
    for number in range(50):
        engine.set("s", "k", number)
        racers = [InThread(lambda: engine.delete("s", "k")) for _ in range(4)]
        assert sorted([racer.result() for racer in racers], key=str) == [number, None, None, None]

    deletes = [event for event in seen.wait_for(250) if event.event_type == "state:deleted"]
    assert [event.old_value for event in deletes if event.existed] == list(range(50))


def test_semantics_8_02_a_delete_of_nothing_fires_and_says_so(open_engine: Open) -> None:
    engine = open_engine()
    seen = Seen()
    engine.on_change(scope="s")(seen)
    engine.set("s", "k", None)
    engine.delete("s", "k")
    engine.delete("s", "k")

    _, real, empty = seen.wait_for(3)
    assert (real.event_type, real.old_value, real.existed) == ("state:deleted", None, True)
    assert (empty.event_type, empty.old_value, empty.existed) == ("state:deleted", None, False)


def test_semantics_8_03_events_of_a_scope_arrive_in_order_with_their_numbers(open_engine: Open) -> None:
    engine = open_engine()
    seen = Seen()
    engine.on_change(scope="s")(seen)
    writers = [InThread(lambda: [engine.update("s", "n", [ADD]) for _ in range(200)]) for _ in range(4)]
    for writer in writers:
        writer.result()

    events = seen.wait_for(800)
    assert [event.revision for event in events] == list(range(1, 801))
    assert [event.new_value for event in events] == list(range(1, 801))
    assert engine.get("s", "n") == events[-1].new_value


def test_semantics_8_04_a_hung_handler_starves_no_other(open_engine: Open) -> None:
    engine = open_engine(limits={"handler_timeout_ms": 10})
    gate = threading.Event()
    seen = Seen()
    engine.on_change(scope="s", function_id="hung")(lambda event: gate.wait(PATIENCE_S))
    engine.on_change(scope="s")(seen)
    for number in range(100):
        engine.set("s", "k", number)

    assert len(seen.wait_for(100)) == 100
    gate.set()


def test_semantics_8_05_triggers_have_an_order_that_of_registration(open_engine: Open) -> None:
    engine = open_engine()
    names = [f"t{number}" for number in (3, 1, 2, 9, 0)]
    for place, name in enumerate(names):
        engine.register_trigger(
            function_id="f", scope=[None, "s"][place % 2], key=["k", None][place % 3 > 0], trigger_id=name
        )

    assert [handle.trigger_id for handle in engine.triggers()] == names
    watch = engine._router.triggers.watch("s")
    assert [handler.trigger.trigger_id for handler in watch.match("k")] == names


def test_semantics_8_06_a_failing_event_is_tried_again_and_then_handed_to_the_dead_letter_hook(
    open_engine: Open,
) -> None:
    letters: list[Any] = []
    attempts: list[int] = []
    engine = open_engine(limits={"handler_attempts": 3, "handler_backoff_ms": 1}, on_dead_letter=letters.append)

    @engine.on_change(scope="s")
    def fails(event: Any) -> None:
        attempts.append(event.revision)
        raise ValueError("no")

    engine.set("s", "k", 1)
    engine.drain(PATIENCE_S)

    assert attempts == [1, 1, 1]
    assert [(letter.attempt, letter.final, letter.event.revision) for letter in letters] == [(3, True, 1)]


def test_semantics_8_06_events_that_no_handler_saw_before_the_end_are_reported(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.closing.HOOKS_S", PATIENCE_S)
    letters: list[Any] = []
    engine = open_engine(limits={"close_grace_ms": 20}, on_dead_letter=letters.append)
    gate = threading.Event()
    inside = threading.Event()

    @engine.on_change(scope="s")
    def hangs(event: Any) -> None:
        inside.set()
        gate.wait(PATIENCE_S)

    for number in range(5):
        engine.set("s", "k", number)
    assert inside.wait(PATIENCE_S)
    engine.close()
    gate.set()

    assert sorted(letter.event.new_value for letter in letters) == [0, 1, 2, 3, 4]
    assert {type(letter.error) for letter in letters} == {EventNotDelivered}


def test_semantics_8_07_a_trigger_sees_the_writes_after_its_registration_and_none_before(open_engine: Open) -> None:
    engine = open_engine()
    for number in range(20):
        seen = Seen()
        engine.register_function("f", seen)
        engine.set("s", "k", "before")
        handle = engine.register_trigger(function_id="f", scope="s")
        engine.set("s", "k", number)
        engine.drain(PATIENCE_S)
        handle.unregister()
        engine.set("s", "k", "after")
        engine.drain(PATIENCE_S)
        assert [event.new_value for event in seen.events] == [number]


def test_semantics_8_08_a_misspelt_trigger_field_is_warned_of(
    open_engine: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        open_engine().register_trigger(function_id="f", config={"scoope": "users"})

    assert "scoope" in caplog.text


def test_semantics_8_09_only_false_skips_and_a_failing_condition_is_reported(open_engine: Open) -> None:
    errors: list[Any] = []
    engine = open_engine(on_error=errors.append)
    seen = Seen()
    verdicts: list[Any] = [None, 0, "", "false", {}, [], False, True]
    answers = iter(verdicts)
    engine.on_change(scope="s", condition=lambda event: next(answers))(seen)
    engine.register_trigger(function_id="f", scope="s", condition_function_id="nobody")
    for number in range(len(verdicts)):
        engine.set("s", "k", number)
    engine.drain(PATIENCE_S)

    assert [event.new_value for event in seen.events] == [0, 1, 2, 3, 4, 5, 7]
    assert engine.stats().skipped == 1
    engine.close()  # waits for the hooks
    assert {type(failure.error) for failure in errors} == {FunctionNotFound}
    assert len(errors) == len(verdicts)


def test_semantics_8_09_a_function_that_fails_says_so_to_its_caller(open_engine: Open) -> None:
    engine = open_engine()
    engine.register_function("f", lambda payload: 1 / 0)

    with pytest.raises(FunctionFailed, match="ZeroDivisionError"):
        engine.call("f", {})


def test_semantics_8_10_an_equal_write_fires_and_can_be_told_from_a_change(open_engine: Open) -> None:
    engine = open_engine()
    seen = Seen()
    engine.on_change(scope="s")(seen)
    for value in (1, 1, 2):
        engine.set("s", "k", value)

    events = seen.wait_for(3)
    assert [event.event_type for event in events] == ["state:created", "state:updated", "state:updated"]
    assert [event.old_json == event.new_json for event in events] == [False, True, False]


def test_semantics_8_11_an_empty_update_creates_the_key(open_engine: Open) -> None:
    engine = open_engine()
    seen = Seen()
    engine.on_change(scope="s")(seen)

    result = engine.update("s", "k", [])

    assert (result.created, result.new_value) == (True, {})
    assert seen.wait_for(1)[0].event_type == "state:created"


def test_semantics_8_12_a_refused_op_is_reported_and_the_others_are_applied(open_engine: Open) -> None:
    engine = open_engine()
    engine.set("s", "k", {"n": "text"})

    result = engine.update(
        "s", "k", [{"type": "increment", "path": "n", "by": 1}, {"type": "set", "path": "m", "value": 1}]
    )

    assert [(error.op_index, error.code) for error in result.errors] == [(0, "increment.not_number")]
    assert engine.get("s", "k") == {"n": "text", "m": 1}


def test_semantics_8_13_updates_are_atomic_so_that_counting_needs_no_compare_and_set(open_engine: Open) -> None:
    engine = open_engine()
    writers = [InThread(lambda: [engine.update("s", "n", [ADD]) for _ in range(300)]) for _ in range(8)]
    for writer in writers:
        writer.result()

    assert engine.get("s", "n") == 2400


def test_semantics_8_14_a_root_merge_on_no_object_changes_nothing_and_the_result_shows_it(open_engine: Open) -> None:
    engine = open_engine()
    engine.set("s", "k", [1, 2])

    result = engine.update("s", "k", [{"type": "merge", "value": {"a": 1}}])

    assert result.old_value == result.new_value == [1, 2]


def test_semantics_8_15_an_overflow_is_called_one(open_engine: Open) -> None:
    engine = open_engine()
    engine.set("s", "k", 2**64 - 1)

    (error,) = engine.update("s", "k", [ADD]).errors

    assert error.code == "increment.not_number"
    assert "got number" not in error.message
    assert engine.get("s", "k") == 2**64 - 1


def test_semantics_8_16_a_clean_shutdown_loses_nothing(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine("interval", save_interval_ms=3_600_000)
    engine.set("s", "k", 1)
    engine.close()

    assert saved(tmp_path / "store", "s") == (1, {"k": b"1"})


def test_semantics_8_16_with_commit_an_acknowledged_write_is_on_disk(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine("commit", save_interval_ms=3_600_000)
    engine.set("s", "k", 1)

    with sqlite3.connect(tmp_path / "store" / "state.db") as connection:
        assert connection.execute("SELECT value FROM state").fetchall() == [("1",)]
    connection.close()


def test_semantics_8_17_each_commit_is_synced(open_engine: Open) -> None:
    engine = open_engine("interval")
    engine.set("s", "k", 1)
    engine.flush()

    assert engine._parts.backend.store._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # type: ignore[attr-defined]


def test_semantics_8_18_a_change_saves_what_changed_not_the_scope(open_engine: Open) -> None:
    engine = open_engine("interval", save_interval_ms=3_600_000)
    for number in range(1000):
        engine.set("s", f"k{number}", number)
    engine.flush()
    before = engine.stats().saved_keys
    engine.update("s", "k500", [ADD])
    engine.flush()

    assert engine.stats().saved_keys - before == 1


def test_semantics_8_19_deleting_the_last_key_beside_a_set_loses_neither(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine("interval", save_interval_ms=1)
    stop = threading.Event()

    def delete() -> None:
        while not stop.is_set():
            engine.delete("s", "k")

    deleter = InThread(delete)
    for number in range(2000):
        engine.set("s", "k", number)
    stop.set()
    deleter.result()
    engine.set("s", "k", "last")
    engine.close()

    assert saved(tmp_path / "store", "s")[1] == {"k": b'"last"'}


@pytest.mark.parametrize(
    ("point", "scopes"),
    [
        ("20: an empty name", ["", "."]),
        ("21: long names", ["x" * 10_000, "x" * 10_001, "\U0001f600" * 300]),
        ("22: names that differ in case or form", ["Users", "users", "é", "e\u0301"]),
    ],
)
def test_semantics_8_20_to_22_every_scope_is_a_scope_of_its_own_after_a_restart(
    open_engine: Open, point: str, scopes: list[str]
) -> None:
    engine = open_engine("interval")
    for place, scope in enumerate(scopes):
        engine.set(scope, "k", place)
    engine.close()
    again = open_engine("interval")

    assert [again.get(scope, "k") for scope in scopes] == list(range(len(scopes))), point
    assert again.list_groups() == sorted(scopes, key=lambda scope: scope.encode())


def test_semantics_8_23_a_corrupt_store_is_set_aside_whole_and_reported(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine("interval")
    engine.set("s", "k", 1)
    engine.close()
    file = tmp_path / "store" / "state.db"
    damaged = b"garbage" + file.read_bytes()[7:]
    file.write_bytes(damaged)

    with pytest.raises(StoreCorrupt) as caught:
        open_engine("interval")

    assert caught.value.quarantined is not None
    assert Path(caught.value.quarantined).read_bytes() == damaged
    assert caught.value.quarantined in str(caught.value)


@pytest.mark.parametrize("interval", [0, -1, "100 ms", 1.5, None])
def test_semantics_8_24_an_interval_that_is_none_is_refused(tmp_path: Path, interval: Any) -> None:
    with pytest.raises(ConfigError, match="save_interval_ms"):
        Engine.from_config(settings("interval", tmp_path, save_interval_ms=interval))


def test_semantics_8_25_an_unknown_option_or_method_is_refused_never_replaced_by_memory(tmp_path: Path) -> None:
    for mistake in ({"store_method": "file"}, {"store_metod": "file_based"}, {"file_path": 3}):
        config = settings("interval", tmp_path)
        config["workers"][0]["config"]["adapter"]["config"] |= mistake
        with pytest.raises(ConfigError, match=next(iter(mistake))):
            Engine.from_config(config)


def test_semantics_8_26_a_reload_loses_nothing_that_waits_and_saving_goes_on(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine("interval", save_interval_ms=3_600_000)
    engine.set("s", "k", 1)
    engine.reconfigure(from_mapping(settings("interval", tmp_path / "store", save_interval_ms=5)))
    pause = threading.Event()
    while engine.stats().saves == 0:
        pause.wait(0.005)
    engine.set("s", "k", 2)
    engine.close()

    assert saved(tmp_path / "store", "s") == (2, {"k": b"2"})


def test_semantics_8_27_two_engines_on_one_directory_are_one_state(open_engine: Open) -> None:
    first, second = open_engine("interval"), open_engine("interval")
    second.set("s", "k", 1)

    assert first.update("s", "k", [ADD]).new_value == 2
    assert second.get("s", "k") == 2


def test_semantics_8_27_a_second_engine_on_the_directory_is_refused(open_engine: Open, tmp_path: Path) -> None:
    open_engine("interval")
    alone = settings("interval", tmp_path / "store")
    alone["workers"][0]["config"]["adapter"]["config"]["share"] = "never"

    with pytest.raises(StoreLocked, match="share: never"):
        Engine(from_mapping(alone))


def test_semantics_8_28_a_busy_scope_holds_up_no_other(open_engine: Open) -> None:
    engine = open_engine()
    engine.set("busy", "k", 1)
    actor = engine._scopes["busy"]
    actor._claim["holder"] = -1  # another thread is in a long turn

    waiting = InThread(lambda: engine.set("busy", "k", 2))
    for number in range(100):
        engine.set("other", "k", number)
    assert waiting.thread.is_alive()

    del actor._claim["holder"]
    actor.wake()
    waiting.result()


def test_semantics_8_29_there_are_limits(open_engine: Open) -> None:
    with pytest.raises(ValueTooLarge):
        open_engine(limits={"max_value_bytes": 10}).set("s", "k", "x" * 100)


def test_semantics_8_30_list_gives_values_in_the_order_of_their_keys(open_engine: Open) -> None:
    engine = open_engine()
    for key in ("b", "a", "c"):
        engine.set("s", key, key)
    engine.set("s", "b", "b again")
    engine.delete("s", "a")
    engine.set("s", "a", "a again")

    assert engine.list("s") == ["b again", "c", "a again"]


@pytest.mark.parametrize("durability", ["memory", "interval", "commit"])
def test_semantics_8_31_an_emptied_scope_leaves_the_groups(open_engine: Open, durability: str) -> None:
    engine = open_engine(durability)
    engine.set("s", "k", 1)
    engine.set("t", "k", 1)
    engine.delete("s", "k")

    assert engine.list_groups() == ["t"]


def test_semantics_8_32_null_and_missing_can_be_told_apart(open_engine: Open) -> None:
    engine = open_engine()
    engine.set("s", "null", None)

    assert engine.get("s", "null", "default") is None
    assert engine.get("s", "missing", "default") == "default"
    assert engine.set("s", "null", 1).created is False
    assert engine.set("s", "missing", 1).created is True


@pytest.fixture(scope="module")
def redis_process() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def redis_server(redis_process: Server) -> Server:
    """An empty server."""
    redis_process.fresh()
    return redis_process


@pytest.fixture
def open_redis(nothing_left: None, redis_server: Server) -> Iterator[Open]:
    """Open engines on the server: `open_redis(key_prefix="x:")`; closed at the end."""
    opened: list[Engine] = []

    def open_(**options: Any) -> Engine:
        adapter = {"name": "redis", "config": {"redis_url": redis_server.url, **options}}
        plain = {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}
        opened.append(Engine(from_mapping(plain), handle_sigterm=False))
        return opened[-1]

    yield open_
    for engine in opened:
        engine.close()


def test_semantics_8_33_ops_do_in_redis_what_they_do_everywhere(open_redis: Open) -> None:
    """Numbers keep their kind and size, empty lists stay lists, nested levels and NUL stay: cjson loses all of them."""
    engine = open_redis()
    kept: list[Any] = [2**64 - 1, -(2**63), 2**53 + 1, 1.0, -0.0, [], {"a": []}, {"a": {}}, "\x00", None]
    for value in kept:
        engine.set("s", "k", {"kept": value, "n": 2**53})
        result = engine.update("s", "k", [{"type": "increment", "path": "n", "by": 1}])
        assert same(result.new_value, {"kept": value, "n": 2**53 + 1})

    wrong = []
    for vector in load("vectors.json"):
        if "old" in vector:
            engine.set("vectors", vector["name"], vector["old"])
        result = engine.update("vectors", vector["name"], vector["ops"])
        if not same(result.new_value, vector["new"]):
            wrong.append(vector["name"])
    assert wrong == []


def test_semantics_8_34_lists_have_an_order_and_what_is_none_of_ours_breaks_neither_list_nor_groups(
    open_redis: Open, redis_server: Server
) -> None:
    engine, there = open_redis(), redis_server.client()
    keys = [f"k{number * 7919 % 1000:03}" for number in range(1000)]  # more than Redis keeps in the order of coming
    there.hset("state:s", mapping={key: f'"{key}"' for key in keys})
    there.hset("state:s", "broken", "{")
    there.set("state:text", "no scope")
    there.hset("elsewhere", "k", "1")

    assert engine.list("s") == sorted(keys)
    assert "'broken'" in str(engine.health().problems)
    assert engine.list_groups() == ["s"]
    engine.set("s", "broken", "mended")
    assert engine.health().ok


def test_semantics_8_35_callers_who_wait_for_redis_wait_together(open_redis: Open, redis_server: Server) -> None:
    """Those who come while the server hangs are all answered by a few round trips, not one each."""
    engine = open_redis()
    engine.set("s", "n", 0)
    redis_server.ask("CONFIG", "RESETSTAT")
    redis_server.pause()
    try:
        waiting = [engine.ask(from_payload("state::update", {"scope": "s", "key": "n", "ops": [ADD]}), block=False)]
        waiting += [
            engine.ask(
                from_payload("state::update", {"scope": f"s{number % 10}", "key": "n", "ops": [ADD]}), block=False
            )
            for number in range(500)
        ]
    finally:
        redis_server.resume()
    for reply in waiting:
        reply.get(timeout=PATIENCE_S)

    stats = redis_server.ask("INFO", "commandstats")
    assert [engine.get(f"s{number}", "n") for number in range(10)] == [50] * 10
    sent = sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval"))
    assert 10 <= sent <= 60, f"{sent} commands for 501 updates of 11 keys"


def test_semantics_8_36_a_change_made_through_one_engine_fires_in_the_others_too(open_redis: Open) -> None:
    writer, other = open_redis(events="shared"), open_redis(events="shared")
    seen = {engine: Seen() for engine in (writer, other)}
    for engine, handler in seen.items():
        engine.on_change(scope="s")(handler)
    writer.set("s", "k", 1)
    other.update("s", "k", [ADD])

    for handler in seen.values():
        events = handler.wait_for(2)
        assert [(event.event_type, event.old_value, event.new_value) for event in events] == [
            ("state:created", None, 1),
            ("state:updated", 1, 2),
        ]


def test_semantics_8_36_of_engines_that_share_the_work_exactly_one_fires(open_redis: Open) -> None:
    engines = [open_redis(events="shared") for _ in range(2)]
    seen = Seen()
    for engine in engines:
        engine.on_change(scope="s", durable="work")(seen)
    for number in range(50):
        engines[number % 2].set("s", "k", number)

    assert sorted(event.new_value for event in seen.wait_for(50)) == list(range(50))
    for engine in engines:
        engine.drain(PATIENCE_S)
    assert len(seen.events) == 50


def test_semantics_8_39_an_unset_variable_names_file_line_and_variable_and_a_value_injects_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(
        "# ${IN_A_COMMENT}\nworkers:\n  - name: iii-state\n    config:\n      adapter:\n"
        "        name: kv\n        config:\n"
        "          file_path: ${SCOPESTATE_TEST_PATH}\n"
    )
    monkeypatch.delenv("SCOPESTATE_TEST_PATH", raising=False)
    with pytest.raises(ConfigError, match="SCOPESTATE_TEST_PATH") as caught:
        Engine.from_config(file)
    assert (caught.value.file, caught.value.line) == (str(file), 8)

    monkeypatch.setenv("SCOPESTATE_TEST_PATH", "x\n          store_method: file_based")
    with Engine.from_config(file, watch=False) as engine:
        assert engine._parts.config.adapter.config.store_method == "in_memory"


def test_semantics_8_40_an_engine_tells_how_it_is(open_engine: Open) -> None:
    engine = open_engine("interval")
    engine.set("s", "k", 1)
    engine.flush()

    assert engine.health().ok
    stats = engine.stats()
    assert (stats.calls["state::set"], stats.keys, stats.scopes, stats.saved_keys) == (1, 1, 1, 1)
    assert engine._parts.backend.store.check() == []  # type: ignore[attr-defined]


def test_semantics_8_41_results_and_required_fields_are_as_specified(open_engine: Open) -> None:
    engine = open_engine()
    engine.call("state::set", {"scope": "s", "key": "k", "data": {"a": 1}})

    assert engine.call("state::get", {"scope": "s", "key": "k"}) == {"a": 1}
    assert engine.call("state::get", {"scope": "s", "key": "none"}) is None
    with pytest.raises(Exception, match="path") as caught:
        engine.call("state::update", {"scope": "s", "key": "k", "ops": [{"type": "set", "value": 1}]})
    assert getattr(caught.value, "code", "") == "deserialization_error"
    assert engine.call("state::update", {"scope": "s", "key": "k", "ops": [{"type": "merge", "value": {"b": 2}}]}) == {
        "old_value": {"a": 1},
        "new_value": {"a": 1, "b": 2},
    }
