"""A reader in another process sees transactions as a whole, while an engine runs them."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from scopestate import Engine
from scopestate.config import from_mapping

ACCOUNTS = 40
STATES = 15
"""So many different states the other process wants to see."""

READ = """
import json, sqlite3, sys
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.transfer import export_lines

directory, scope, way = sys.argv[1:4]

def rows():
    if way == "sqlite3":
        # One statement sees one moment, as whatever reads a database.
        connection = sqlite3.connect(f"file:{directory}/state.db?mode=ro", uri=True)
        found = connection.execute("SELECT key, value, revision, expires FROM entries WHERE scope = ?", (scope,))
        read = [(key, json.loads(value), revision, expires) for key, value, revision, expires in found]
        connection.close()
        return read
    with StoreReader(directory) as reader:
        lines = [json.loads(line) for line in export_lines(reader)]
    of_scope = [line for line in lines if line.get("scope") == scope]
    keys = [line for line in of_scope if "key" in line]
    read = [(line["key"], line["value"], line["revision"], line.get("expires_at")) for line in keys]
    if read:
        kept = {line["idempotency_key"] for line in of_scope if "idempotency_key" in line}
        (number,) = [value for key, value, _, _ in read if key == "number"]
        assert f"once-{number}" in kept and f"once-{number + 1}" not in kept, (number, kept)
    return read

def check(read):
    if not read:
        return 0
    values = {key: value for key, value, _, _ in read}
    assert len(values) == len(read)
    number = values.pop("number")
    assert values.pop(f"only-{number}") == number, sorted(values)
    assert all(key.startswith("account-") for key in values), sorted(values)
    assert sum(values.values()) == 0, values
    # The changes of a transaction have consecutive revisions, up to that of the key it writes last.
    highest = {key: revision for key, _, revision, _ in read}
    assert max(highest.values()) == highest["number"]
    # A deadline that a transaction gives is there with what it writes.
    deadlines = {key: expires for key, _, _, expires in read}
    assert deadlines["number"] == 4_000_000_000_000 + number, (number, deadlines)
    return number

seen = set()
while len(seen) < int(sys.argv[4]):
    seen.add(check(rows()))
print("whole", flush=True)
"""


def settings(directory: Path) -> dict[str, Any]:
    kv = {"store_method": "file_based", "file_path": str(directory), "save_interval_ms": 1}
    return {
        "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}],
        "scopes": [{"prefix": "commit", "durability": "commit"}],
    }


def transaction(number: int, one: str, other: str, amount: int) -> Callable[[Any], None]:
    """Move an amount between accounts or close one, count, and let one key take the place of another."""

    def run(tx: Any) -> None:
        left = tx.get(other, 0)
        tx.set(one, tx.get(one, 0) + (left if number % 7 == 0 else -amount))
        if number > 1:
            tx.delete(f"only-{number - 1}")
        if number % 7 == 0:
            tx.delete(other)
        else:
            tx.set(other, left + amount)
        tx.set(f"only-{number}", number)
        tx.set("number", number, expires_at=datetime.fromtimestamp((4_000_000_000_000 + number) / 1000, UTC))

    return run


@pytest.mark.parametrize("way", ["sqlite3", "export"])
@pytest.mark.parametrize("scope", ["interval", "commit"])
def test_another_process_never_sees_half_of_a_transaction(
    directory: Path, run_child: Callable[..., subprocess.Popen[str]], scope: str, way: str
) -> None:
    draw = random.Random(f"{scope} {way}")
    with Engine(from_mapping(settings(directory))) as engine:
        engine.set("other", "k", 0)  # a save of several scopes
        child = run_child(READ, str(directory), scope, way, str(STATES))
        number = 0
        while child.poll() is None:
            number += 1
            one, other = (f"account-{account}" for account in draw.sample(range(ACCOUNTS), 2))
            call = transaction(number, one, other, draw.randrange(100))
            engine.transact(scope, call, idempotency_key=f"once-{number}")
            engine.set("other", "k", number)
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read() == "whole\n", child.stderr.read()
        assert number > STATES
