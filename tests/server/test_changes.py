"""`state::changes`: long polls over the wire, with the rights of each moment, within bounds, and across restarts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raw import RawWorker
from serving import OpenRaw, OpenServer, eventually

from scopestate import Engine
from scopestate.config import AuthConfig, TokenConfig, from_mapping
from scopestate.ops.polls import FUNCTION_ID, LONGEST_WAIT_MS
from scopestate.polls import KEPT, MOST_POLLS, SNAPSHOTS_OF_A_SHARE
from scopestate.server.server import Server

ADMIN = "admin-token-0001"
GUEST = "guest-token-0002"

NUMBER = "revision"


def poll(worker: RawWorker, **asked: Any) -> dict[str, Any]:
    found: dict[str, Any] = worker.call(FUNCTION_ID, asked)
    return found


def told(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(change["kind"], change["scope"], change["key"]) for change in found["changes"]]


def refusal(worker: RawWorker, **asked: Any) -> dict[str, Any]:
    error: dict[str, Any] = worker.ask(FUNCTION_ID, asked)["error"]
    return error


def waiting(worker: RawWorker, engine: Engine, **asked: Any) -> str:
    """Send a poll and return its id, when it is on its way."""
    invocation_id = worker.invoke(FUNCTION_ID, {"wait_ms": LONGEST_WAIT_MS, **asked})
    worker.settle()
    return invocation_id


# --------------------------------------------------------------------------------------------------- what it tells


def test_the_first_poll_gives_a_cursor_and_the_next_what_has_changed_since(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    engine.set("s", "before", 1)
    begin = poll(worker, scope="s")
    assert (begin["changes"], begin["more"]) == ([], False)

    engine.set("s", "k", {"n": 1})
    engine.set("s", "k", {"n": 2})
    engine.delete("s", "k")
    engine.set("other", "k", 0)
    found = poll(worker, scope="s", cursor=begin["cursor"])

    assert told(found) == [("put", "s", "k"), ("put", "s", "k"), ("delete", "s", "k")]
    values = [(change.get("value"), change.get("old_value")) for change in found["changes"]]
    assert values == [({"n": 1}, None), ({"n": 2}, {"n": 1}), (None, {"n": 2})]
    assert "old_value" not in found["changes"][0]
    assert "value" not in found["changes"][2]
    assert [change["revision"] for change in found["changes"]] == [2, 3, 4]
    assert poll(worker, scope="s", cursor=found["cursor"])["changes"] == []
    behind_first = poll(worker, scope="s", cursor=found["changes"][0]["cursor"])
    assert [change["revision"] for change in behind_first["changes"]] == [3, 4]


def test_a_stored_null_is_there_and_a_missing_value_is_not(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    cursor = poll(worker, scope="s")["cursor"]
    engine.set("s", "k", None)
    engine.set("s", "k", 1)

    created, updated = poll(worker, scope="s", cursor=cursor)["changes"]

    assert created["value"] is None
    assert "old_value" not in created
    assert updated["old_value"] is None


def test_a_poll_waits_for_a_change_and_no_longer(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    cursor = poll(worker, scope="s")["cursor"]
    waiting(worker, engine, scope="s", cursor=cursor)
    threads = threading.active_count()

    engine.set("other", "k", 0)
    engine.set("s", "k", 1)

    assert told(worker.receive()["result"]) == [("put", "s", "k")]
    assert threading.active_count() <= threads + 1


def test_a_poll_that_finds_nothing_ends_with_a_cursor_that_has_moved_on(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    cursor = poll(worker, scope="s", key="k")["cursor"]
    engine.set("s", "other", 1)

    found = poll(worker, scope="s", key="k", cursor=cursor, wait_ms=20)

    assert (found["changes"], found["more"]) == ([], False)
    assert found["cursor"] != cursor


def test_scopes_keys_and_kinds_are_filtered(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    asked: list[dict[str, Any]] = [
        {},
        {"scope": "ab"},
        {"scope_prefix": "a"},
        {"key": "k"},
        {"prefix": "k"},
        {"scope": "ab", "prefix": "k", "events": ["deleted"]},
    ]
    cursors = [poll(worker, **one)["cursor"] for one in asked]
    for scope, key in (("ab", "k"), ("ac", "kk"), ("b", "x")):
        engine.set(scope, key, 1)
    engine.delete("ab", "k")

    found = [poll(worker, cursor=cursor, **one) for one, cursor in zip(asked, cursors, strict=True)]

    assert [[change["scope"] + change["key"] for change in one["changes"]] for one in found] == [
        ["abk", "ackk", "bx", "abk"],
        ["abk", "abk"],
        ["abk", "ackk", "abk"],
        ["abk", "abk"],
        ["abk", "ackk", "abk"],
        ["abk"],
    ]


def test_a_transaction_is_told_with_its_last_revision(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    cursor = poll(worker, scope="s")["cursor"]
    with engine.scope("s").batch() as batch:
        batch.set("a", 1)
        batch.set("b", 2)
    engine.set("s", "c", 3)

    first, second, alone = poll(worker, scope="s", cursor=cursor)["changes"]

    assert first["transaction"] == second["revision"]
    assert "transaction" not in second
    assert "transaction" not in alone


def test_without_values_the_values_are_not_sent(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    cursor = poll(worker, scope="s", values=False)["cursor"]
    engine.set("s", "k", "x" * 1000)

    [change] = poll(worker, scope="s", values=False, cursor=cursor)["changes"]

    assert set(change) == {"kind", "scope", "key", "revision", "time_ms", "cursor"}


# --------------------------------------------------------------------------------------------------- its bounds


def test_an_answer_has_at_most_so_many_changes_and_the_next_goes_on(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    cursor = poll(worker, scope="s")["cursor"]
    for number in range(25):
        engine.set("s", f"k{number}", number)

    seen: list[Any] = []
    more = True
    while more:
        found = poll(worker, scope="s", cursor=cursor, limit=10)
        seen += [change["value"] for change in found["changes"]]
        cursor, more = found["cursor"], found["more"]
        assert len(found["changes"]) <= 10

    assert seen == list(range(25))


def test_an_answer_has_at_most_so_many_bytes_but_for_a_change_that_is_larger(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    cursor = poll(worker, scope="s")["cursor"]
    for size in (400, 400, 5000, 400):
        engine.set("s", f"k{size}", "x" * size)

    sizes: list[list[int]] = []
    more = True
    while more:
        found = poll(worker, scope="s", cursor=cursor, max_bytes=2500)
        sizes.append([len(change["value"]) for change in found["changes"]])
        cursor, more = found["cursor"], found["more"]

    assert [size for some in sizes for size in some] == [400, 400, 5000, 400]
    assert [5000] in sizes


def test_the_cursor_of_an_answer_that_was_cut_holds_on_another_connection(engine: Engine, connect: OpenRaw) -> None:
    worker, other = connect(), connect()
    cursor = poll(worker, scope="s")["cursor"]
    for number in range(5):
        engine.set("s", "k", f"{number}" * 300)

    found = poll(worker, scope="s", cursor=cursor, max_bytes=1300)
    there = len(found["changes"])
    assert 0 < there < 5
    rest = poll(other, scope="s", cursor=found["cursor"])

    assert [change["value"][0] for change in found["changes"] + rest["changes"]] == list("01234")


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"limit": 0}, "INVALID_PAGE_LIMITS"),
        ({"limit": 1001}, "INVALID_PAGE_LIMITS"),
        ({"limit": 10**30}, "deserialization_error"),
        ({"max_bytes": 255}, "INVALID_PAGE_LIMITS"),
        ({"max_bytes": 8_000_001}, "INVALID_PAGE_LIMITS"),
        ({"wait_ms": -1}, "INVALID_PAGE_LIMITS"),
        ({"wait_ms": 30_001}, "INVALID_PAGE_LIMITS"),
        ({"wait_ms": "1"}, "deserialization_error"),
        ({"scope": "s", "scope_prefix": "s"}, "deserialization_error"),
        ({"key": "k", "prefix": "k"}, "deserialization_error"),
        ({"events": []}, "deserialization_error"),
        ({"events": ["made"]}, "deserialization_error"),
        ({"revision": 1}, "deserialization_error"),
        ({"scope": "s", "revision": -1}, "deserialization_error"),
        ({"cursor": ""}, "INVALID_CURSOR"),
        ({"cursor": "x" * 100_000}, "INVALID_CURSOR"),
        ({"cursor": "poll.0000"}, "INVALID_CURSOR"),
        ({"cursor": "ключ"}, "INVALID_CURSOR"),
        ({"cursor": 17}, "deserialization_error"),
        ([], "deserialization_error"),
        (None, "deserialization_error"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(connect: OpenRaw, asked: Any, code: str) -> None:
    assert connect().ask(FUNCTION_ID, asked)["error"]["code"] == code


def test_a_damaged_cursor_is_refused(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    cursor = poll(worker, scope="s")["cursor"]

    for place in range(len(cursor)):
        other = "A" if cursor[place] != "A" else "B"
        assert (
            refusal(worker, scope="s", cursor=cursor[:place] + other + cursor[place + 1 :])["code"] == "INVALID_CURSOR"
        )


def test_a_cursor_of_another_scope_or_store_is_refused(
    engine: Engine, connect: OpenRaw, open_server: OpenServer
) -> None:
    worker = connect()
    cursor = poll(worker, scope="s")["cursor"]
    assert refusal(worker, scope="other", cursor=cursor)["code"] == "deserialization_error"
    assert refusal(worker, cursor=cursor)["code"] == "deserialization_error"

    with Engine() as elsewhere:
        there = connect(open_server(engine=elsewhere))
        error = refusal(there, scope="s", cursor=cursor)
        there.close()

    assert error["code"] == "COMPACTED"
    assert error["details"] == {"requested": cursor, "reason": "other store", "oldest": None}


def test_a_flood_of_polls_is_bounded_and_harms_no_one_else(engine: Engine, connect: OpenRaw) -> None:
    worker, other = connect(), connect()
    for _ in range(MOST_POLLS):
        worker.invoke(FUNCTION_ID, {"scope": "s", "wait_ms": LONGEST_WAIT_MS})
    worker.settle()
    eventually(lambda: engine._polls._polling[engine_caller(engine)] == MOST_POLLS)

    assert refusal(worker, scope="s", wait_ms=LONGEST_WAIT_MS)["code"] == "OVERLOADED"
    assert poll(other, scope="s")["changes"] == []
    engine.set("s", "k", 1)
    assert {worker.receive()["result"]["changes"][0]["key"] for _ in range(MOST_POLLS)} == {"k"}
    assert poll(worker, scope="s")["changes"] == []


def engine_caller(engine: Engine) -> Any:
    """Return the caller that has most polls in progress."""
    [(caller, _)] = engine._polls._polling.most_common(1) or [(None, 0)]
    return caller


def test_polls_end_with_their_connection(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    for _ in range(10):
        waiting(worker, engine, scope="s")
    found = poll(worker, scope="s")
    assert found["changes"] == []
    worker.cut()

    eventually(lambda: not engine._polls._polling and not engine._polls._kept)


def test_a_poll_ends_when_the_engine_closes(open_server: OpenServer, connect: OpenRaw) -> None:
    engine = Engine()
    worker = connect(open_server(engine=engine))
    waiting(worker, engine, scope="s")

    engine.close()

    assert worker.receive()["error"]["code"] == "ENGINE_CLOSED"
    assert refusal(worker, scope="s")["code"] == "ENGINE_CLOSED"


def test_few_watches_are_kept_for_one_connection(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    cursors = [poll(worker, scope=f"s{number}")["cursor"] for number in range(3 * KEPT)]
    assert len(engine._polls._kept) == KEPT

    engine.set("s0", "k", 1)

    assert told(poll(worker, scope="s0", cursor=cursors[0])) == [("put", "s0", "k")]


def test_many_changes_between_two_polls_are_all_told(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    cursor = poll(worker, scope="s")["cursor"]
    for number in range(6_000):
        engine.set("s", "k", number)

    seen: list[int] = []
    while len(seen) < 6_000:
        found = poll(worker, scope="s", cursor=cursor, limit=1_000, wait_ms=5_000)
        seen += [change["value"] for change in found["changes"]]
        cursor = found["cursor"]

    assert seen == list(range(6_000))


# --------------------------------------------------------------------------------------------------- snapshots


def test_a_poll_may_begin_with_what_there_is(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    for number in range(25):
        engine.set("s", f"k{number:02}", number)
    found = poll(worker, scope="s", snapshot=True, limit=10)
    engine.set("s", "k00", "new")
    engine.set("s", "k24", "new")

    seen = found["changes"]
    while found["more"]:
        found = poll(worker, scope="s", cursor=found["cursor"], limit=10)
        seen += found["changes"]
    seen += poll(worker, scope="s", cursor=found["cursor"])["changes"]

    assert [change["value"] for change in seen] == [*range(25), "new", "new"]
    assert [change.get("initial", False) for change in seen] == [True] * 25 + [False] * 2


def test_a_snapshot_is_read_by_the_connection_that_asked_for_it(engine: Engine, connect: OpenRaw) -> None:
    worker, other = connect(), connect()
    for key in "abc":
        engine.set("s", key, 1)
    cursor = poll(worker, scope="s", snapshot=True, limit=1)["cursor"]

    assert refusal(other, scope="s", cursor=cursor)["code"] == "INVALID_CURSOR"
    assert refusal(worker, scope="t", cursor=cursor)["code"] == "INVALID_CURSOR"
    assert len(poll(worker, scope="s", cursor=cursor, limit=2)["changes"]) == 2
    assert refusal(worker, scope="s", cursor=cursor)["code"] == "INVALID_CURSOR"


def test_snapshots_that_are_not_read_to_the_end_are_bounded(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    engine.set("s", "a", 1)
    engine.set("s", "b", 1)
    for _ in range(SNAPSHOTS_OF_A_SHARE):
        cursor = poll(worker, scope="s", snapshot=True, limit=1)["cursor"]

    assert refusal(worker, scope="s", snapshot=True, limit=1)["code"] == "SNAPSHOT_CAPACITY"
    poll(worker, scope="s", cursor=cursor)
    poll(worker, scope="s", snapshot=True)


# --------------------------------------------------------------------------------------------------- rights


@pytest.fixture
def guarded(open_server: OpenServer) -> Server:
    guest = {"token": GUEST, "functions": [FUNCTION_ID], "read": ["mine", "mine-*"]}
    return open_server(auth={"tokens": [ADMIN, guest]})


@pytest.fixture
def guest(guarded: Server, connect: OpenRaw) -> RawWorker:
    return connect(guarded, additional_headers={"Authorization": f"Bearer {GUEST}"})


def test_a_token_polls_only_scopes_that_it_may_read(guest: RawWorker, engine: Engine) -> None:
    assert refusal(guest, scope="theirs")["code"] == "FORBIDDEN"
    begin = {name: poll(guest, **asked)["cursor"] for name, asked in (("all", {}), ("some", {"scope_prefix": "t"}))}
    for scope in ("mine", "theirs", "mine-too", "minerals"):
        engine.set(scope, "k", scope)

    found = poll(guest, cursor=begin["all"])
    assert [change["scope"] for change in found["changes"]] == ["mine", "mine-too"]
    assert poll(guest, cursor=begin["some"], scope_prefix="t")["changes"] == []


def test_changes_that_may_not_be_read_do_not_end_a_poll(guest: RawWorker, engine: Engine) -> None:
    cursor = poll(guest)["cursor"]
    waiting(guest, engine, cursor=cursor)

    engine.set("theirs", "k", "secret")
    guest.settle()
    engine.set("mine", "k", 1)

    answer = guest.receive()
    assert "secret" not in json.dumps(answer)
    assert [change["scope"] for change in answer["result"]["changes"]] == ["mine"]


def test_a_token_that_may_not_call_it_gets_nothing(open_server: OpenServer, connect: OpenRaw) -> None:
    server = open_server(auth={"tokens": [ADMIN, {"token": GUEST, "functions": ["state::get"], "read": ["*"]}]})
    worker = connect(server, additional_headers={"Authorization": f"Bearer {GUEST}"})

    assert refusal(worker, scope="s")["code"] == "FORBIDDEN"


def test_rights_that_are_taken_away_while_a_poll_waits_count(guarded: Server, guest: RawWorker, engine: Engine) -> None:
    cursors = poll(guest)["cursor"], poll(guest, scope="mine")["cursor"]
    every = waiting(guest, engine, cursor=cursors[0])
    one = waiting(guest, engine, cursor=cursors[1], scope="mine")
    now = TokenConfig(token=GUEST, functions=(FUNCTION_ID,), read=("mine-*",))
    guarded._access_check.reload(AuthConfig((*guarded.config.auth.tokens[:1], now)))

    engine.set("mine", "k", "secret")
    engine.set("mine-too", "k", 2)

    answers = {answer["invocation_id"]: answer for answer in (guest.receive(), guest.receive())}
    assert "secret" not in json.dumps(answers)
    assert [change["scope"] for change in answers[every]["result"]["changes"]] == ["mine-too"]
    assert answers[one]["error"]["code"] == "FORBIDDEN"


# --------------------------------------------------------------------------------------------------- on a store


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[], Engine]:
    def opened() -> Engine:
        config = {"store_method": "file_based", "file_path": str(tmp_path / "store")}
        entry = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": config}}}
        return Engine(from_mapping({"workers": [entry], "scopes": [{"prefix": "h", "history": {"events": 100}}]}))

    return opened


def test_a_cursor_outlives_a_restart_where_there_is_a_history(
    stored: Any, open_server: OpenServer, connect: OpenRaw
) -> None:
    with stored() as engine:
        worker = connect(open_server(engine=engine))
        cursors = [poll(worker, scope="h")["cursor"], poll(worker, scope="s")["cursor"]]
        for scope in ("h", "s"):
            engine.set(scope, "k", 1)
        worker.close()
    with stored() as engine:
        worker = connect(open_server(engine=engine))
        engine.set("h", "k", 2)
        assert [change["value"] for change in poll(worker, scope="h", cursor=cursors[0])["changes"]] == [1, 2]
        assert refusal(worker, scope="s", cursor=cursors[1])["details"]["reason"] == "trimmed"
        worker.close()


# --------------------------------------------------------------------------------------------------- in the program


@pytest.mark.asyncio
async def test_the_program_polls_too(engine: Engine) -> None:
    for call in (engine.aio.call,):
        begin = await call(FUNCTION_ID, {"scope": "s"})
        engine.set("s", "k", 1)
        found = await call(FUNCTION_ID, {"scope": "s", "cursor": begin["cursor"], "wait_ms": 1000})
        assert [change["value"] for change in found["changes"]] == [1]
        assert (await call(FUNCTION_ID, {"scope": "s", "cursor": found["cursor"], "wait_ms": 1}))["changes"] == []
    begin = engine.call(FUNCTION_ID, {"scope": "s", "snapshot": True})
    assert [change["value"] for change in begin["changes"]] == [1]
    engine.set("s", "k", 2)
    assert engine.call(FUNCTION_ID, {"scope": "s", "cursor": begin["cursor"]})["changes"][0]["value"] == 2
    assert engine.stats().calls[FUNCTION_ID] == 5
