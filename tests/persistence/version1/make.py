"""Makes the stores of version 1 beside this file: `python make.py DIRECTORY`, with a scopestate that writes version 1.

Commit e5da776 made them. Beside the files of each store is what it holds, as JSON: scope -> [number of the last write,
[[key, JSON], ...]].
"""

import gzip
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.persistence import FileAdapter, ScopeChange
from scopestate.persistence.sqlite.reading import StoreReader

ODD_NAMES = [
    "",
    "a\x00b",
    "'; DROP TABLE state; --\"`[]",
    "%_*?",
    "Grüße",
    "\U0001f600",
    "\ufffe",
    "e\u0301",
    "\u00e9",
    " ",
    "007",
    "n" * 300,
]


def engine(directory: str, durability: str) -> Engine:
    kv = {"store_method": "file_based", "file_path": directory, "save_interval_ms": 3_600_000, "durability": durability}
    return Engine(
        from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]})
    )


def use(running: Engine) -> None:
    """Keys in an order that is not that of their names; some overwritten, deleted, and created again."""
    for scope in ("users", "orders"):
        for number in range(24):
            running.set(scope, f"k{number * 7 % 24}", {"n": number, "text": "é" * (number % 7)})
        for number in range(0, 24, 5):
            running.delete(scope, f"k{number}")
        for number in range(0, 24, 10):
            running.set(scope, f"k{number}", [number])
        for number in range(1, 24, 9):
            running.set(scope, f"k{number}", 1.5)
    running.set("emptied", "k", 1)
    running.delete("emptied", "k")


def interval(directory: str) -> None:
    with engine(directory, "interval") as running:
        use(running)


def commit(directory: str) -> None:
    with engine(directory, "commit") as running:
        use(running)


def crashed(directory: str) -> None:
    """A process that was killed: most of it is in the write-ahead log."""
    child = subprocess.Popen([sys.executable, __file__, "--child", directory], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()


def positions(directory: str) -> None:
    """Positions and numbers that an import or another program may have made: equal ones, and those above 2**53."""
    adapter = FileAdapter(directory)
    top = 2**63 - 1
    adapter.save(
        [
            ScopeChange("equal", 3, {"b": b"1", "a": b"2", "c": b"3"}, {"b": 2, "a": 2, "c": 1}),
            ScopeChange("high", top, {"a": b"1", "b": b"2", "c": b"3"}, {"a": top, "b": top - 1, "c": 2**40}),
            ScopeChange("low", 1, {"x": b"1", "y": b"2"}, {"x": 7, "y": 5}),
            ScopeChange("numbered", 2**40, {"k": b"1"}, {"k": 2**39}),
        ]
    )
    adapter.close()


def names(directory: str) -> None:
    adapter = FileAdapter(directory)
    adapter.save(
        [
            ScopeChange(name, 2, {key: json.dumps(key).encode() for key in ODD_NAMES}, dict.fromkeys(ODD_NAMES, 1))
            for name in ODD_NAMES
        ]
    )
    adapter.close()


def empty(directory: str) -> None:
    FileAdapter(directory).close()


def content(directory: str) -> dict:
    with StoreReader(directory) as reader:
        scopes = sorted(
            {*reader.scopes(), *(name for (name,) in reader._connection.execute("SELECT scope FROM scopes"))}
        )
        return {
            scope: [reader.sequence(scope), [[key, value.decode()] for key, value in reader.items(scope)]]
            for scope in scopes
        }


def without_holder(lock: Path) -> None:
    """Leave out which process of which machine held the store."""
    facts, line_end, commit = lock.read_bytes().partition(b"\n")
    lock.write_bytes(json.dumps({"created": json.loads(facts)["created"]}).encode() + line_end + commit)


def main(target: Path) -> None:
    for make in (interval, commit, crashed, positions, names, empty):
        directory = target / make.__name__
        shutil.rmtree(directory, ignore_errors=True)
        make(str(directory))
        found = content(str(directory))
        for file in sorted(directory.iterdir()):
            if file.name == "state.lock":
                without_holder(file)
            if file.name in ("state.db", "state.db-wal", "state.lock"):
                (target / f"{make.__name__}-{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))
        (target / f"{make.__name__}.json").write_text(json.dumps(found) + "\n")
        shutil.rmtree(directory)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        running = engine(sys.argv[2], "commit")
        use(running)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        signal.pause()
    else:
        main(Path(sys.argv[1]).absolute())
