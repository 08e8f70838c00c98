"""The client of the wire benchmarks, in a process of its own: `python -m benchmarks.wire_load '{"measure": ...}'`.

Every measure alternates between the servers that it compares, and prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import picows

from scopestate.server import new_loop

TEXT = picows.WSMsgType.TEXT
FAN_OUT = 32
"""Triggers of one write, for `fan_outs`."""
ID = "eae5dafc-6bcd-46bb-bec8-25102aeba9ee"


def _call(function_id: str, data: dict[str, Any]) -> bytes:
    message = {"type": "invokefunction", "invocation_id": ID, "function_id": function_id, "data": data}
    return json.dumps(message, separators=(",", ":")).encode()


GET = _call("state::get", {"scope": "users", "key": "profile"})
SET = _call("state::set", {"scope": "watched", "key": "k", "value": {"name": "Ada"}})


class Client(picows.WSListener):
    """A connection that hands each message to `on_message`; the greeting is swallowed."""

    def __init__(self) -> None:
        self.on_message: Callable[[bytes], object] = lambda _: None
        self.transport: picows.WSTransport | None = None

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        message = frame.get_payload_as_bytes()
        if not message.startswith(b'{"type":"workerregistered"'):
            self.on_message(message)

    def send(self, message: bytes) -> None:
        """Send one message."""
        assert self.transport is not None
        self.transport.send(TEXT, message)

    def send_many(self, message: bytes, count: int) -> None:
        """Send a message several times, in one write to the socket."""
        assert self.transport is not None
        # A mask of zeros leaves the message as it is.
        frame = b"\x81" + struct.pack("!BHI", 0x80 | 126, len(message), 0) + message
        self.transport.underlying_transport.write(frame * count)


async def connect(port: int) -> Client:
    """Open a connection."""
    transport, client = await picows.ws_connect(Client, f"ws://127.0.0.1:{port}/")
    assert isinstance(client, Client)
    client.transport = transport
    return client


async def round_trips(client: Client, count: int) -> float:
    """Send one message at a time; return the median seconds until its answer."""
    done = asyncio.get_running_loop().create_future()
    taken: list[float] = []
    clock = time.perf_counter
    began = clock()

    def on_message(_: bytes) -> None:
        nonlocal began
        taken.append(clock() - began)
        if len(taken) == count:
            done.set_result(None)
        else:
            began = clock()
            client.send(GET)

    client.on_message = on_message
    client.send(GET)
    await done
    return statistics.median(taken)


async def pipelined(clients: list[Client], count: int, *, gathered: bool = False) -> float:
    """Send `count` messages in all without waiting for answers; return answers per second.

    `gathered`: 100 messages go into one write. With many connections and a write for each message, the system calls of
    the client are what is measured.
    """
    done = asyncio.get_running_loop().create_future()
    left = count

    def on_message(_: bytes) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set_result(None)

    for client in clients:
        client.on_message = on_message
    began = time.perf_counter()
    sent = 0
    while sent < count:
        client = clients[sent // 100 % len(clients)]
        if gathered:
            client.send_many(GET, min(100, count - sent))
        else:
            for _ in range(min(100, count - sent)):
                client.send(GET)
        sent += 100
        await asyncio.sleep(0)
    await done
    return count / (time.perf_counter() - began)


async def deliveries(writer: Client, handler: Client, count: int) -> float:
    """Set on one connection; return the median seconds until the handler is called on the other."""
    done = asyncio.get_running_loop().create_future()
    taken: list[float] = []
    clock = time.perf_counter
    began = 0.0

    def called(message: bytes) -> None:
        taken.append(clock() - began)
        start = message.index(b'"invocation_id":"') + 17
        handler.send(
            b'{"type":"invocationresult","function_id":"bench.on","invocation_id":"%b"}' % message[start : start + 36]
        )
        # A ping behind the answer: the next write must not wait for the server to read that.
        handler.send(b'{"type":"ping"}')

    def on_handler_message(message: bytes) -> None:
        if message.startswith(b'{"type":"invokefunction"'):
            called(message)
        elif len(taken) == count:
            done.set_result(None)
        else:
            write()

    def write() -> None:
        nonlocal began
        began = clock()
        writer.send(SET)

    handler.on_message = on_handler_message
    write()
    await done
    return statistics.median(taken)


async def fan_outs(writer: Client, handler: Client, triggers: int, count: int) -> tuple[float, float]:
    """Set a key that so many triggers watch; return the median seconds until their first call, and until their last."""
    done = asyncio.get_running_loop().create_future()
    first: list[float] = []
    last: list[float] = []
    clock = time.perf_counter
    began = 0.0
    waiting = 0

    def on_handler_message(message: bytes) -> None:
        nonlocal waiting
        if not message.startswith(b'{"type":"invokefunction"'):
            write()  # the server has read all answers
            return
        if waiting == triggers:
            first.append(clock() - began)
        waiting -= 1
        start = message.index(b'"invocation_id":"') + 17
        handler.send(
            b'{"type":"invocationresult","function_id":"bench.on","invocation_id":"%b"}' % message[start : start + 36]
        )
        if not waiting:
            last.append(clock() - began)
            if len(last) == count:
                done.set_result(None)
            else:
                handler.send(b'{"type":"ping"}')

    def write() -> None:
        nonlocal began, waiting
        began, waiting = clock(), triggers
        writer.send(SET)

    handler.on_message = on_handler_message
    write()
    await done
    return statistics.median(first), statistics.median(last)


async def watch(handler: Client, triggers: int = 1) -> None:
    """Register a function and triggers for it, and wait until the server knows them."""
    known = asyncio.get_running_loop().create_future()
    handler.on_message = known.set_result
    handler.send(b'{"type":"registerfunction","id":"bench.on"}')
    config = '{"scope":"watched"}'
    for number in range(triggers):
        handler.send(
            f'{{"type":"registertrigger","id":"{ID[:-2]}{number:02}","trigger_type":"state","function_id":"bench.on",'
            f'"config":{config}}}'.encode()
        )
    handler.send(b'{"type":"ping"}')
    await known


async def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Do what was asked for; each list has one entry per repeat, neighbours were measured right after each other."""
    repeats, calls = asked["repeats"], asked["calls"]
    ours = await connect(asked["engine"])
    found: dict[str, list[float]] = {"echo": [], "engine": []}
    if asked["measure"] == "saturate":
        ends_at = time.perf_counter() + asked["seconds"]
        answers = 0
        while time.perf_counter() < ends_at:
            answers += calls
            await pipelined([ours], calls)
        return {"answers": answers}
    if asked["measure"] == "idle":
        idle = [await connect(asked["engine"]) for _ in range(calls)]
        await asyncio.sleep(0.2)  # the greetings
        print(json.dumps({"connected": len(idle)}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        return {}
    echo = await connect(asked["echo"])
    if asked["measure"] in ("deliveries", "fan_outs"):
        handler = await connect(asked["engine"])
        triggers = FAN_OUT if asked["measure"] == "fan_outs" else 1
        await watch(handler, triggers)
        relay, relayed = await connect(asked["relay"]), await connect(asked["relay"])
        await watch(relayed, triggers)
        found |= {"relay": []} if triggers == 1 else {"relay": [], "relay_last": [], "engine_last": []}
    fifty = asked["measure"].startswith("fifty")
    many = [await connect(asked["echo" if asked["measure"] == "fifty_echo" else "engine"]) for _ in range(50 * fifty)]
    for repeat in range(repeats + 1):
        once: tuple[float, ...]  # in the order of `found`
        match asked["measure"]:
            case "round_trips":
                once = await round_trips(echo, calls), await round_trips(ours, calls)
            case "pipelined":
                once = await pipelined([echo], calls), await pipelined([ours], calls)
            case "fifty":  # one connection beside fifty, both ours
                once = await pipelined([ours], calls, gathered=True), await pipelined(many, calls, gathered=True)
            case "fifty_echo":  # the same of the echo server
                once = await pipelined([echo], calls, gathered=True), await pipelined(many, calls, gathered=True)
            case "fan_outs":
                first, last = await fan_outs(ours, handler, FAN_OUT, calls)
                floor = await fan_outs(relay, relayed, FAN_OUT, calls)
                once = await round_trips(echo, calls), first, *floor, last
            case _:
                once = await round_trips(echo, calls), await deliveries(ours, handler, calls)
                once += (await deliveries(relay, relayed, calls),)
        if repeat:  # the first one warms up
            for times, value in zip(found.values(), once, strict=True):
                times.append(value)
    return found


if __name__ == "__main__":
    loop = new_loop()
    print(json.dumps(loop.run_until_complete(measure(json.loads(sys.argv[1])))), flush=True)
