"""What SIGKILL leaves of durable triggers: each row of the table in docs/reference/durable-triggers.md."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import child_durable

CHILD = Path(child_durable.__file__)
ROOT = CHILD.parents[2]

Noted = list[tuple[int, int, str]]


@pytest.fixture(params=["commit", "interval"])
def durability(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Killed:
    """A store after its process was killed at some point."""

    def __init__(self, directory: Path, durability: str, where: str) -> None:
        self.path, self.notes = str(directory / "store"), directory / "notes"
        self.durability = durability
        done = subprocess.run(
            [sys.executable, str(CHILD), self.path, durability, where, str(self.notes)],
            cwd=ROOT,
            timeout=60,
            capture_output=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        self.committed = done.stdout == b"committed\n"
        self.before = self.noted()

    def noted(self) -> Noted:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [(int(value), int(attempt), name) for value, attempt, name in (line.split() for line in lines)]

    def restarted(self, how: str = "") -> tuple[Noted, object, int]:
        """Open it again, and deliver. Returns what was handled since, the counter and the number of dead letters."""
        engine = child_durable.open_engine(self.path, self.durability)
        try:
            child_durable.register(engine, str(self.notes), how)
            if "ship" in [status.name for status in engine.consumers()]:
                engine.consumers().resume("ship")
            engine.drain(60)
            return self.noted()[len(self.before) :], engine.get("totals", "n"), engine.dead_letters().count()
        finally:
            engine.close()


def test_before_the_commit_there_is_neither_the_write_nor_a_delivery(tmp_path: Path, durability: str) -> None:
    killed = Killed(tmp_path, durability, "before the commit")

    assert not killed.committed
    assert killed.before == []
    after, _, _ = killed.restarted()
    assert after == []


def test_after_the_commit_it_is_delivered_after_the_restart(tmp_path: Path, durability: str) -> None:
    killed = Killed(tmp_path, durability, "before the handler")

    assert killed.before == []
    after, _, _ = killed.restarted()
    assert [entry[:2] for entry in after] == [(1, 1)]


def test_in_the_handler_the_attempt_counts(tmp_path: Path, durability: str) -> None:
    killed = Killed(tmp_path, durability, "in the handler")

    ((value, attempt, name),) = killed.before
    after, _, _ = killed.restarted()
    assert (value, attempt) == (1, 1)
    assert after == [(1, 2, name)]


def test_after_the_handler_and_before_its_acknowledgement_it_is_delivered_again(
    tmp_path: Path, durability: str
) -> None:
    """As taskiq-redis 130, where a worker that died there left a task that no other one took."""
    killed = Killed(tmp_path, durability, "before the acknowledgement")

    (first,) = killed.before
    after, _, _ = killed.restarted()
    assert after == [(1, 2, first[2])]


@pytest.mark.parametrize(
    "where",
    ["in the transaction", "before the transaction is saved", "after the transaction is saved"],
)
def test_a_transaction_happens_exactly_once(tmp_path: Path, durability: str, where: str) -> None:
    killed = Killed(tmp_path, durability, where)

    assert [entry[:2] for entry in killed.before] == [(1, 1)]
    after, count, _ = killed.restarted("count")
    assert count == 1
    assert [entry[:2] for entry in after] == ([] if where.startswith("after") else [(1, 2)])
    # Nor does it happen once more at a later start.
    killed.before = killed.noted()
    assert killed.restarted("count")[:2] == ([], 1)


@pytest.mark.parametrize("where", ["within the replay of letters", "after the replay of letters"])
def test_a_replay_happens_whole_or_not_at_all(tmp_path: Path, durability: str, where: str) -> None:
    killed = Killed(tmp_path, durability, where)

    assert [entry[0] for entry in killed.before] == [1, 2]
    after, _, letters = killed.restarted()
    if where.startswith("within"):
        assert (after, letters) == ([], 2)
    else:
        assert (sorted(entry[:2] for entry in after), letters) == ([(1, 1), (2, 1)], 0)


@pytest.mark.parametrize("where", ["within the purge of letters", "after the purge of letters"])
def test_a_purge_happens_whole_or_not_at_all(tmp_path: Path, durability: str, where: str) -> None:
    killed = Killed(tmp_path, durability, where)

    after, _, letters = killed.restarted()
    assert after == []
    assert letters == (2 if where.startswith("within") else 0)


def test_a_killed_process_holds_no_key_for_ever(tmp_path: Path) -> None:
    """As Procrastinate, where a killed worker held its lock: later events of the key follow after the restart."""
    killed = Killed(tmp_path, "commit", "in the handler")
    engine = child_durable.open_engine(killed.path, "commit")
    engine.set("orders", "a", 2)
    engine.close()

    after, _, _ = killed.restarted()
    assert [entry[:2] for entry in after] == [(1, 2), (2, 1)]
