"""Numbers never repeat for the life of a store, however a process ends."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from stored import crash

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.persistence import FileAdapter, Row, ScopeChange
from scopestate.persistence.sqlite.schema import RESERVED

RunChild = Callable[..., subprocess.Popen[str]]

WRITE_AND_WAIT = """
import os, sys, threading
from scopestate import Engine
from scopestate.config import from_mapping
kv = {"store_method": "file_based", "file_path": sys.argv[1], "save_interval_ms": 3_600_000}
engine = Engine(from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}))
for scope in ("saved", "new"):
    # In one call: two handlers print at once, and `print` makes a line of several.
    engine.on_change(scope=scope)(lambda event: os.write(1, f"{event.scope} {event.revision}\\n".encode()))
for number in range(3):
    engine.set("saved", f"k{number}", number)
engine.flush()
for number in range(3):
    engine.set("saved", f"k{number}", -number)
    engine.set("new", "k", number)
engine.drain()
print("done", flush=True)
threading.Event().wait()
"""


def seen_until_killed(child: subprocess.Popen[str]) -> list[tuple[str, int]]:
    assert child.stdout is not None
    seen = []
    while (line := child.stdout.readline()) != "done\n":
        scope, number = line.split()
        seen.append((scope, int(number)))
    child.kill()
    child.wait(30)
    return seen


def test_numbers_that_handlers_have_seen_are_not_given_to_other_writes(directory: Path, run_child: RunChild) -> None:
    """With durability `interval`, the writes behind the last save are lost when the process is killed."""
    seen: list[tuple[str, int]] = []
    for _ in range(3):
        seen += seen_until_killed(run_child(WRITE_AND_WAIT, str(directory)))

    assert len(seen) == 3 * 9
    assert len(set(seen)) == len(seen)
    for scope in ("saved", "new"):
        numbers = [number for of, number in seen if of == scope]
        assert numbers == sorted(numbers)


def engine_on(directory: Path) -> Engine:
    kv = {"store_method": "file_based", "file_path": str(directory), "save_interval_ms": 3_600_000}
    adapter = {"name": "kv", "config": kv}
    return Engine(from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}))


def test_after_an_orderly_end_numbers_go_on_without_a_gap(directory: Path) -> None:
    for number in range(1, 4):
        with engine_on(directory) as engine:
            engine.set("s", "k", number)
        store = FileAdapter(directory)
        assert store.load("s").revision == number
        store.close()


def write(store: FileAdapter, scope: str, revision: int) -> None:
    store.save([ScopeChange(scope, revision, {"k": Row(b"1", revision, 1)})])


@pytest.mark.parametrize("ends", [1, 2, 5])
def test_each_end_that_was_not_in_order_skips_what_may_have_been_given(directory: Path, ends: int) -> None:
    store = FileAdapter(directory)
    write(store, "s", 7)
    for _ in range(ends):
        crash(store)
        store = FileAdapter(directory)

    assert store.load("s").revision == 7 + ends * RESERVED
    assert store.load("new").revision == ends * RESERVED
    store.close()


def test_a_number_is_kept_once_it_is_saved_again(directory: Path) -> None:
    store = FileAdapter(directory)
    write(store, "s", 7)
    crash(store)
    store = FileAdapter(directory)
    write(store, "s", 8 + RESERVED)
    assert store.load("s").revision == 8 + RESERVED
    store.close()

    store = FileAdapter(directory)
    assert store.load("s").revision == 8 + RESERVED
    store.close()


def test_what_an_older_database_in_its_place_lacks_is_skipped(directory: Path, run_child: RunChild) -> None:
    """A backup is put back while the note of a later commit is still there."""
    store = FileAdapter(directory)
    write(store, "s", 5)
    store.close()
    backup = (directory / "state.db").read_bytes()
    child = run_child(
        "import os, sys\n"
        "from scopestate.persistence import Row, FileAdapter, ScopeChange\n"
        "store = FileAdapter(sys.argv[1])\n"
        "store.save([ScopeChange('s', 9, {'k': Row(b'2', 9, 1)})])\n"
        "os._exit(0)\n",
        str(directory),
    )
    assert child.wait(30) == 0
    for suffix in ("", "-wal", "-shm"):
        (directory / f"state.db{suffix}").unlink()
    (directory / "state.db").write_bytes(backup)

    store = FileAdapter(directory)

    assert store.problem() is not None
    assert store.load("s").revision == 5 + RESERVED
    store.close()
