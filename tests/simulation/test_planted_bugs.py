"""The simulation finds bugs: each of these, planted in the engine, is caught by one of the first seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

import msgspec
import pytest

from scopestate.actors import local, snapshot
from scopestate.actors.gate import Gate
from scopestate.actors.handler import HandlerActor, Hold
from scopestate.actors.local import LocalScope
from scopestate.actors.scope import ScopeActor
from scopestate.actors.snapshot import SnapshotActor
from scopestate.actors.stretch import Collected
from scopestate.actors.turn import HOLDER
from scopestate.closing import Closing
from scopestate.errors import StorageError
from scopestate.ops import writes
from scopestate.persistence import ScopeChange
from tests.simulation.__main__ import main
from tests.simulation.simulator import Failure, observed, simulate

ENOUGH_SEEDS = 300

Patch = pytest.MonkeyPatch


def events_of_a_commit_scope_leave_before_the_commit(patch: Patch) -> None:
    made, write = LocalScope.__init__, LocalScope._write

    def make(self: LocalScope, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self._outbox = self._router.outlet

    def announce(self: LocalScope, key: str, old: bytes | None, new: bytes | None) -> None:
        write(self, key, old, new)
        self._router.wake()

    patch.setattr(LocalScope, "__init__", make)
    patch.setattr(LocalScope, "_write", announce)


def a_commit_scope_answers_before_the_commit(patch: Patch) -> None:
    patch.setattr(Gate, "hold", lambda self, turn, reply, answer: reply.set(answer))


def a_reader_sees_what_is_not_committed(patch: Patch) -> None:
    patch.setattr(LocalScope, "readable", property(lambda self: self._values, lambda self, values: None))


def a_failed_commit_leaves_memory_as_it_is(patch: Patch) -> None:
    roll_back = Gate._roll_back

    def keep(self: Gate, batch: Any, error: StorageError) -> Any:
        values = self._scope._values
        outcomes = roll_back(self, batch, error)
        self._scope._hold(values)
        return outcomes

    patch.setattr(Gate, "_roll_back", keep)


def a_failed_save_forgets_its_batch(patch: Patch) -> None:
    save = SnapshotActor._save

    def forget(self: SnapshotActor) -> None:
        try:
            save(self)
        except StorageError:
            self._backlog.clear()
            raise

    patch.setattr(SnapshotActor, "_save", forget)


def a_retried_save_writes_older_over_newer(patch: Patch) -> None:
    merged = snapshot.merged
    patch.setattr(
        snapshot,
        "merged",
        lambda older, newer: msgspec.structs.replace(
            merged(older, newer),
            entries={**newer.entries, **older.entries},
        ),
    )


def a_dirty_scope_is_passivated(patch: Patch) -> None:
    passivate = LocalScope._passivate

    def leave(self: LocalScope) -> bool:
        if self._dirty is not None:
            self._dirty, self._saved = {}, self._sequence
        return passivate(self)

    patch.setattr(LocalScope, "_passivate", leave)


def new_keys_are_saved_in_reverse(patch: Patch) -> None:
    collect = LocalScope.collect

    def misplace(self: LocalScope) -> ScopeChange | None:
        change = collect(self)
        if change is None:
            return None
        entries = {
            key: entry and msgspec.structs.replace(entry, created=10_000 - entry.created)
            for key, entry in change.entries.items()
        }
        return msgspec.structs.replace(change, entries=entries)

    patch.setattr(LocalScope, "collect", misplace)


def a_wake_up_is_lost_when_a_turn_ends(patch: Patch) -> None:
    original = ScopeActor.run

    def run(self: LocalScope, message: Any) -> Any:
        claim, me = self._claim, get_ident()
        if not claim and claim.setdefault(HOLDER, me) == me:
            try:
                return self.on_receive(message)
            finally:
                del claim[HOLDER]
        return original(self, message)

    patch.setattr(LocalScope, "run", run)


def two_threads_run_one_scope(patch: Patch) -> None:
    write = LocalScope._write

    def slow(self: LocalScope, key: str, old: bytes | None, new: bytes | None) -> None:
        self._dispatcher.give_way()  # type: ignore[attr-defined]  # as a thread may be stopped anywhere
        write(self, key, old, new)

    patch.setattr(LocalScope, "_write", slow)
    patch.setattr(LocalScope, "run", lambda self, turn: self.on_receive(turn))


def two_threads_run_one_handler(patch: Patch) -> None:
    def run_batch(self: HandlerActor) -> None:
        self._scheduled = False
        hold = Hold(get_ident())
        self._claim.setdefault(HOLDER, hold)
        self._drain(hold)

    patch.setattr(HandlerActor, "run_batch", run_batch)


def closing_does_not_save(patch: Patch) -> None:
    patch.setattr(Closing, "_save", lambda self: None)


def the_interval_is_not_kept(patch: Patch) -> None:
    arm = SnapshotActor._arm
    patch.setattr(SnapshotActor, "_arm", lambda self, delay_s: arm(self, delay_s * 2))


def a_sender_overtakes_itself(patch: Patch) -> None:
    patch.setattr(LocalScope, "keep_order", lambda self: None)


def a_conflict_is_answered_before_the_commit(patch: Patch) -> None:
    patch.setattr(LocalScope, "_deliver_refusal", lambda self, message, reply, error: reply.fail(error))


def a_batch_is_written_key_by_key(patch: Patch) -> None:
    def write_all(self: LocalScope, sets: dict[str, bytes], before: list[bytes | None]) -> None:
        for (key, new), old in zip(sets.items(), before, strict=True):
            if old is None:
                self._create(key, new)
            else:
                self._write(key, old, new)

    patch.setattr(LocalScope, "_write_all", write_all)


def half_of_a_transaction_is_saved(patch: Patch) -> None:
    collect = LocalScope.collect

    def leave_one_out(self: LocalScope) -> Collected | None:
        collected = collect(self)
        if collected is not None and len(collected.keys) > 1:
            del collected.keys[next(iter(collected.keys))]
        return collected

    patch.setattr(LocalScope, "collect", leave_one_out)


def a_condition_is_not_looked_at(patch: Patch) -> None:
    patch.setattr(writes, "check_revision", lambda *_: None)
    patch.delitem(local.WAYS, writes.SetWith)


BUGS: list[Callable[[Patch], None]] = [
    events_of_a_commit_scope_leave_before_the_commit,
    a_commit_scope_answers_before_the_commit,
    a_reader_sees_what_is_not_committed,
    a_failed_commit_leaves_memory_as_it_is,
    a_failed_save_forgets_its_batch,
    a_retried_save_writes_older_over_newer,
    a_dirty_scope_is_passivated,
    new_keys_are_saved_in_reverse,
    a_wake_up_is_lost_when_a_turn_ends,
    two_threads_run_one_scope,
    two_threads_run_one_handler,
    closing_does_not_save,
    the_interval_is_not_kept,
    a_sender_overtakes_itself,
    a_conflict_is_answered_before_the_commit,
    a_batch_is_written_key_by_key,
    half_of_a_transaction_is_saved,
    a_condition_is_not_looked_at,
]


@pytest.fixture(params=BUGS, ids=lambda bug: bug.__name__)
def _bug(request: pytest.FixtureRequest, monkeypatch: Patch) -> Iterator[None]:
    request.param(monkeypatch)
    with observed():
        yield


def first_failure() -> Failure | None:
    return next((failure for seed in range(ENOUGH_SEEDS) if (failure := simulate(seed)) is not None), None)


@pytest.mark.usefixtures("_bug")
def test_it_is_caught() -> None:
    assert first_failure() is not None


def test_a_failing_seed_prints_its_trace_and_the_command_that_replays_it(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_failed_save_forgets_its_batch(monkeypatch)
    with observed():
        failure = first_failure()
        assert failure is not None

        assert main(["--seed", str(failure.seed)]) == 1

    printed = capsys.readouterr().out
    assert "an engine starts" in printed
    assert f"seed {failure.seed}: {failure.problem}" in printed
    assert f"python -m tests.simulation --seed {failure.seed}" in printed
