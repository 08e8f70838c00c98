"""Processes with transactions, idempotency keys and deadlines, killed with SIGKILL again and again."""

from __future__ import annotations

import random
import time
from pathlib import Path

from effort import size
from reliability.figures import record
from reliability.history import COMMIT_PREFIX, Ledger
from reliability.living import settings
from reliability.mortal import INTERVAL_MS, Life, Mortal

from scopestate import Engine
from scopestate.actors.ports import ANSWERS_OF_A_SCOPE
from scopestate.config import from_mapping
from scopestate.ops.values import decode
from scopestate.persistence import FileAdapter, ScopeState
from scopestate.persistence.sqlite.schema import RESERVED

KILLS = size(25, 100)
LEDGERS = ("orders-ledger", "notes-ledger")
EXPIRING = ("orders-expiring", "notes-expiring")


def open_after_death(directory: Path) -> dict[str, ScopeState]:
    """The store always opens, and is sound. What it holds is loaded and closed in order, which takes no numbers."""
    adapter = FileAdapter(directory)
    try:
        assert adapter.check() == []
        due = {scope: ms for ms, scope in adapter.due(10)}
        states = {scope: adapter.load(scope) for scope in (*LEDGERS, *EXPIRING)}
        for scope, state in states.items():
            first = min((row.expires_ms for row in state.entries.values() if row.expires_ms is not None), default=None)
            assert first is None or due[scope] <= first, f"{scope} is not looked at in time"
        return states
    finally:
        adapter.close()


def count_of(state: ScopeState) -> int:
    """Return the number of the last transaction, or the last number, that is on disk."""
    if not state.entries:
        return 0
    return int(decode(state.entries["count"].json))


def check_ledger(scope: str, state: ScopeState, life: Life, before: int, whole: Ledger) -> None:
    """What is on disk is what the first so many transactions have made: each as a whole, with its answer."""
    count = count_of(state)
    assert {key: decode(row.json) for key, row in state.entries.items()} == whole.at(count)
    assert before <= count <= max(life.tried[scope], before), f"{scope}: more or less than was written"
    known = life.last_acknowledged(scope, before=None if scope.startswith(COMMIT_PREFIX) else life.safe_before)
    assert count >= known, f"{scope}: the transaction {known} is lost"
    first = max(1, count - ANSWERS_OF_A_SCOPE + 1)
    assert list(state.answers) == [f"{scope}-{number}" for number in range(first, count + 1)]
    if count:
        revisions = [row.revision for row in state.entries.values()]
        # A transaction writes `count` last, so that is the number of the scope.
        assert state.entries["count"].revision == max(revisions)
        assert state.revision % RESERVED == max(revisions) % RESERVED


def check_expiring(scope: str, state: ScopeState, life: Life, before: int) -> None:
    """A key that was told to have expired is not on disk again; one that is missing has expired."""
    values = {key: int(row.json) for key, row in state.entries.items()}
    assert all(row.expires_ms is not None for row in state.entries.values()), f"{scope}: a deadline is lost"
    assert all(number <= max(life.tried[scope], before) for number in values.values()), (
        f"{scope}: more than was written"
    )
    if scope.startswith(COMMIT_PREFIX):
        told = {(key, value) for of, key, value in life.expired if of == scope}
        assert not told & set(values.items()), f"{scope}: it was told to have expired, and is there"


def check_acknowledged_keys(scope: str, state: ScopeState, life: Life) -> None:
    """On commit an acknowledged key is on disk until its deadline, or a newer one in its place."""
    values = {key: int(row.json) for key, row in state.entries.items()}
    begun = 0
    for number, ns in life.acknowledged[scope]:
        key, told = f"k{number % 6}", begun
        begun = ns  # the next one is set behind this
        if number <= life.last_acknowledged(scope) - 6 or not told:
            continue
        if values.get(key, 0) < number:
            assert life.killed_at >= told + 40_000_000, f"{scope}: the acknowledged key {key} is lost before it expires"


def test_kills_leave_no_half_transaction_and_repeat_none(mortal: Mortal, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    moments = random.Random(20251127)
    whole = {scope: Ledger() for scope in LEDGERS}
    last = dict.fromkeys((*LEDGERS, *EXPIRING), 0)
    acknowledged = repeated = lost = 0
    told: set[tuple[str, str, int]] = set()
    for kill in range(KILLS):
        span_s = moments.uniform(0.3, 0.5) if kill % 20 == 1 else moments.uniform(0.0, 0.12)
        life = mortal.live(directory, last, span_s, after_open=True)
        states = open_after_death(directory)
        for scope in LEDGERS:
            check_ledger(scope, states[scope], life, last[scope], whole[scope])
            last[scope] = count_of(states[scope])
            lost += max(life.last_acknowledged(scope) - last[scope], 0)
        for scope in EXPIRING:
            check_expiring(scope, states[scope], life, last[scope])
            last[scope] = max(life.tried[scope], last[scope])
        check_acknowledged_keys(EXPIRING[0], states[EXPIRING[0]], life)
        on_commit = [one for one in life.expired if one[0].startswith(COMMIT_PREFIX)]
        assert len(set(on_commit)) == len(on_commit)
        assert not told & set(on_commit), "a key that had expired for good expires again"
        told |= set(on_commit)
        acknowledged += sum(len(writes) for writes in life.acknowledged.values())
        repeated += life.repeated

    time.sleep(0.05)
    with Engine(from_mapping(settings("interval", directory))) as engine:
        for scope in EXPIRING:
            assert engine.list(scope) == []
            assert engine.count(scope) == 0
    # The test has seen what it is about.
    assert acknowledged > 5 * KILLS
    assert repeated > KILLS
    assert lost > 0
    assert told
    assert all(last[scope] > 0 for scope in LEDGERS)
    record(
        "SIGKILL with transactions",
        kills=KILLS,
        acknowledged=acknowledged,
        repeated_with_the_first_answer=repeated,
        halves_seen=0,
        interval_transactions_lost=lost,
        expired_events=len(told),
        save_interval_ms=INTERVAL_MS,
    )
