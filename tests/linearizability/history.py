"""Records the results that threads and asyncio tasks got from an engine, and checks them scope by scope.

What is checked: each scope as one object, with set, get, delete, update and list together, so that `list` must show one
instant of the scope, in insertion order. `list_groups` is checked as one reading per scope ("is it named?"): within
each scope it is held to the same order as every other call; that the names of one answer belong to one common instant
is not promised, and not checked. Results are compared as JSON text, so 1, 1.0 and true differ.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from linearizability.checker import Call, check
from linearizability.model import MISSING, Ops, ScopeModel, text_of

from scopestate import Engine
from scopestate.errors import ReplyTimeout, StorageError

_MISSING = object()

Choice = tuple[str, str, tuple[Any, ...]]
"""(function, scope, arguments)."""


class History:
    """The calls of many clients on one engine."""

    def __init__(self, engine: Engine, scopes: Sequence[str], keys: Sequence[str]) -> None:
        self.engine = engine
        self.scopes = tuple(scopes)
        self.keys = tuple(keys)
        self.refused: list[str] = []
        """The errors of calls that certainly failed. The history does not have these calls."""
        self.may_begin = threading.Event()
        """Clear it to make scopes idle for a moment: calls that have begun continue, and no other call begins."""
        self.may_begin.set()
        self.rounds: int | None = None
        """How often scopes were disturbed; None if they are not disturbed."""
        self._now = itertools.count(1)
        self._calls: list[tuple[str, Call]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def note_into(self, other: History) -> None:
        """Record into another history from now on: that of other clients of the same state."""
        self._now, self._calls = other._now, other._calls

    def check(self) -> None:
        """Raise NotLinearizable unless each scope's calls can be put in order."""
        for scope in self.scopes:
            check([call for where, call in self._calls if where == scope], ScopeModel(), f"scope {scope!r}")

    # ----------------------------------------------------------------------------------------------------- clients

    def thread(self, seed: int, calls: int, name: str) -> threading.Thread:
        """A client on a thread of its own; start it."""

        def work() -> None:
            rng = random.Random(seed)
            for number in range(calls):
                assert self.may_begin.wait(60)
                if number == calls // 2:
                    for _ in self.two_rounds():
                        threading.Event().wait(0.0005)
                self.call(self.choose(rng), name)

        return threading.Thread(target=work, name=name)

    async def task(self, seed: int, calls: int, name: str) -> None:
        """A client on the running event loop."""
        rng = random.Random(seed)
        for number in range(calls):
            if number == calls // 2:
                for _ in self.two_rounds():
                    await asyncio.sleep(0.0005)
            while not self.may_begin.is_set():  # noqa: ASYNC110 - set by a thread, which an asyncio.Event cannot take
                await asyncio.sleep(0.0005)
            await self.call_async(self.choose(rng), name)
            if rng.random() < 0.2:
                await asyncio.sleep(0)

    def two_rounds(self) -> Iterator[None]:
        """Continue until scopes were disturbed twice, so that the history contains one whole round."""
        last = None if self.rounds is None else self.rounds + 2
        while last is not None and self.rounds is not None and self.rounds < last:
            yield

    def choose(self, rng: random.Random) -> Choice:
        scope, key = rng.choice(self.scopes), rng.choice(self.keys)
        value = rng.choice([rng.randrange(1000), f"v{rng.randrange(1000)}", [1], {"f": 1}])
        ops: Ops = rng.choice(
            [
                (("increment", rng.randrange(1, 9)),),
                (("append", "x"),),
                (("append", 1), ("increment", 2)),
                (("merge", {f"m{rng.randrange(3)}": rng.randrange(9)}),),
                (),
            ]
        )
        kind = rng.choices(("set", "get", "delete", "update", "list", "list_groups"), weights=(25, 25, 15, 25, 7, 3))[0]
        arguments: dict[str, tuple[Any, ...]] = {
            "set": (key, value), "get": (key,), "delete": (key,), "update": (key, ops), "list": (), "list_groups": ()
        }  # fmt: skip
        return kind, scope, arguments[kind]

    # --------------------------------------------------------------------------------------------------- recording

    def call(self, choice: Choice, client: str) -> None:
        """Make a call from this thread."""
        kind, scope, arguments = choice
        began = next(self._now)
        try:
            result = self._make(self.engine, kind, scope, arguments)
        except StorageError as error:
            self.refused.append(f"{choice}: {error!r}")
        except ReplyTimeout:
            self._note(choice, None, began, None, client, cut_off=True)
        else:
            self._note(choice, result, began, next(self._now), client)

    async def call_async(self, choice: Choice, client: str) -> None:
        """Make a call from this task."""
        kind, scope, arguments = choice
        began = next(self._now)
        try:
            result = await self._make(self.engine.aio, kind, scope, arguments)
        except StorageError as error:
            self.refused.append(f"{choice}: {error!r}")
        except asyncio.CancelledError:
            # Once another turn of the scope has begun, the turn of the call has ended, or it will never begin.
            await self.engine.aio.list(scope)
            self._note(choice, None, began, next(self._now), client, cut_off=True)
        except ReplyTimeout:
            self._note(choice, None, began, None, client, cut_off=True)
        else:
            self._note(choice, result, began, next(self._now), client)

    @staticmethod
    def _make(engine: Any, kind: str, scope: str, arguments: tuple[Any, ...]) -> Any:
        match kind:
            case "get":
                return engine.get(scope, *arguments, _MISSING)
            case "list_groups":
                return engine.list_groups()
            case "update":
                key, ops = arguments
                return engine.update(scope, key, [_as_op(*op) for op in ops])
            case _:
                return getattr(engine, kind)(scope, *arguments)

    def _note(
        self, choice: Choice, result: Any, began: int, ended: int | None, client: str, *, cut_off: bool = False
    ) -> None:
        kind, scope, arguments = choice
        if kind == "list_groups":
            for name in self.scopes:
                named = not cut_off and name in result
                self._calls.append((name, Call("in_groups", (), named, began, ended, client, cut_off)))
            return
        if kind == "set":
            arguments = (arguments[0], text_of(arguments[1]))
        if not cut_off:
            result = _RESULTS[kind](result)
        self._calls.append((scope, Call(kind, arguments, result, began, ended, client, cut_off)))


def _as_op(kind: str, operand: Any) -> dict[str, Any]:
    match kind:
        case "increment":
            return {"type": kind, "path": "", "by": operand}
        case "merge":
            return {"type": kind, "value": operand}
        case _:
            return {"type": kind, "path": "", "value": operand}


def _written(result: Any) -> tuple[str, str]:
    return MISSING if result.created else text_of(result.old_value), text_of(result.new_value)


# No client writes null, so if `delete` returns None, the key did not exist.
_RESULTS: dict[str, Callable[[Any], Any]] = {
    "set": _written,
    "update": _written,
    "get": lambda value: MISSING if value is _MISSING else text_of(value),
    "delete": lambda value: MISSING if value is None else text_of(value),
    "list": lambda values: tuple(map(text_of, values)),
}


def run_clients(threads: Sequence[threading.Thread], tasks: Callable[[], Awaitable[None]]) -> None:
    """Run the threads beside an event loop of this thread, and wait for all of them."""
    for thread in threads:
        thread.start()

    async def main() -> None:
        await asyncio.wait_for(tasks(), 60)

    try:
        asyncio.run(main())
    finally:
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
