"""Real processes, killed with SIGKILL under load again and again: what was promised is there after each death."""

from __future__ import annotations

import random
from pathlib import Path

from effort import size
from reliability.figures import record
from reliability.history import COMMIT_PREFIX, KEYS, Replay
from reliability.mortal import INTERVAL_MS, Life, Mortal
from stored import values_of

from scopestate.ops.values import decode
from scopestate.persistence import FileAdapter, ScopeState
from scopestate.persistence.sqlite.schema import RESERVED

KILLS = size(40, 200)
LONG_LIVES = 4
SLACK_S = 3.0
"""How much later than its time a save may begin on a busy machine."""

ALONE = ("orders-1", "notes-1")
SHARED = ("orders-shared", "notes-shared")
NAMES = (*ALONE, *SHARED, *(f"{scope}/{key}" for scope in SHARED for key in KEYS))


def open_after_death(directory: Path) -> dict[str, ScopeState]:
    """The store always opens, and is sound."""
    adapter = FileAdapter(directory)
    try:
        assert adapter.check() == []
        assert "session:child" not in adapter.scopes()
        return {scope: adapter.load(scope) for scope in (*ALONE, *SHARED)}
    finally:
        adapter.close()


def numbers_on_disk(states: dict[str, ScopeState]) -> dict[str, int]:
    """Name -> number of the last write that is on disk: of each scope, and of each key of the shared ones."""
    found = {scope: state.revision % RESERVED for scope, state in states.items()}
    for scope in SHARED:
        for key in KEYS:
            found[f"{scope}/{key}"] = int(values_of(states[scope]).get(key, b"0"))
    return found


def check_whole_prefix(states: dict[str, ScopeState], replays: dict[str, Replay]) -> None:
    """Memory as it was after some write, no more and no less: keys, values and their order."""
    for scope in ALONE:
        expected = replays[scope].at(states[scope].revision % RESERVED)
        assert [(key, decode(data)) for key, data in values_of(states[scope]).items()] == list(expected.items())
    for scope in SHARED:
        # Each write adds one to one key, so this is true after every write and after nothing else.
        assert sum(map(int, values_of(states[scope]).values())) == states[scope].revision % RESERVED


def check_life(life: Life, before: dict[str, int], disk: dict[str, int]) -> float:
    """Hold one life against what is on disk; return the age in seconds of the oldest write that was lost."""
    oldest = 0.0
    for name in NAMES:
        tried = max(life.tried[name], before[name]) if name not in SHARED else None
        assert disk[name] >= before[name], f"{name}: what was on disk before is gone"
        if tried is not None:
            assert disk[name] <= tried, f"{name}: more than was written"
        if name in SHARED:
            continue
        if name.startswith(COMMIT_PREFIX):
            assert disk[name] >= life.last_acknowledged(name), f"{name}: an acknowledged write is lost"
            continue
        assert disk[name] >= life.last_acknowledged(name, before=life.safe_before), f"{name}: a finished save lost it"
        lost = [ns for number, ns in life.acknowledged[name] if number > disk[name]]
        if lost:
            oldest = max(oldest, (life.killed_at - lost[0]) / 1e9)
    for scope, numbers in life.events.items():
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), f"{scope}: events out of order"
        assert numbers[0] == before[scope] + 1, f"{scope}: the first event is missing"
        if scope.startswith(COMMIT_PREFIX):
            assert numbers[-1] <= disk[scope], f"{scope}: the event of a lost write was delivered"
    return oldest


def test_kills_under_load_lose_nothing_that_was_promised(mortal: Mortal, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    moments = random.Random(20250301)
    replays = {scope: Replay() for scope in ALONE}
    disk = dict.fromkeys(NAMES, 0)
    acknowledged = events = lost = opened = 0
    oldest_s, interval_s = 0.0, INTERVAL_MS / 1000
    for kill in range(KILLS):
        if kill % (KILLS // LONG_LIVES) == 1:
            life = mortal.live(directory, disk, moments.uniform(0.4, 0.6), after_open=True)
        elif kill % 10 == 0:
            life = mortal.live(directory, disk, moments.uniform(0.0, 0.02), after_open=False)
        else:
            life = mortal.live(directory, disk, moments.uniform(0.0, 0.08), after_open=True)
        states = open_after_death(directory)
        before, disk = disk, numbers_on_disk(states)
        check_whole_prefix(states, replays)
        lost_s = check_life(life, before, disk)
        oldest_s = max(oldest_s, lost_s)
        # A write is saved at the latest by the save that begins one interval after it, as soon as the disk has done
        # what it is doing then; a kill may come into that save.
        late_s = life.longest_call_s() + SLACK_S
        assert lost_s <= 2 * interval_s + late_s
        if life.opened:
            assert (life.killed_at - life.last_save_begun) / 1e9 <= interval_s + late_s
        opened += life.opened
        acknowledged += sum(len(writes) for writes in life.acknowledged.values())
        events += sum(len(numbers) for numbers in life.events.values())
        lost += sum(max(life.last_acknowledged(name) - disk[name], 0) for name in NAMES if name not in SHARED)

    # The test has seen what it is about: many writes, lost ones among them, and children killed before they were open.
    assert acknowledged > 5 * KILLS
    assert lost > 0
    assert KILLS // 2 < opened < KILLS
    assert all(disk[name] > 0 for name in NAMES)
    record(
        "SIGKILL under load",
        kills=KILLS,
        acknowledged=acknowledged,
        events_delivered=events,
        commit_writes_lost=0,
        interval_writes_lost=lost,
        oldest_lost_write_ms=round(oldest_s * 1000, 1),
        save_interval_ms=INTERVAL_MS,
    )
