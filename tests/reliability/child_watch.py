"""A process that writes, watches, prints what it has seen, and is killed. argv: the directory and the durability."""

from __future__ import annotations

import json
import os
import signal
import sys

from scopestate import Engine

folder, durability = sys.argv[1:]
options = {"store_method": "file_based", "file_path": folder, "save_interval_ms": 60_000, "durability": durability}
engine = Engine.from_config(
    {
        "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}],
        "scopes": [{"prefix": "", "history": {}}],
    }
)
cursors: dict[str, list[str]] = {"one": [], "many": []}
with engine.watch("s", snapshot=False) as one, engine.watch(snapshot=False) as many:
    for number in range(10):
        engine.set("s", "k", number)
        if number == 4:
            engine.flush()
    for _ in range(10):
        cursors["one"].append(one.get(30).cursor)
        cursors["many"].append(many.get(30).cursor)
sys.stdout.write(json.dumps(cursors))
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
