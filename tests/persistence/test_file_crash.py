"""Real processes killed in the middle of saving: each save is there whole or not at all, and the store always opens."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

from stored import values_of

from scopestate.persistence import FileAdapter

SAVE_FOR_EVER = """
import sys
from scopestate.persistence import Answer, Row, FileAdapter, ScopeChange
adapter = FileAdapter(sys.argv[1])
states = {scope: adapter.load(scope) for scope in ("count", "wide", "gone")}
rows = {scope: state.entries for scope, state in states.items()}
def change(scope, values, token=None):
    state, entries, changed, removed = states[scope], rows[scope], {}, []
    for key, value in values.items():
        state.revision += 1
        before = entries.pop(key, None) if value is None else entries.get(key)
        if value is not None:
            created = before.created if before else state.revision
            entries[key] = changed[key] = Row(value, state.revision, created, int(text))
        elif before:
            removed.append(before.created)
    answers = {token: Answer(b"", token.encode(), int(token)), str(int(token) - 20): None} if token else {}
    return ScopeChange(scope, state.revision, changed, removed, int(text), answers)
start = int(rows["count"]["n"].json) if rows["count"] else 0
for number in range(start + 1, start + 1_000_000):
    text = b"%d" % number
    keys = {f"k{place}": text for place in range(number % 400)}
    adapter.save([
        change("count", {"n": text}),
        change("wide", keys | {"last": text}, str(number)),
        change("gone", {f"g{number}": text, f"g{number - 1}": None}),
    ])
    print(number, flush=True)
"""


def test_killed_in_the_middle_of_saves_the_store_opens_with_every_finished_save_whole(
    directory: Path, run_child: Callable[..., subprocess.Popen[str]]
) -> None:
    moments = random.Random(20250101)
    acknowledged = 0
    revisions = [0, 0, 0]
    for _ in range(15):
        child = run_child(SAVE_FOR_EVER, str(directory))
        assert child.stdout is not None
        for _ in range(moments.randrange(1, 12)):
            acknowledged = int(child.stdout.readline())
        child.kill()
        # What it said before it died counts as acknowledged too.
        rest = child.stdout.read().split("\n")[:-1]
        acknowledged = int(rest[-1]) if rest else acknowledged
        assert child.wait(30) < 0

        adapter = FileAdapter(directory)
        states = [adapter.load(scope) for scope in ("count", "wide", "gone")]
        count, wide, gone = (values_of(state) for state in states)
        number = int(count["n"])
        assert acknowledged <= number <= acknowledged + 1
        assert all(state.revision > before for state, before in zip(states, revisions, strict=True))
        revisions = [state.revision for state in states]
        assert wide["last"] == b"%d" % number
        assert [wide[f"k{place}"] for place in range(number % 400)] == [b"%d" % number] * (number % 400)
        assert gone == {f"g{number}": b"%d" % number}
        # Deadlines and answers are those of the same save.
        assert {row.expires_ms for row in states[2].entries.values()} == {number}
        assert sorted(adapter.due(3)) == [(number, "count"), (number, "gone"), (number, "wide")]
        assert list(states[1].answers) == [str(kept) for kept in range(max(1, number - 19), number + 1)]
        assert adapter.check() == []
        adapter.close()
