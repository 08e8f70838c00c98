"""The journal of a file store: it reads what was saved, keeps what is needed, and does all of a change or nothing."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Protocol

import pytest
from forking import beside_threads
from stored import crash

from scopestate.actors.journal import ConsumerChange, History, Letter, Pending, Rules
from scopestate.errors import StorageError, UnsavableValue
from scopestate.ops.results import StateEvent
from scopestate.persistence import FileAdapter, Row, ScopeChange
from scopestate.persistence.sqlite import changes, rows
from scopestate.persistence.sqlite.database import connect
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.persistence.sqlite.schema import RESERVED

Open = Callable[..., FileAdapter]


class Faults(Protocol):
    """The `faults` fixture of conftest.py."""

    def connect(self, uri: str) -> sqlite3.Connection: ...
    def fail_at(self, number: int, fault: BaseException) -> None: ...
    def heal(self) -> None: ...


def event(scope: str, number: int, value: bytes = b"1", key: str = "k") -> StateEvent:
    """The change of a scope that has the same revision and position."""
    return StateEvent("state:updated", scope, key, value, value, number, 0, None, None, number, 1000, number)


def save(
    adapter: FileAdapter,
    events: Iterable[StateEvent],
    consumers: Sequence[ConsumerChange] = (),
    acks: Sequence[tuple[int, int]] = (),
) -> None:
    """Save changes of scopes that are journaled from their beginning."""
    logs: dict[str, list[StateEvent]] = {}
    for one in events:
        logs.setdefault(one.scope, []).append(one)
    batch = [
        ScopeChange(
            scope,
            log[-1].revision,
            {"k": Row(log[-1].new_json or b"0", log[-1].revision, 1)},
            log=log,
            logged_since=0,
            acks=acks,
        )
        for scope, log in logs.items()
    ]
    last = max([adapter.journal.given, *(one.position for log in logs.values() for one in log)])
    adapter.journal.given = adapter.journal.settled = last
    adapter.save(batch, consumers)


def positions(adapter: FileAdapter) -> list[int]:
    return [one.position for one in adapter.journal.read(0, most=10**6, most_bytes=10**9)]


def keep(adapter: FileAdapter, consumers: Sequence[int] = (), history: History | None = None) -> None:
    adapter.journal.rules = Rules(lambda scope: history, lambda scope: consumers)


# -------------------------------------------------------------------------------------------------------------- reading


def test_pages_are_bounded_in_events_and_bytes_and_a_page_has_at_least_one(open_file: Open) -> None:
    adapter = open_file()
    journal = adapter.journal
    large = b'"' + b"x" * 5000 + b'"'
    save(adapter, [event("s", 1), event("s", 2, large), event("t", 3, large), event("s", 4)])

    assert [one.position for one in journal.read(1, most=2)] == [2, 3]
    assert [one.position for one in journal.read(0, most_bytes=11_000)] == [1, 2]
    assert [one.position for one in journal.read(1, most_bytes=1)] == [2]
    assert [one.position for one in journal.read(0, 3)] == [1, 2, 3]
    assert [one.position for one in journal.read_scope("s", 1)] == [2, 4]
    assert [one.position for one in journal.read_scope("s", 0, 2)] == [1, 2]
    assert journal.read_scope("none", 0) == []
    assert [one.position for one in journal.read_at([4, 2, 9, 2])] == [2, 4]
    assert journal.read(4) == []
    assert journal.count_behind(1) == 3
    assert journal.oldest("t") == (3, 3)
    assert journal.oldest("none") is None


def test_more_events_than_a_page_and_events_larger_than_one_are_read_whole(
    open_file: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "PAGE_LIMIT", 200_000)
    monkeypatch.setattr("scopestate.persistence.sqlite.adapter.PAGE_LIMIT", 200_000)
    adapter = open_file()
    huge = b'"' + b"y" * 300_000 + b'"'
    events = [event("st"[number % 2], number, b"[%d]" % number) for number in range(1, 2501)]
    events[1234] = event("s", 1235, huge)

    save(adapter, events)

    found = adapter.journal.read(0, most=10**6, most_bytes=10**9)
    assert [(one.position, one.new_json) for one in found] == [(one.position, one.new_json) for one in events]


@pytest.mark.parametrize(
    "damage", ["old = '1,2'", "new = '{'", "key = CAST(x'ff' AS TEXT)", "kind = 9", "revision = 'x'"]
)
def test_a_damaged_row_is_named(open_file: Open, directory: Path, damage: str) -> None:
    adapter = open_file()
    save(adapter, [event("s", 1), event("s", 2), event("s", 3)])
    adapter.close()
    with sqlite3.connect(directory / "state.db") as tool:
        tool.execute(f"UPDATE journal SET {damage} WHERE position = 2")
    tool.close()
    adapter = open_file()

    with pytest.raises(StorageError, match="position 2 of the journal is damaged"):
        adapter.journal.read(0)
    assert (adapter.check() != []) == ("key" not in damage)
    with sqlite3.connect(directory / "state.db") as tool:
        tool.execute("DELETE FROM journal WHERE position = 2")
        tool.execute("UPDATE scopes SET events = 2, bytes = (SELECT sum(size) FROM journal)")
    tool.close()
    assert adapter.check() == []


def test_a_change_that_no_row_can_hold_names_its_key(open_file: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "ROOM_FOR_TEXTS", 0)
    monkeypatch.setattr(rows, "ROOM_FOR_TEXTS", 999_990_000)
    adapter = open_file()

    with pytest.raises(UnsavableValue, match="row of the journal can hold") as caught:
        save(adapter, [event("s", 1), event("t", 2, b'"' + b"x" * 9000 + b'"', "large")])

    assert (caught.value.scope, caught.value.key) == ("t", "large")
    assert positions(adapter) == []


# ------------------------------------------------------------------------------------------------------------- trimming


def test_what_every_consumer_has_done_with_is_removed_and_nothing_else(open_file: Open) -> None:
    adapter = open_file()
    journal = adapter.journal
    slow, quick = [journal.create_consumer(name, "", 0, 0).number for name in ("slow", "quick")]
    wants = {"both": [slow, quick], "quick": [quick]}
    journal.rules = Rules(lambda scope: None, lambda scope: wants.get(scope, []))
    save(adapter, [event(["both", "quick"][number % 2], number) for number in range(1, 101)])

    save(adapter, [], [ConsumerChange(quick, done=100), ConsumerChange(slow, done=50, pending=[Pending(20, 1)])])

    assert positions(adapter) == [20, *range(52, 101, 2)]
    assert journal.gone_in_scope("both", 49) == "trimmed"
    assert journal.gone_in_scope("both", 50) is None
    save(adapter, [], [ConsumerChange(slow, done=100, acked=[20])])
    assert positions(adapter) == []
    assert adapter.check() == []


def test_a_consumer_that_is_forgotten_needs_nothing(open_file: Open) -> None:
    adapter = open_file()
    consumer = adapter.journal.create_consumer("c", "", 0, 0).number
    keep(adapter, [consumer])
    save(adapter, [event("s", number) for number in range(1, 11)])

    adapter.journal.forget_consumer(consumer)
    save(adapter, [], [ConsumerChange(consumer, done=5, pending=[Pending(3)])])
    keep(adapter)
    adapter.journal.trim()

    assert positions(adapter) == []
    assert adapter.journal.consumers() == []
    assert adapter.check() == []


def test_a_history_is_bounded_in_events_bytes_and_age(open_file: Open) -> None:
    adapter = open_file()
    for number in range(1, 401):
        one = event(["few", "small", "young"][number % 3], number)
        one.time_ms = number * 1000
        save(adapter, [one])
    limits = {"few": History(events=10), "small": History(bytes=670), "young": History(age_ms=9000)}
    adapter.journal.rules = Rules(limits.get, lambda scope: [])
    adapter.clock_ms = 400_000

    adapter.journal.trim()

    assert len(adapter.journal.read_scope("few", 0)) == 10
    assert len(adapter.journal.read_scope("small", 0)) == 10
    assert [one.position for one in adapter.journal.read_scope("young", 0)] == [392, 395, 398]
    adapter.clock_ms += 2000
    save(adapter, [event("few", number) for number in range(401, 421)])
    assert len(adapter.journal.read_scope("few", 0)) == 10
    assert [one.position for one in adapter.journal.read_scope("young", 0)] == [395, 398]
    assert adapter.check() == []


def test_a_history_keeps_what_a_consumer_has_not_done_with(open_file: Open) -> None:
    adapter = open_file()
    consumer = adapter.journal.create_consumer("c", "", 0, 0).number
    keep(adapter, [consumer], History(events=3))

    save(adapter, [event("s", number) for number in range(1, 31)], [ConsumerChange(consumer, done=10)])
    assert positions(adapter) == [*range(11, 31)]
    save(adapter, [event("s", 31)], [ConsumerChange(consumer, done=30)])
    assert positions(adapter) == [29, 30, 31]


def test_much_is_removed_in_pieces_and_a_save_removes_more_than_it_adds(open_file: Open) -> None:
    adapter = open_file()
    consumer = adapter.journal.create_consumer("c", "", 0, 0).number
    keep(adapter, [consumer])
    save(adapter, [event("s", number) for number in range(1, 60_001)])

    save(adapter, [event("s", 60_001)], [ConsumerChange(consumer, done=60_000)])

    left = adapter.journal.size().events
    assert 55_000 < left < 60_000
    assert adapter.journal.behind
    for _ in range(10):
        adapter.journal.trim()
    assert not adapter.journal.behind
    assert positions(adapter) == [60_001]


def test_with_24_consumers_the_file_does_not_grow_with_what_was_written(open_file: Open) -> None:
    """One of them fails at each hundredth event; the slowest is ten saves late."""
    adapter = open_file()
    journal = adapter.journal
    numbers = [journal.create_consumer(f"c{number}", "", 0, 0).number for number in range(24)]
    keep(adapter, numbers)
    value = b'"' + b"x" * 100 + b'"'
    sizes = []
    for turn in range(60):
        first = turn * 200
        done = [ConsumerChange(number, done=max(first - 200 * (number % 10), 0)) for number in numbers]
        done[0].pending = [Pending(first - at, 1, 1, 1, "boo") for at in (100, 200) if first]
        done[0].acked = [first - at for at in (900, 1000) if first >= 1000]
        save(adapter, [event(f"s{number % 16}", number, value) for number in range(first + 1, first + 201)], done)
        sizes.append(adapter.size_bytes())

    assert journal.size().events <= 200 * 11
    assert max(sizes[-20:]) <= max(sizes[15:35]) * 1.1
    assert adapter.check() == []


# ---------------------------------------------------------------------------------------------------------- all or none


def complete(adapter: FileAdapter, number: int) -> None:
    """A save of everything at once: two scopes, a consumer's progress, a dead letter, and trimming."""
    journal = adapter.journal
    (consumer,) = [one.number for one in journal.consumers()]
    keep(adapter, [consumer])
    change = ConsumerChange(
        consumer,
        done=number,
        acked=[1],
        pending=[Pending(2, 1, 1, 1, "boo")],
        letters=[Letter(0, consumer, event("s", 3), 1, 1, 1, "err")],
    )
    save(adapter, [event("s", number + 1), event("t", number + 2)], [change], [(consumer, number + 1)])


