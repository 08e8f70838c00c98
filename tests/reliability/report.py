"""Writes docs/explanation/reliability.md from the figures that the last run of the tests left: `make reliability`.

Each row names the fault, the promise, and the tests that show it; a test checks that every named test exists.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final, NamedTuple

from tests.reliability import figures

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "explanation" / "reliability.md"


class Row(NamedTuple):
    """One fault."""

    fault: str
    promise: str
    tests: tuple[str, ...]
    """Paths below tests/, each a file or `file::test`."""
    figures: tuple[str, ...] = ()
    """Names under which the tests record their figures; a `*` at the end stands for any rest."""


ROWS: Final = (
    Row(
        "The process is killed (SIGKILL)",
        "`commit`: every acknowledged write is there, and no event of a lost write was delivered. `interval`: exactly "
        "a prefix of each scope's history, at most `save_interval_ms` and the duration of the save old. The store "
        "opens.",
        (
            "reliability/test_crash.py::test_kills_under_load_lose_nothing_that_was_promised",
            "persistence/test_file_crash.py",
        ),
        ("SIGKILL under load",),
    ),
    Row(
        "The process is killed in the middle of transactions",
        "Each transaction is there as a whole, with its deadlines and its kept answer, or not at all. Repeated with "
        "its idempotency key it gets the first answer, or is done once. No revision is given twice, and what was told "
        "to have expired does not come back.",
        (
            "reliability/test_crash_transactions.py",
            "persistence/test_file_crash.py",
            "persistence/test_numbers.py",
        ),
        ("SIGKILL with transactions",),
    ),
    Row(
        "The process is killed with durable triggers at work",
        "Every committed event is handled at least once, in order for its key, and none that was not committed. An "
        "attempt that was cut off counts; a delivery keeps its id. What `delivery.transaction` writes is there exactly "
        "once. A replay or purge of dead letters is done for all of them, or for none.",
        ("durable/test_kills.py", "durable/test_checker.py"),
        ("SIGKILL with durable triggers: commit", "SIGKILL with durable triggers: interval"),
    ),
    Row(
        "Engines and the server are killed with durable triggers over Redis",
        "The same, if the server keeps what it has acknowledged.",
        ("redis/test_durable_kills.py",),
        ("SIGKILL with durable triggers: Redis",),
    ),
    Row(
        "Any order of writes, saves, trims, crashes and restarts beside watches and durable triggers",
        "A watch tells each change once, in order, transactions as a whole, without a gap; it goes on from its cursor, "
        "also after a restart, or is told `Compacted` with the reason. Durable triggers as above.",
        ("durable/test_simulation.py", "durable/test_checker.py"),
        ("simulation of watches*",),
    ),
    Row(
        "Many durable triggers beside many writers",
        "Each comes to its end; memory and the database do not grow on.",
        ("load/test_consumers.py",),
        ("24 consumers*",),
    ),
    Row(
        "Another program reads the files while transactions run",
        "It sees each save as a whole, and with it whole transactions; so does an export.",
        ("persistence/test_whole_transactions.py", "cli/test_export_and_import.py"),
    ),
    Row(
        "A store of an earlier version is opened; the process is killed while it is migrated",
        "Either the old database is there, unchanged, or the new one with the same content.",
        ("persistence/test_migration.py",),
    ),
    Row(
        "SIGTERM, SIGINT, exit without close",
        "Nothing acknowledged is lost; events are delivered or reported within `close_grace_ms`; the process ends with "
        "the signal's status.",
        ("reliability/test_shutdown.py",),
        ("SIGTERM under load*",),
    ),
    Row(
        "`close()` twice, from a handler, beside 16 writers, with a hung handler",
        "Each write is on disk or was refused with EngineClosed; close ends within its grace time.",
        ("reliability/test_closing.py", "engine/test_close.py"),
    ),
    Row(
        "The disk is full, read-only, limited, or fails",
        "`commit`: the call fails with its code, and memory, disk and events agree. `interval`: the data stays queued, "
        "`health()` says why, saving resumes by itself.",
        ("faults/test_disk_faults.py", "persistence/test_file_faults.py"),
    ),
    Row(
        "The directory is removed while the engine runs",
        "Calls that need the disk fail clearly; once the directory is back, the whole content is.",
        (
            "persistence/test_file_faults.py::test_a_removed_directory_that_is_made_again_gets_all_its_content_back",
            "faults/test_disk_faults.py",
        ),
    ),
    Row(
        "The database is damaged, foreign or newer",
        "Set aside under a new name or left alone, named in the error, never overwritten.",
        ("persistence/test_file_opening.py", "hostile/test_stores.py"),
        ("mutated databases",),
    ),
    Row(
        "A second process opens the store",
        "Refused with the holder's process, host, command and time; a killed holder does not block the next.",
        ("persistence/test_file_lock.py",),
    ),
    Row(
        "Several processes share a directory; the one that owns it is killed, closed or stopped, again and again, and "
        "so are the others",
        "Nothing acknowledged is lost. Each history is linearizable; a call of unknown outcome has happened before the "
        "next owner began, or not at all. Each idempotency key counts once. No transaction is seen in part. "
        "`interval` loses at most its interval. Durable triggers as above, once for all processes. Watches and "
        "plain triggers tell each change once, in order, without a gap. An owner that closes fails no call.",
        ("sharing/test_proof.py", "sharing/test_checks.py"),
        ("processes on one directory",),
    ),
    Row(
        "Sixteen processes open a directory at once; owners die while others connect; a killed one has left its socket",
        "One of them owns the directory, and every process is served.",
        ("sharing/test_starting.py",),
        ("processes that begin at once", "owners that die while others connect"),
    ),
    Row(
        "The disk of an owner is full, or fails; an owner is stopped",
        "A follower is told what the owner's disk says, and goes on when it works, or when another process has taken "
        "over. No process takes the directory from a stopped owner: a call times out, and the error names it.",
        ("sharing/test_disk_of_the_owner.py", "sharing/test_hand_over.py"),
    ),
    Row(
        "KeyboardInterrupt, exceptions from signal handlers",
        "A write has wholly happened, with its event, or not at all; no message is stuck.",
        ("reliability/test_interruption.py",),
        ("interrupted at each opcode*", "signals at random*", "exceptions put into threads*"),
    ),
    Row(
        "A task is cancelled, a call times out, a thread dies",
        "The scope goes on; the error says whether the write may still apply.",
        ("reliability/test_cancellation.py", "reliability/test_callers.py"),
        ("tasks cancelled*",),
    ),
    Row(
        "The process forks",
        "The child is refused, the parent and its store are unharmed.",
        ("reliability/test_fork.py",),
        ("fork under load*",),
    ),
    Row(
        "Any order of turns, saves, crashes, faults and reloads",
        "All of the above and the order of events, checked after every step against a model.",
        ("simulation/test_simulation.py",),
        ("simulation*",),
    ),
    Row(
        "Any order of calls, answers, lost and late answers, timeouts and rivals on Redis",
        "Linearizable for each key, every write sent once, every call ends, events once and in order, nothing left "
        "over. The hand-over of a connection: in each order that there is.",
        ("simulation/test_redis_simulation.py", "redis/test_owner_model.py", "redis/test_played_server.py"),
        ("engines on a played Redis*",),
    ),
    Row(
        "Threads and tasks race on the same keys",
        "Every history is linearizable, on every adapter.",
        ("linearizability/test_histories.py", "linearizability/test_checker.py", "bridge/test_linearizability.py"),
        ("linearizability",),
    ),
    Row(
        "An engine is killed that shares a Redis with others",
        "Each write that it acknowledged is there, of those under way all or nothing; the others go on. "
        "The durable deliveries that it held go to another engine.",
        (
            "redis/test_crashes.py::test_a_killed_process_loses_nothing_acknowledged_leaves_nothing_half_and_others_go_on",
            "redis/test_durable.py",
        ),
        ("Redis: engines killed",),
    ),
    Row(
        "Redis is killed, stopped, full, read-only, busy or emptied; connections break",
        "A call is done, or fails in time, and the error says whether it may have been applied: then it is not sent "
        "again. The engine connects again by itself. What Redis had saved is there.",
        ("redis/test_crashes.py", "redis/test_faults.py", "redis/test_callers.py"),
        ("Redis: servers killed*",),
    ),
    Row(
        "A Redis fails over, or slots of a cluster move",
        "Engines follow. Writes that Redis had not replicated are gone; shared events report the gap.",
        ("redis/test_sentinel.py", "redis/test_cluster.py", "redis/test_shared_events.py"),
    ),
    Row(
        "A reader of shared events is away, or their stream is trimmed or flushed",
        "Each event once for each engine, in order; what is missing is counted, logged and in `health()`.",
        ("redis/test_shared_events.py", "redis/test_durable.py"),
    ),
    Row(
        "Processes race on the same keys in Redis",
        "Every history is linearizable, and each increment counts once.",
        ("redis/test_linearizable.py",),
        ("Redis: processes race*",),
    ),
    Row(
        "Slow, hung and looping handlers; more load than fits",
        "Memory is bounded; what is dropped or refused is counted and reported.",
        ("load/test_limits.py", "load/test_sizes.py"),
        ("load: *",),
    ),
    Row(
        "Hostile input: calls, names, values, files",
        "An error of our tree, and no half-applied write.",
        ("hostile/test_calls.py", "config/test_hostile_text.py"),
        ("hostile input",),
    ),
)


LIMITS: Final = """\
## What is not promised

