"""A second scopestate process for the bridge tests: serves one engine, and a fresh one whenever a line comes on stdin.

Arguments: the port, and the directory of a store with `durability: commit` (left out: in memory).
"""

from __future__ import annotations

import sys

from scopestate import Engine
from scopestate.server.server import Server


def main() -> None:
    port, store = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    config = {}
    if store is not None:
        kv = {"store_method": "file_based", "file_path": store, "durability": "commit"}
        config = {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}
    while True:
        with Engine.from_config(config) as engine, Server(engine, port=port) as server:
            port = server.port
            sys.stdout.write(f"{server.url}\n")
            sys.stdout.flush()
            if not sys.stdin.readline():
                return


if __name__ == "__main__":
    main()
