"""Operations on the consumers of a cluster: each goes to the server that has its slot, by one connection to each."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from scopestate.errors import NotConnected, StorageError
from scopestate.persistence.connections.connection import NOT_ALL, Broken
from scopestate.persistence.redis.cluster import Clustered, ServerPool
from scopestate.persistence.redis.connection import PASSING, Connection, Refusal, pack
from scopestate.persistence.redis.damage import explain_refusal
from scopestate.persistence.redis.port import Line, Place
from scopestate.persistence.redis.script import explain, with_source

_PASSES: Final = 8
"""How often an operation is sent again because its slot has moved, or the server did not have the script."""
_PAUSE_S: Final = 0.05
"""Pause before an operation is sent again that a server cannot do now."""
_DOWN_S: Final = 0.5
"""How long a server is not asked again, at least, that could not be reached: operations on it fail at once."""
_AT_ONCE: Final = 500
"""Operations that are sent together."""
_ASKING: Final = pack(("ASKING",))


class NodeLine:
    """The connection to one server. From any thread; one exchange at a time."""

    def __init__(self, pool: ServerPool, patience_s: float) -> None:
        self._pool = pool
        self._patience_s = patience_s
        self._exclusive = threading.Lock()
        self._connection: Connection | None = None
        self._down_until_s = 0.0
        self._why_down = ""

    @property
    def address(self) -> str:
        """The address of the server."""
        return self._pool.target.address

    def exchange(self, commands: Sequence[tuple[Any, ...]], *, asking: bool = False) -> list[Any]:
        """Send commands and return their replies, which may be Refusals.

        Raises StorageError if the server cannot be reached, and Broken if the connection was lost.
        """
        with self._exclusive:
            if time.monotonic() < self._down_until_s:
                raise StorageError(self._why_down)
            began_s = time.monotonic()
            connection, self._connection = self._connection, None
            try:
                if connection is None:
                    connection = self._pool.target.dial()
                    connection.wait_at_most(self._patience_s)
                replies = _exchange(connection, commands, asking=asking)
            except NotConnected as error:
                self._note_down(str(error), began_s)
                raise StorageError(str(error)) from error
            except Broken as error:
                if connection is not None:
                    connection.close()
                if time.monotonic() - began_s >= self._patience_s:
                    # It hangs. Other threads that want it must not wait as long each.
                    self._note_down(f"the connection to Redis at {self.address} was lost: {error}", began_s)
                raise
            self._connection = connection
            return replies

    def _note_down(self, why: str, began_s: float) -> None:
        """Leave it alone for a while: longer if it took long to fail, so that most of the time is left for others."""
        now_s = time.monotonic()
        self._why_down = why
        self._down_until_s = now_s + max(_DOWN_S, 2 * (now_s - began_s))

    def close(self) -> None:
        """Close the connection. A thread that waits in it gets an error."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class Lines:
    """Connections to the servers of a cluster. From any thread."""

    def __init__(self, servers: Clustered, patience_s: float) -> None:
        """`patience_s`: how long to wait for an answer."""
        self._servers = servers
        self._patience_s = patience_s
        self._nodes: dict[ServerPool, NodeLine] = {}
        self._closed = threading.Event()

    def ask(self, slot: int, commands: Sequence[tuple[Any, ...]], *, wait_s: float = 0.0) -> list[Any]:
        """Send the commands to the server that has the slot, and return their replies.

        `wait_s`: how long to try again while the slot moves, or the server is not ready. Raises StorageError, also for
        the first refusal, and Broken if the connection was lost: then some of the commands may have been done.
        """
        if self._closed.is_set():
            raise StorageError("the connections to the cluster are closed")
        deadline = time.monotonic() + wait_s
        replies: list[Any] = [None] * len(commands)
        left = list(enumerate(commands))
        pool, asking, passes = self._servers.pool_of(slot), False, 0
        while True:
            node = self._node(pool)
            answers = node.exchange([command for _, command in left], asking=asking)
            refused: list[tuple[int, tuple[Any, ...]]] = []
            refusal: Refusal | None = None
            for (at, command), reply in zip(left, answers, strict=True):
                if type(reply) is not Refusal:
                    replies[at] = reply
                    continue
                if reply.word not in {"NOSCRIPT", "MOVED", "ASK", *PASSING}:
                    raise explain_refusal(reply, command, node.address, node.exchange)
                refused.append((at, with_source(command) if reply.word == "NOSCRIPT" else command))
                refusal = refusal or reply
            if refusal is None:
                return replies
            left, asking, passes = refused, False, passes + 1
            if refusal.word in PASSING or passes > _PASSES:
                if time.monotonic() >= deadline or self._closed.wait(_PAUSE_S):
                    raise explain(refusal, node.address, *_keys_of(left[0][1]), waited=wait_s > 0)
                pool = self._servers.pool_of(slot)
            elif refusal.word != "NOSCRIPT":
                pool, asking = self._servers.named_by(refusal, node.address), refusal.word == "ASK"

    def ask_many(self, asked: Sequence[tuple[int, tuple[Any, ...]]], *, wait_s: float = 0.0) -> list[Any]:
        """Send many commands, each to the server that has its slot, and return their replies.

        In the place of one that has failed is its StorageError. They may be repeated: each is sent again once.
        """
        if self._closed.is_set():
            return [StorageError("the connections to the cluster are closed")] * len(asked)
        replies: list[Any] = [None] * len(asked)
        parts: dict[ServerPool, list[int]] = {}
        for at, (slot, _) in enumerate(asked):
            parts.setdefault(self._servers.pool_of(slot), []).append(at)
        for pool, places in parts.items():
            for begin in range(0, len(places), _AT_ONCE):
                some = places[begin : begin + _AT_ONCE]
                try:
                    answers = self._node(pool).exchange([asked[at][1] for at in some])
                except StorageError as error:
                    answers = [error] * len(some)
                except Broken as error:
                    answers = [Refusal(f"NOSCRIPT {error}")] * len(some)
                for at, answer in zip(some, answers, strict=True):
                    replies[at] = self._ask_again(*asked[at], wait_s) if type(answer) is Refusal else answer
        return replies

    def _ask_again(self, slot: int, command: tuple[Any, ...], wait_s: float) -> Any:
        try:
            return self.ask(slot, [command], wait_s=wait_s)[0]
        except StorageError as error:
            return error
        except Broken as error:
            return StorageError(f"the connection to Redis at {self.address_of(slot)} was lost: {error}")

    def address_of(self, slot: int) -> str:
        """Return the address of the server that has a slot, for messages."""
        return self._servers.pool_of(slot).target.address

    def _node(self, pool: ServerPool) -> NodeLine:
        node = self._nodes.get(pool)
        if node is None:
            node = self._nodes.setdefault(pool, NodeLine(pool, self._patience_s))
        return node

    def close(self) -> None:
        """Close the connections."""
        self._closed.set()
        for node in list(self._nodes.values()):
            node.close()


class SlotLine(Line):
    """What `Line` is on one server, for one slot."""

    def __init__(self, place: Place, lines: Lines, slot: int) -> None:
        super().__init__(place)
        self._lines = lines
        self._slot = slot

    def _exchange(self, commands: tuple[tuple[Any, ...], ...]) -> list[Any]:
        return self._lines.ask(self._slot, commands)

    def close(self) -> None:
        """The connections are those of all slots."""


def _exchange(connection: Connection, commands: Sequence[tuple[Any, ...]], *, asking: bool) -> list[Any]:
    packed = [pack(command) for command in commands]
    if asking:
        packed = [_ASKING + command for command in packed]
    connection.send(b"".join(packed))
    replies: list[Any] = []
    while len(replies) < len(packed) * (1 + asking):
        reply = connection.next_reply()
        if reply is NOT_ALL:
            connection.receive()
        else:
            replies.append(reply)
    return replies[1::2] if asking else replies


def _keys_of(command: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the first key of a command, for a message."""
    return (str(command[3] if command[0] in {"EVALSHA", "EVAL"} else command[1]),)
