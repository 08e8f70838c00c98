"""Work at random on a scope that is larger than memory, and check every answer.

`python -m benchmarks.larger_than_memory DIRECTORY [--keys N] [--limit-mb M] [--seconds S] [--seed X]`

Creates a store of N keys (100 bytes of JSON each) in DIRECTORY, which must have none. Then it reads, writes, deletes,
lists pages and counts at random for S seconds, with `max_resident_bytes`, and compares each answer with what it should
be. It ends with a check of the keys that it has changed, before and after a restart. It prints what was done and the
most memory that the process has taken (`VmHWM`; 0 where the system does not tell), and fails at the first wrong answer.

Memory of its own: 4 bytes for each key.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from scopestate import Engine
from scopestate.actors.ports import Row, ScopeChange
from scopestate.config import Config, LimitsConfig
from scopestate.ops.values import encode
from scopestate.persistence import FileAdapter

SCOPE: Final = "users"
ROOT: Final = Path(__file__).parents[1]
_GONE: Final = 2**32 - 1
_AT_ONCE: Final = 50
_PAGE: Final = 100
_PAD: Final = "x" * 60


def key_of(number: int) -> str:
    """Return a key; their order is that of the numbers."""
    return f"user:{number:08d}"


def value_of(number: int, version: int) -> dict[str, Any]:
    """Return the value of a key after so many writes."""
    return {"n": number, "version": version, "pad": _PAD}


def build(directory: str, keys: int) -> None:
    """Create the store: its keys are created in an order that is not theirs."""

    def changes() -> Iterator[ScopeChange]:
        step = 7_919 if keys % 7_919 else 7_907
        rows: dict[str, Row | None] = {}
        for place in range(keys):
            number = place * step % keys
            rows[key_of(number)] = Row(encode(value_of(number, 0)), place + 1, place + 1, None)
            if len(rows) == _AT_ONCE or place == keys - 1:
                yield ScopeChange(SCOPE, place + 1, rows)
                rows = {}

    store = FileAdapter(directory)
    store.save_whole(changes())
    store.close()


def most_memory() -> float:
    """Return the most memory that this process has taken, in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


class Work:
    """Random calls on such a store, each of them checked."""

    def __init__(self, directory: str, keys: int, limit_mb: int, seed: int) -> None:
        self._directory = directory
        self._keys = keys
        self._limit_bytes = limit_mb << 20
        self._versions = array("I", bytes(4 * keys))
        """The version of each key; _GONE: it is deleted."""
        self._there = keys
        self._draw = random.Random(seed)
        self._engine = self._open()
        self.calls = 0
        self.most_resident = 0

    def _open(self) -> Engine:
        config = Config(limits=LimitsConfig(max_resident_bytes=self._limit_bytes))
        return Engine(config, adapter=FileAdapter(self._directory), handle_sigterm=False)

    def first_call_s(self) -> float:
        """Read a key, and return the seconds that it took: the first time, the indices of the store are made."""
        began = time.perf_counter()
        self._read(0)
        return time.perf_counter() - began

    def for_seconds(self, seconds: float) -> None:
        """Make random calls for some time."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            for _ in range(100):
                self._call()
            self.most_resident = max(self.most_resident, self._engine._scopes[SCOPE].key_count())

    def _call(self) -> None:
        number, kind = self._draw.randrange(self._keys), self._draw.random()
        if kind < 0.78:
            self._read(number)
        elif kind < 0.95:
            self._write(number)
        elif kind < 0.98:
            self._delete(number)
        elif kind < 0.9999:
            self._list(number)
        else:
            self._equal(self._engine.scope(SCOPE).count(), self._there, "the count")
        self.calls += 1

    def _expected(self, number: int) -> dict[str, Any] | None:
        version = self._versions[number]
        return None if version == _GONE else value_of(number, version)

    def _read(self, number: int) -> None:
        self._equal(self._engine.get(SCOPE, key_of(number)), self._expected(number), key_of(number))

    def _write(self, number: int) -> None:
        before = self._versions[number]
        version = 1 if before == _GONE else before + 1
        result = self._engine.set(SCOPE, key_of(number), value_of(number, version))
        self._equal(result.old_value, self._expected(number), f"the old value of {key_of(number)}")
        self._versions[number] = version
        self._there += before == _GONE

    def _delete(self, number: int) -> None:
        old = self._engine.delete(SCOPE, key_of(number))
        self._equal(old, self._expected(number), f"the deleted value of {key_of(number)}")
        self._there -= self._versions[number] != _GONE
        self._versions[number] = _GONE

    def _list(self, number: int) -> None:
        """Read a page, forwards or backwards."""
        back = self._draw.random() < 0.5
        bounds = {"end": key_of(number)} if back else {"start": key_of(number)}
        expected = []
        for other in range(number - 1, -1, -1) if back else range(number, self._keys):
            if self._versions[other] != _GONE:
                expected.append((key_of(other), self._expected(other)))
                if len(expected) == _PAGE:
                    break
        found = self._engine.scope(SCOPE).items(reverse=back, limit=_PAGE, **bounds)
        self._equal(found, expected, f"the page at {key_of(number)}")

    def check(self) -> int:
        """Read every key that was changed; return how many those are."""
        changed = [number for number, version in enumerate(self._versions) if version]
        for number in changed:
            self._read(number)
        self._equal(self._engine.scope(SCOPE).count(), self._there, "the count")
        return len(changed)

    def restart(self) -> None:
        """Close the engine and open it again."""
        self._engine.close()
        self._engine = self._open()

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    @staticmethod
    def _equal(found: object, expected: object, what: str) -> None:
        if found != expected:
            raise SystemExit(f"wrong: {what} is {found!r:.300}, and should be {expected!r:.300}")


def main(arguments: list[str]) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.larger_than_memory")
    parser.add_argument("directory")
    parser.add_argument("--keys", type=int, default=10_000_000)
    parser.add_argument("--limit-mb", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--build", action="store_true", help="create the store only")
    given = parser.parse_args(arguments)
    if given.build:
        build(given.directory, given.keys)
        return
    if os.path.exists(os.path.join(given.directory, "state.db")):
        raise SystemExit(f"{given.directory} has a store; name another directory")
    # In a process of its own, whose memory does not count.
    command = [sys.executable, "-m", "benchmarks.larger_than_memory", given.directory, "--build"]
    subprocess.run([*command, "--keys", str(given.keys)], cwd=ROOT, check=True)
    size_mb = os.path.getsize(os.path.join(given.directory, "state.db")) / 1e6
    print(f"{given.keys:,} keys, {size_mb:,.0f} MB; before the first call {most_memory():.0f} MB of memory", flush=True)
    work = Work(given.directory, given.keys, given.limit_mb, given.seed)
    print(f"first call {work.first_call_s():.2f} s, {most_memory():.0f} MB", flush=True)
    work.for_seconds(given.seconds)
    print(f"{work.calls:,} calls, all right; at most {work.most_resident:,} keys in memory, {most_memory():.0f} MB")
    print(f"{work.check():,} changed keys are right, {most_memory():.0f} MB", flush=True)
    work.restart()
    print(f"{work.check():,} changed keys are right after a restart, at most {most_memory():.0f} MB", flush=True)
    work.close()


if __name__ == "__main__":
    main(sys.argv[1:])
