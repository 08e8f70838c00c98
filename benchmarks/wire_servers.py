"""A server in a process of its own: `python -m benchmarks.wire_servers echo|relay|websockets|engine` prints its port.

`echo` and `websockets` send back what they get and do nothing else. `relay` sends the messages that a set and its
deliveries need, and has no engine. `engine` is ours. Ends when stdin does.
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
ID = b"eae5dafc-6bcd-46bb-bec8-25102aeba9ee"
CALL = (
    b'{"type":"invokefunction","function_id":"bench.on","data":{"type":"state","event_type":"state:updated",'
    b'"scope":"watched","key":"k","old_value":{"name":"Ada"},"new_value":{"name":"Ada"}},"invocation_id":"%b",'
    b'"baggage":"iii.event_depth=1"}' % ID
)
ANSWER = (
    b'{"type":"invocationresult","invocation_id":"%b","function_id":"state::set",'
    b'"result":{"old_value":{"name":"Ada"},"new_value":{"name":"Ada"}}}' % ID
)


class Echo(picows.WSListener):
    """Sends back what it gets."""

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        transport.send(frame.msg_type, frame.get_payload_as_bytes())


class Relay(picows.WSListener):
    """Answers a set and calls the handler of each trigger, with the bytes of the real messages, and does nothing else.

    It is the floor for deliveries: the same messages and the same wake-ups, on the same WebSocket library.
    """

    handler: picows.WSTransport
    """The connection that has registered triggers."""
    triggers = 0

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        message = frame.get_payload_as_bytes()
        if message.startswith(b'{"type":"invokefunction"'):
            for _ in range(Relay.triggers):
                Relay.handler.send(picows.WSMsgType.TEXT, CALL)
            transport.send(picows.WSMsgType.TEXT, ANSWER)
        elif message == b'{"type":"ping"}':
            transport.send(picows.WSMsgType.TEXT, b'{"type":"pong"}')
        elif message.startswith(b'{"type":"registertrigger"'):
            Relay.handler, Relay.triggers = transport, Relay.triggers + 1


async def _echo(connection: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in connection:
            await connection.send(message)


async def _start(kind: str) -> int:
    server: Any
    if kind == "echo":
        server = await picows.ws_create_server(lambda _: Echo(), "127.0.0.1", 0)
    elif kind == "relay":
        server = await picows.ws_create_server(lambda _: Relay(), "127.0.0.1", 0)
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
