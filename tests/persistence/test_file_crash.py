"""Real processes killed in the middle of saving: each save is there whole or not at all, and the store always opens."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

from scopestate.persistence import FileAdapter

SAVE_FOR_EVER = """
import sys
from scopestate.persistence import FileAdapter, ScopeChange
adapter = FileAdapter(sys.argv[1])
start = adapter.load("count").sequence
for number in range(start + 1, start + 1_000_000):
    text = b"%d" % number
    keys = {f"k{place}": text for place in range(number % 400)}
    adapter.save([
        ScopeChange("count", number, {"n": text}, {"n": number} if number == 1 else {}),
        ScopeChange("wide", number, keys | {"last": text}, {key: number for key in keys}),
        ScopeChange("gone", number, {f"g{number}": text, f"g{number - 1}": None}, {f"g{number}": number}),
    ])
    print(number, flush=True)
"""


def test_killed_in_the_middle_of_saves_the_store_opens_with_every_finished_save_whole(
    directory: Path, run_child: Callable[..., subprocess.Popen[str]]
) -> None:
    moments = random.Random(20250101)
    acknowledged = 0
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
        count, wide, gone = (adapter.load(scope) for scope in ("count", "wide", "gone"))
        number = int(count.values["n"])
        assert acknowledged <= number <= acknowledged + 1
        assert count.sequence == wide.sequence == gone.sequence == number
        assert wide.values["last"] == b"%d" % number
        assert [wide.values[f"k{place}"] for place in range(number % 400)] == [b"%d" % number] * (number % 400)
        assert gone.values == {f"g{number}": b"%d" % number}
        assert adapter.check() == []
        adapter.close()