- Events of triggers without `durable` live in memory: a crash loses those that no handler has seen yet. None is
  delivered before its `commit` write is on disk.
- A durable trigger handles each event at least once, and more often after a crash: only what its handler writes by
  `delivery.transaction` counts exactly once.
- SIGKILL shows the order of commit, answer and event. That a commit survives a power cut rests on SQLite's
  `synchronous=FULL` and on the disk keeping its word.
- With Redis, durability is the server's: `appendfsync`, and replication, which a fail-over does not wait for.
- Python runs signal handlers on the main thread only. A main thread that is about to begin a wait of the program's own,
  without a time limit, may notice a signal only when something else wakes it. The engine's own waits notice it within
  half a second.
- A plain function that never returns cannot be stopped: it is reported, and keeps one thread.
- A handler that starts threads or tasks of its own takes them out of `drain()` and out of the bound on event depth.
"""


def page() -> str:
    """Return the page, with the figures of the last run."""
    kept = figures.read()
    lines = [
        "# Reliability",
        "",
        "What can go wrong, what is promised then, and the tests that show it. Written by `make reliability` from the",
        "figures of its run. The weak points of the reference have a test each in `tests/test_known_weaknesses.py`.",
        "",
        "| what goes wrong | what is promised | shown by | last run |",
        "| --- | --- | --- | --- |",
    ]
    for row in ROWS:
        tests = "<br>".join(f"`tests/{test}`" for test in row.tests)
        lines.append(f"| {row.fault} | {row.promise} | {tests} | {_figures(row, kept)} |")
    return "\n".join([*lines, "", LIMITS])


def _figures(row: Row, kept: dict[str, dict[str, float | str]]) -> str:
    found: list[str] = []
    for wanted in row.figures:
        for name, values in sorted(kept.items()):
            if name == wanted or (wanted.endswith("*") and name.startswith(wanted[:-1])):
                facts = ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in values.items())
                found.append(f"{name}: {facts}")
    return "<br>".join(found) or ("no figures: it holds or fails" if not row.figures else "not run yet")


def _number(value: float | str) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def missing_tests() -> list[str]:
    """Return what the rows name and the tree does not have."""
    missing: list[str] = []
    for row in ROWS:
        for test in row.tests:
            file, _, name = test.partition("::")
            path = ROOT / "tests" / file
            if not path.is_file() or (name and not re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE)):
                missing.append(test)
    return missing


if __name__ == "__main__":
    if gone := missing_tests():
        sys.exit(f"docs/explanation/reliability.md names tests that do not exist: {', '.join(gone)}")
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")  # noqa: T201 - the command's output
