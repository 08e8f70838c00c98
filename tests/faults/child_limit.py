"""A process whose files may not grow: `ulimit -f`, lowered and raised again while the engine runs."""

from __future__ import annotations

import resource
import signal
import sys
import threading

from scopestate import Engine
from scopestate.errors import StorageError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the process would end; then write() fails with EFBIG
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

kv = {"store_method": "file_based", "file_path": sys.argv[1], "save_interval_ms": 5}
settings = {
    "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}],
    "scopes": [{"name": "orders", "durability": "commit"}],
}
pause = threading.Event()

with Engine.from_config(settings) as engine:
    engine.set("orders", "small", 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        engine.set("orders", "big", "x" * 2_000_000)
    except StorageError as error:
        if error.code != "SET_ERROR":
            raise
        assert engine.get("orders", "big") is None
        assert engine.get("orders", "small") == 1
        sys.stdout.write("refused ")
    engine.set("interval", "big", "x" * 2_000_000)
    while engine.stats().failed_saves < 3:
        pause.wait(0.005)
    assert not engine.health().ok
    assert len(engine.get("interval", "big")) == 2_000_000
    sys.stdout.write("queued ")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    engine.set("orders", "big", "x" * 2_000_000)
    while not engine.health().ok or engine.stats().unsaved_scopes:
        pause.wait(0.005)
    sys.stdout.write("resumed")
