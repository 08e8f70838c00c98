"""Makes the stores of version 2 beside this file: `python make.py DIRECTORY`, with a scopestate that writes version 2.

Commit 7b540f5 made them. Beside the files of each store is what it holds, as JSON: scope -> [number behind which it
goes on, [[key, JSON, revision, deadline], ...], [idempotency key, ...]].
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
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite.reading import StoreReader


def engine(directory: str, durability: str) -> Engine:
    kv = {"store_method": "file_based", "file_path": directory, "save_interval_ms": 3_600_000, "durability": durability}
    return Engine(
        from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]})
    )


def use(running: Engine) -> None:
    """Keys in an order that is not that of their names; deadlines that never come, and answers."""
    for scope in ("users", "orders", "Grüße", ""):
        for number in range(24):
            running.set(scope, f"k{number * 7 % 24}", {"n": number, "text": "é" * (number % 7)})
        for number in range(0, 24, 5):
            running.delete(scope, f"k{number}")
        running.set(scope, "k0", [0], ttl=10**9)
        running.set(scope, "again", 1, idempotency_key=f"once-{scope}")
    running.set("emptied", "k", 1)
    running.delete("emptied", "k")


def interval(directory: str) -> None:
    with engine(directory, "interval") as running:
        use(running)


def crashed(directory: str) -> None:
    """A process that was killed: all of it is in the write-ahead log."""
    child = subprocess.Popen([sys.executable, __file__, "--child", directory], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()


def empty(directory: str) -> None:
    FileAdapter(directory).close()


def content(directory: str) -> dict:
    with StoreReader(directory) as reader:
        return {
            scope: [
                reader.revision(scope),
                [[key, entry.json.decode(), entry.revision, entry.expires_ms] for key, entry in reader.entries(scope)],
                sorted(reader.answers(scope)),
            ]
            for scope in reader.scopes(empty=True)
        }


def without_holder(lock: Path) -> None:
    """Leave out which process of which machine held the store."""
    facts, line_end, commit = lock.read_bytes().partition(b"\n")
    lock.write_bytes(json.dumps({"created": json.loads(facts)["created"]}).encode() + line_end + commit)


def main(target: Path) -> None:
    for make in (interval, crashed, empty):
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
