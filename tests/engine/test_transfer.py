"""Export and import carry revisions, deadlines and kept answers, as far as the target keeps them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from stored import crash

from scopestate.actors.ports import ANSWERS_KEPT_MS
from scopestate.errors import DeserializationError
from scopestate.ops.turns import Entry
from scopestate.persistence import Answer, FileAdapter, Row, ScopeChange
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.persistence.sqlite.schema import RESERVED
from scopestate.transfer import Imported, export_lines, import_in_steps, import_whole

LATER = 2_000_000_000_000
"""A deadline that is ahead for as long as these tests matter."""
NOW = time.time_ns() // 1_000_000


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[FileAdapter]:
    adapter = FileAdapter(tmp_path / "target")
    yield adapter
    assert adapter.check() == []
    adapter.close()


def fill(directory: Path, changes: Iterable[ScopeChange]) -> None:
    adapter = FileAdapter(directory)
    for change in changes:
        adapter.save([change])
    adapter.close()


def exported(directory: Path) -> list[bytes]:
    with StoreReader(directory) as reader:
        return list(export_lines(reader))


def as_line(**fields: object) -> bytes:
    return msgspec.json.encode(fields) + b"\n"


USERS = ScopeChange(
    "users",
    12,
    {
        "ada": Row(b'{"n":1}', 9, 2),
        "bob": Row(b"null", 12, 4, LATER),
        "eve": Row(b"3", 7, 7),
    },
    due_ms=LATER,
    answers={"first": Answer(b"d1", b"\x00\xff", NOW - 5), "second": Answer(b"d2", b"", NOW)},
)


def test_the_lines_of_an_export(directory: Path) -> None:
    fill(directory, [USERS, ScopeChange("emptied", 3, {})])

    assert [msgspec.json.decode(line) for line in exported(directory)] == [
        {"scopestate_export": 2},
        {"scope": "emptied", "revision": 3},
        {"scope": "users", "revision": 12},
        {"scope": "users", "key": "ada", "value": {"n": 1}, "revision": 9},
        {"scope": "users", "key": "bob", "value": None, "revision": 12, "expires_at": LATER},
        {"scope": "users", "key": "eve", "value": 3, "revision": 7},
        {"scope": "users", "idempotency_key": "first", "answer": "AP8=", "fingerprint": "ZDE=", "time": NOW - 5},
        {"scope": "users", "idempotency_key": "second", "fingerprint": "ZDI=", "time": NOW},
        {"end": True, "scopes": 2, "keys": 3},
    ]


def test_an_export_into_an_empty_store_gives_the_same_store(
    directory: Path, tmp_path: Path, target: FileAdapter
) -> None:
    fill(directory, [USERS, ScopeChange("emptied", 3, {})])
    lines = exported(directory)

    done = import_whole(lines, target)

    assert done == Imported(keys=3, answers=2)
    state = target.load("users")
    assert {key: (row.json, row.revision, row.expires_ms) for key, row in state.entries.items()} == {
        "ada": (b'{"n":1}', 9, None),
        "bob": (b"null", 12, LATER),
        "eve": (b"3", 7, None),
    }
    assert list(state.entries) == ["ada", "bob", "eve"]
    assert state.revision == 12
    assert state.answers == USERS.answers
    assert target.load("emptied").revision == 3
    assert target.due(10) == [(LATER, "users")]
    assert exported(tmp_path / "target") == lines


def test_numbers_that_the_target_may_have_given_are_not_given_again(directory: Path, target: FileAdapter) -> None:
    """In a scope with writes of its own, keys get new numbers behind all of them, and behind those of the export."""
    fill(directory, [USERS])
    target.save([ScopeChange("users", 8, {"bob": Row(b"0", 5, 5), "zed": Row(b"1", 8, 8)})])

    done = import_whole(exported(directory), target)

    assert done.renumbered
    state = target.load("users")
    revisions = {key: row.revision for key, row in state.entries.items()}
    assert revisions == {"bob": 12, "zed": 8, "ada": 9, "eve": 13}
    assert list(state.entries) == ["bob", "zed", "ada", "eve"], "keys keep their places, new ones come behind them"
    assert state.revision == 13


def test_after_an_end_that_was_not_in_order_all_keys_get_new_numbers(directory: Path, tmp_path: Path) -> None:
    fill(directory, [USERS])
    crash(FileAdapter(tmp_path / "target"))
    target = FileAdapter(tmp_path / "target")

    done = import_whole(exported(directory), target)

    assert done.renumbered
    revisions = [row.revision for row in target.load("users").entries.values()]
    assert revisions == [RESERVED + 1, RESERVED + 2, RESERVED + 3]
    assert target.check() == []
    target.close()


def test_an_export_of_format_1_is_read(target: FileAdapter) -> None:
    lines = [
        as_line(scopestate_export=1),
        as_line(scope="users", sequence=12),
        as_line(scope="users", key="a", value=1),
        as_line(scope="users", key="b", value=2),
        as_line(end=True, scopes=1, keys=2),
    ]

    done = import_whole(lines, target)

    assert done == Imported(keys=2)
    state = target.load("users")
    assert {key: row.revision for key, row in state.entries.items()} == {"a": 13, "b": 14}
    assert state.revision == 14


def test_lines_that_were_written_by_hand_are_read(target: FileAdapter) -> None:
    """No scope line, no revisions, equal revisions, or one below the place of its key."""
    lines = [as_line(scope="s", key=key, value=1, **({"revision": number} if number else {})) for key, number in
             [("a", 0), ("b", 5), ("c", 5), ("d", 1), ("e", 0)]]  # fmt: skip

    import_whole(lines, target)

    state = target.load("s")
    assert list(state.entries) == ["a", "b", "c", "d", "e"]
    assert {key: row.revision for key, row in state.entries.items()} == {"a": 1, "b": 5, "c": 5, "d": 1, "e": 6}
    assert [row.created for row in state.entries.values()] == [1, 2, 3, 4, 5]
    assert state.revision == 6


def test_what_has_expired_is_neither_exported_nor_imported(directory: Path, target: FileAdapter) -> None:
    past = NOW - 1
    fill(directory, [ScopeChange("s", 2, {"gone": Row(b"1", 1, 1, past), "there": Row(b"2", 2, 2, LATER)})])
    assert [msgspec.json.decode(line).get("key") for line in exported(directory)] == [None, None, "there", None]
    target.save([ScopeChange("s", 1, {"k": Row(b"0", 1, 1)})])

    done = import_whole([as_line(scope="s", key="k", value=1, expires_at=past)], target)

    assert done == Imported(expired=1)
    assert target.load("s").entries == {"k": Row(b"0", 1, 1)}


def test_the_earliest_deadline_of_a_scope_counts_also_over_several_batches(target: FileAdapter) -> None:
    target.save([ScopeChange("s", 1, {"there": Row(b"0", 1, 1, LATER + 50)}, due_ms=LATER + 50)])
    lines = [as_line(scope="s", key=f"{number}", value=1, expires_at=LATER + number) for number in range(2500)]

    import_whole(lines, target)
    assert target.due(1) == [(LATER, "s")]

    import_whole([as_line(scope="s", key="0", value=1)], target)
    assert target.due(1) == [(LATER, "s")], "earlier than the earliest does no harm"


def test_of_two_answers_for_a_key_the_newer_one_is_kept_and_old_ones_are_not_imported(target: FileAdapter) -> None:
    def line(token: str, answer: bytes, time_ms: int) -> bytes:
        return as_line(scope="s", idempotency_key=token, answer=answer, fingerprint=b"d", time=time_ms)

    kept = {"newer here": Answer(b"d", b"1", NOW), "older here": Answer(b"d", b"2", NOW - 9)}
    target.save([ScopeChange("s", 1, {}, answers=dict(kept))])

    done = import_whole(
        [
            line("newer here", b"x", NOW - 1),
            line("older here", b"y", NOW - 1),
            line("new", b"z", NOW - 1),
            line("old", b"z", NOW - ANSWERS_KEPT_MS),
        ],
        target,
    )

    assert done.answers == 2
    assert {token: answer.answer for token, answer in target.load("s").answers.items()} == {
        "newer here": b"1",
        "older here": b"y",
        "new": b"z",
    }


class Elsewhere:
    """State that gives numbers of its own."""

    def __init__(self) -> None:
        self.written: list[dict[str, dict[str, Entry | None]]] = []

    def scopes(self) -> list[str]:
        return []

    def read(self, scope: str) -> dict[str, Entry]:
        return {}

    def write(self, changes: Mapping[str, Mapping[str, Entry | None]]) -> None:
        self.written.append({scope: dict(values) for scope, values in changes.items()})

    def close(self) -> None:
        pass


def test_where_other_programs_write_deadlines_are_kept_and_the_rest_is_told(directory: Path) -> None:
    fill(directory, [USERS])
    state = Elsewhere()

    done = import_in_steps([*exported(directory)[:-1], as_line(end=True, scopes=1, keys=3)], state)

    assert done == Imported(keys=3, left_out=2, renumbered=True)
    ((scope, values),) = state.written[0].items()
    assert scope == "users"
    assert {key: entry and (entry.json, entry.expires_ms) for key, entry in values.items()} == {
        "ada": (b'{"n":1}', None),
        "bob": (b"null", LATER),
        "eve": (b"3", None),
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"key": "k", "value": 1, "revision": -1},
        {"key": "k", "value": 1, "revision": 2**53},
        {"key": "k", "value": 1, "expires_at": "soon"},
        {"idempotency_key": "i", "answer": "AA=="},
        {"idempotency_key": "", "answer": "AA==", "time": 1},
        {"idempotency_key": "i", "answer": "not base64", "time": 1},
        {"key": "k", "revision": 1},
    ],
)
def test_a_line_that_is_none_is_refused(fields: dict[str, object], target: FileAdapter) -> None:
    with pytest.raises(DeserializationError, match="line 1: "):
        import_whole([as_line(scope="s", **fields)], target)
    assert target.load("s").revision == 0
