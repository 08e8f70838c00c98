"""Transactions beside what can go wrong on the way: cut connections, forgotten scripts, moved slots, killed servers."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any, Self

import pytest
from on_redis import bytes_client
from opening import open_at, scope_of
from reliability.living import InThread
from servers import Cluster, Server, StartServer

from scopestate import Engine, ops
from scopestate.errors import ConnectionLost, ScopestateError, StorageError
from scopestate.ops.transactions import Batch, Check, SetAll, SetStep, Transact, Transaction, UpdateStep
from scopestate.ops.writes import Once, UpdateWith

TOTAL = 1000
ADD = (ops.Increment("", 1),)


class CuttingProxy:
    """Passes bytes on, and ends the connection behind a given number of them, once each time it is armed."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._left: dict[str, int] = {}
        self._ends: list[socket.socket] = []
        self._closed = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname()).close()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (*self._ends, self._listener):
            end.close()

    def arm(self, direction: str, left: int) -> None:
        """Cut behind `left` more bytes in that direction: `request` or `reply`."""
        self._left = {direction: left}

    @property
    def has_cut(self) -> bool:
        """True if it is not armed any more."""
        return not self._left

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._closed:
                client.close()
                return
            server = socket.create_connection(self._server.address)
            self._ends += (client, server)
            for source, sink, direction in ((client, server, "request"), (server, client, "reply")):
                thread = threading.Thread(target=self._pump, args=(source, sink, direction), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                left = self._left.get(direction)
                if left is not None and len(data) > left:
                    self._left = {}
                    sink.sendall(data[:left])
                    break
                if left is not None:
                    self._left = {direction: left - len(data)}
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def transfer(tx: Transaction) -> int:
    tx["a"] -= 1
    tx["b"] += 1
    tx["moves"] = tx.get("moves", 0) + 1
    left: int = tx["a"]
    return left


def is_whole(server: Server) -> int:
    """Return how many transfers were made; each is whole."""
    found = {key: int(value) for key, value in bytes_client(server).hgetall("state:s").items()}
    moves = found.get(b"moves", 0)
    assert (found[b"a"], found[b"b"]) == (TOTAL - moves, moves)
    return moves


def prepare(engine: Engine) -> None:
    scope_of(engine).run(SetAll({"a": b"%d" % TOTAL, "b": b"0"}))


@pytest.mark.parametrize("direction", ["request", "reply"])
def test_a_transaction_is_whole_or_not_at_all_wherever_its_connection_ends(valkey: Server, direction: str) -> None:
    with CuttingProxy(valkey) as proxy, open_at(proxy.url) as engine:
        prepare(engine)
        scope = scope_of(engine)
        done = unknown = 0
        for place in range(0, 4000, 5 if direction == "request" else 1):
            scope.run(Transact(transfer))
            done += 1
            proxy.arm(direction, place)
            before, lost = is_whole(valkey), None
            try:
                scope.run(Transact(transfer))
                done += 1
            except StorageError as error:
                lost = error.__cause__
                unknown += 1
            assert isinstance(lost, ConnectionLost) or lost is None
            assert is_whole(valkey) - before in (0, 1)
            if not proxy.has_cut:
                break  # behind the end of it
        proxy.arm("none", 0)
        assert unknown > 8
        assert done <= is_whole(valkey) <= done + unknown


@pytest.mark.parametrize("direction", ["request", "reply"])
@pytest.mark.parametrize("kind", ["update", "batch", "transact"])
def test_with_an_idempotency_key_it_is_done_once_though_it_is_sent_again(
    valkey: Server, direction: str, kind: str
) -> None:
    with CuttingProxy(valkey) as proxy, open_at(proxy.url) as engine:
        prepare(engine)
        scope = scope_of(engine)
        turns: dict[str, Any] = {
            "update": UpdateWith("n", ADD),
            "batch": Batch((UpdateStep("n", ADD), SetStep("last", b"1"))),
            "transact": Transact(lambda tx: tx.update("n", ADD)),
        }
        done = 0
        for place in range(0, 4000, 9 if direction == "request" else 1):
            scope.run(UpdateWith("other", ADD))
            proxy.arm(direction, place)
            scope.run(Once(turns[kind], f"key {place}"))
            done += 1
            if not proxy.has_cut:
                break
        proxy.arm("none", 0)
        assert done > 5
        assert engine.get("s", "n") == done


def test_scripts_that_the_server_forgets_change_nothing(redis_server: Server) -> None:
    with open_at(redis_server.url) as engine:
        prepare(engine)
        scope = scope_of(engine)
        for number in range(20):
            redis_server.ask("SCRIPT", "FLUSH")
            scope.run(Transact(transfer))
            redis_server.ask("SCRIPT", "FLUSH")
            scope.run(Batch((SetStep("x", b"%d" % number),), (Check("a", value=b"%d" % (TOTAL - number - 1)),)))
            redis_server.ask("SCRIPT", "FLUSH")
            assert scope.run(Once(UpdateWith("n", ADD), f"key {number}")).new_value == number + 1
        found = bytes_client(redis_server).hgetall("state:s")
        assert (found[b"a"], found[b"b"], found[b"moves"]) == (b"%d" % (TOTAL - 20), b"20", b"20")


def moving(engines: list[Engine], over: threading.Event) -> Iterator[InThread]:
    def move(engine: Engine) -> int:
        done = 0
        while not over.is_set():
            with contextlib.suppress(ScopestateError):
                scope_of(engine).run(Transact(transfer))
                done += 1
        return done

    for engine in engines:
        yield InThread(lambda engine=engine: move(engine))  # type: ignore[misc]


def test_a_killed_server_leaves_no_half_of_a_transaction(start_server: StartServer) -> None:
    server = start_server(persistent=True)
    with open_at(server.url) as one, open_at(server.url) as other:
        prepare(one)
        over = threading.Event()
        threads = list(moving([one, other], over))
        for _ in range(4):
            before = one.get("s", "moves", 0)
            while one.get("s", "moves", 0) < before + 30:
                pass
            server.kill()
            server.start()
            is_whole(server)
        over.set()
        acknowledged = sum(thread.result() for thread in threads)
        # What a killed server had done and not answered.
        assert acknowledged <= is_whole(server) <= acknowledged + 4 * 2


def test_transactions_go_on_while_their_slot_moves(shared_cluster: Cluster) -> None:
    with open_at(shared_cluster.urls[0]) as one, open_at(shared_cluster.urls[1]) as other:
        prepare(one)
        slot = shared_cluster.slot("state:s")
        over = threading.Event()
        threads = list(moving([one, other], over))
        nodes = shared_cluster.nodes
        for _ in range(3):
            before = one.get("s", "moves", 0)
            while one.get("s", "moves", 0) < before + 20:
                pass
            owner = shared_cluster.owner(slot)
            shared_cluster.move_slot(slot, next(node for node in nodes if node is not owner))
        over.set()
        acknowledged = sum(thread.result() for thread in threads)
        values = {key: one.get("s", key) for key in ("a", "b", "moves")}
        assert values == {"a": TOTAL - acknowledged, "b": acknowledged, "moves": acknowledged}