def seen(adapter: FileAdapter) -> tuple[object, ...]:
    """Everything that the journal says."""
    journal = adapter.journal
    letters = [(one.id, one.event.position) for one in journal.letters()]
    state = [adapter.load(scope).values for scope in ("s", "t")]
    return positions(adapter), repr(journal.consumers()), letters, state, journal.gone_in_scope("s", 1)


def test_after_a_fault_at_any_statement_of_a_save_nothing_of_it_is_there(
    directory: Path, faults: Faults, io_error: sqlite3.Error
) -> None:
    adapter = FileAdapter(directory, connect=faults.connect)
    adapter.journal.create_consumer("c", "", 0, 0)
    save(adapter, [event("s", number) for number in range(1, 6)])
    before = seen(adapter)

    for number in count(1):
        faults.fail_at(number, io_error)
        try:
            complete(adapter, 5)
            break
        except StorageError:
            faults.heal()
            assert seen(adapter) == before
            assert adapter.check() == []
    faults.heal()

    assert number > 12
    assert positions(adapter) == [2, 6, 7]
    (saved,) = adapter.journal.consumers()
    assert (saved.done, saved.acked, [*saved.pending], saved.dead) == (5, {6}, [2], 1)
    assert adapter.check() == []
    adapter.close()


def test_with_a_full_disk_a_save_fails_and_works_again_when_there_is_room(open_file: Open) -> None:
    def limited(uri: str) -> sqlite3.Connection:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        opened.append(connection)
        return connection

    opened: list[sqlite3.Connection] = []
    adapter = open_file(connect=limited)
    consumer = adapter.journal.create_consumer("c", "", 0, 0).number
    keep(adapter, [consumer])
    for connection in opened:
        connection.execute("PRAGMA max_page_count = 60")
    saved = 0
    with pytest.raises(StorageError, match="the disk is full"):
        for number in range(1, 1000):
            save(adapter, [event("s", number, b'"' + b"x" * 500 + b'"')])
            saved = number
    assert positions(adapter) == [*range(1, saved + 1)]
    assert adapter.check() == []

    save(adapter, [], [ConsumerChange(consumer, done=saved)])  # makes room

    save(adapter, [event("s", saved + 1)])
    assert positions(adapter) == [saved + 1]


