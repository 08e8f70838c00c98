"""A server in a process of its own: `python -m benchmarks.wire_servers echo|websockets|engine` prints its port.

`echo` and `websockets` send back what they get and do nothing else; `engine` is ours. Ends when stdin does.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import picows
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from scopestate import Engine
from scopestate.server import Server, new_loop

KEY = {"scope": "users", "key": "profile"}


class Echo(picows.WSListener):
    """Sends back what it gets."""

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        transport.send(frame.msg_type, frame.get_payload_as_bytes())


async def _echo(connection: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in connection:
            await connection.send(message)


async def _start(kind: str) -> int:
    server: Any
    if kind == "echo":
        server = await picows.ws_create_server(lambda _: Echo(), "127.0.0.1", 0)
    else:
        server = await serve(_echo, "127.0.0.1", 0, compression=None, max_size=None)
    port: int = server.sockets[0].getsockname()[1]
    return port


def main(kind: str) -> None:
    """Serve until stdin ends."""
    if kind == "engine":
        with Engine() as engine, Server(engine, port=0) as server:
            engine.set(KEY["scope"], KEY["key"], {"name": "Ada"})
            print(server.port, flush=True)
            sys.stdin.read()
        return
    loop = new_loop()
    print(loop.run_until_complete(_start(kind)), flush=True)
    loop.run_until_complete(loop.run_in_executor(None, sys.stdin.read))


if __name__ == "__main__":
    main(sys.argv[1])