def act(adapter: FileAdapter, doing: str) -> None:
    match doing:
        case "save":
            complete(adapter, 5)
        case "replay":
            adapter.journal.replay(None)
        case "purge":
            adapter.journal.purge(None)
        case "skip":
            adapter.journal.skip(1, adapter.journal.oldest_of(1, 100, 2), "full; 2 lost")
        case _:
            adapter.journal.forget_consumer(1)


def steps_of(place: Path, doing: str, kill_at: int = 0) -> int:
    """Do it, and return how many steps SQLite takes. `kill_at`: at that step this process is killed."""
    steps = -(10**9)

    def step() -> int:
        nonlocal steps
        steps += 1
        if steps == kill_at and kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def stepwise(uri: str) -> sqlite3.Connection:
        connection = connect(uri)
        connection.set_progress_handler(step, 25)
        return connection

    adapter = FileAdapter(place, connect=stepwise)
    keep(adapter, [1])
    steps = 0
    act(adapter, doing)
    found = steps
    adapter.close()
    return found


@pytest.mark.parametrize("doing", ["save", "replay", "purge", "forget", "skip"])
def test_killed_at_any_step_all_of_it_is_there_or_nothing(tmp_path: Path, doing: str) -> None:
    def prepare(name: str) -> Path:
        adapter = FileAdapter(tmp_path / name)
        consumer = adapter.journal.create_consumer("c", "", 0, 0).number
        letters = [Letter(0, consumer, event("s", number), 3, 1, 1, "err") for number in (4, 5)]
        save(adapter, [event("s", number) for number in range(1, 6)])
        if doing != "save":
            keep(adapter, [consumer])
            save(adapter, [], [ConsumerChange(consumer, done=3, letters=letters)])
        adapter.close()
        return tmp_path / name

    def found(place: Path) -> str:
        adapter = FileAdapter(place)
        try:
            assert adapter.check() == []
            return repr(seen(adapter))
        finally:
            adapter.close()

    before, done = found(prepare("before")), prepare("done")
    steps = steps_of(done, doing)
    after = found(done)
    assert before != after
    outcomes = set()
    for moment in range(1, steps + 1, max(1, steps // 12)):
        place = prepare(f"at-{moment}")
        with beside_threads():
            child = os.fork()
        if not child:
            steps_of(place, doing, moment)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        outcomes.add(found(place))

    assert before in outcomes
    assert outcomes <= {before, after}


# --------------------------------------------------------------------------------------------------------------- epochs


def test_cursors_of_an_epoch_are_good_up_to_what_it_has_saved(open_file: Open) -> None:
    adapter = open_file()
    save(adapter, [event("s", 1), event("s", 2)])
    crash(adapter)

    adapter = open_file()

    journal = adapter.journal
    assert (journal.epoch, journal.first) == (1, 3 + 2**32)
    assert journal.gone(0, 2, scope="s") is None
    assert journal.gone(0, 3, scope="s") == "lost in a crash"
    assert journal.gone(7, 1) == "lost in a crash"
    assert journal.gone_in_scope("s", 2) is None
    assert journal.gone_in_scope("s", 3) == "lost in a crash"
    assert journal.gone_in_scope("s", 2 + RESERVED) is None
    assert journal.gone_in_scope("never", 3) == "lost in a crash"
    assert journal.gone_in_scope("never", 0) is None


def test_what_a_tool_saves_between_two_sessions_is_not_passed_over(open_file: Open) -> None:
    adapter = open_file()
    save(adapter, [event("s", 1), event("t", 2)])
    adapter.close()
    adapter = open_file()
    adapter.save_whole([ScopeChange("s", 2, {})])
    adapter.close()

    journal = open_file().journal

    assert journal.gone_in_scope("s", 1) == "trimmed"
    assert journal.gone(0, 2) == "trimmed"
    assert journal.gone(0, 2, scope="t") is None


def test_a_scope_that_was_not_logged_for_a_while_says_so(open_file: Open) -> None:
    adapter = open_file()
    journal = adapter.journal
    save(adapter, [event("s", 1), event("t", 2)])
    journal.given = journal.settled = 3
    adapter.save([ScopeChange("s", 2, {})])

    assert journal.gone_in_scope("s", 1) == "trimmed"
    assert journal.gone(0, 2) == "trimmed"
    assert journal.gone(0, 2, prefix="t") is None
    assert journal.gone(0, 2, scope="t") is None
    assert journal.gone_in_scope("s", 2) is None
    assert journal.gone(0, 3) is None


# ------------------------------------------------------------------------------------------------------------- attempts


def begun(adapter: FileAdapter) -> dict[int, int]:
    (consumer,) = adapter.journal.consumers()
    return consumer.begun


def prepared(open_file: Open) -> FileAdapter:
    adapter = open_file()
    adapter.journal.create_consumer("c", "", 0, 0)
    save(adapter, [event("s", number) for number in range(1, 6)])
    return adapter


def test_attempts_that_had_begun_count_after_a_kill(open_file: Open) -> None:
    adapter = prepared(open_file)
    adapter.journal.note_attempts([(1, 1, 1), (1, 2, 1), (1, 3, 1), (1, 4, 2)])
    adapter.journal.note_attempts([(1, 3, 2)])
    save(adapter, [], [ConsumerChange(1, done=1, acked=[1], pending=[Pending(2, 1), Pending(4, 1)])])
    crash(adapter)

    adapter = open_file()

    assert begun(adapter) == {3: 2, 4: 2}
    assert adapter.check() == []


def test_the_file_is_gone_after_a_close_in_which_nothing_was_open(open_file: Open, directory: Path) -> None:
    adapter = prepared(open_file)
    adapter.journal.note_attempts([(1, 1, 1)])
    save(adapter, [], [ConsumerChange(1, done=1)])
    adapter.close()
    assert (directory / "state.attempts").exists()  # `done` alone says nothing about the attempt
    adapter = open_file()
    assert begun(adapter) == {}
    save(adapter, [], [ConsumerChange(1, acked=[1])])
    adapter.close()

    assert sorted(path.name for path in directory.iterdir()) == ["state.db", "state.lock"]


def test_a_replay_resets_what_was_noted_of_attempts(open_file: Open) -> None:
    adapter = prepared(open_file)
    adapter.journal.note_attempts([(1, 2, 10)])
    save(adapter, [], [ConsumerChange(1, done=2, letters=[Letter(0, 1, event("s", 2), 10, 1, 1, "err")])])

    adapter.journal.replay(None)
    crash(adapter)

    adapter = open_file()
    assert begun(adapter) == {}
    assert adapter.journal.consumers()[0].pending == {2: Pending(2)}


@pytest.mark.parametrize("damage", ["torn", "turned", "grown", "link", "missing", "other store"])
def test_a_damaged_file_of_attempts_stops_nothing(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    adapter = prepared(open_file)
    adapter.journal.note_attempts([(1, 1, 1), (1, 2, 1), (1, 3, 1)])
    crash(adapter)
    path = directory / "state.attempts"
    content = path.read_bytes()
    assert len(content) == 72
    path.unlink()
    match damage:
        case "torn":
            path.write_bytes(content[:60])
        case "turned":
            path.write_bytes(content[:30] + b"\xff" + content[31:])
        case "grown":
            path.write_bytes(content + b"\0" * 100)
        case "link":
            path.symlink_to(directory / "elsewhere")
        case "other store":
            path.write_bytes(content)
            (directory / "state.db").unlink()
    if damage == "other store":
        (directory / "state.lock").unlink()
        adapter = prepared(open_file)
    else:
        adapter = open_file()

    expected = {"torn": {1: 1, 2: 1}, "turned": {1: 1, 3: 1}, "grown": {1: 1, 2: 1, 3: 1}}
    assert begun(adapter) == expected.get(damage, {})
    adapter.journal.note_attempts([(1, 5, 1)])
    assert ("attempts" in caplog.text) == (damage in ("turned", "grown", "link", "other store"))
    assert not (directory / "elsewhere").exists()
    crash(adapter)
    found = begun(open_file())
    assert found == {**expected.get(damage, {}), **({} if damage == "link" else {5: 1})}


def test_a_file_that_has_grown_is_written_anew(
    open_file: Open, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.persistence.sqlite.attempts._REWRITE_BYTES", 2400)
    adapter = prepared(open_file)
    sizes = []
    for turn in range(50):
        adapter.journal.note_attempts([(1, 2, turn + 1), *[(1, 1000 * turn + at + 10, 1) for at in range(10)]])
        save(adapter, [], [ConsumerChange(1, acked=[1000 * turn + at + 10 for at in range(10)])])
        sizes.append((directory / "state.attempts").stat().st_size)
    crash(adapter)

    assert max(sizes) < 3000
    assert begun(open_file()) == {2: 50}


def test_a_full_disk_is_reported_once_and_half_a_record_taken_back(
    open_file: Open, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = prepared(open_file)
    adapter.journal.note_attempts([(1, 1, 1)])
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
    caplog.set_level(logging.WARNING)

    adapter.journal.note_attempts([(1, 2, 1)])
    adapter.journal.note_attempts([(1, 3, 1)])

    assert caplog.text.count("cannot be recorded") == 1
    monkeypatch.undo()
    adapter.journal.note_attempts([(1, 4, 1)])
    crash(adapter)
    assert begun(open_file()) == {1: 1, 4: 1}


def test_tools_see_a_store_with_a_journal_as_sound(open_file: Open, directory: Path) -> None:
    adapter = prepared(open_file)
    adapter.journal.note_attempts([(1, 1, 1)])

    with StoreReader(directory) as reader:
        assert reader.problems() == []
        assert reader.is_own_file(str(directory / "state.attempts"))
