"""Histories with conditional writes and transactions, besides the six functions."""

from __future__ import annotations

import json
import random
from typing import Any

from linearizability.checker import Call, check
from linearizability.history import _MISSING, Choice, History, _as_op
from linearizability.model import MISSING, Ops, text_of
from linearizability.revised_model import RevisedModel, counted

from scopestate import MISSING as ABSENT
from scopestate.errors import Conflict

KINDS = {
    "set": 10, "get": 10, "delete": 8, "update": 10, "list": 5, "list_groups": 2, "entry": 10, "items": 5, "take": 6,
    "set_if": 12, "delete_if": 5, "compare_and_set": 10, "modify": 10, "swap": 12, "pair": 12,
}  # fmt: skip
"""Function -> how often it is chosen."""


class RevisedHistory(History):
    """The calls of many clients. The conditions of each client expect what any of them has seen last."""

    def __init__(self, *arguments: Any, by_key: bool = False) -> None:
        super().__init__(*arguments)
        self._model = RevisedModel(by_key=by_key)
        self._revisions: dict[tuple[str, str], int] = {}
        self._texts: dict[tuple[str, str], str] = {}

    def check(self) -> None:
        """Raise NotLinearizable unless each scope's calls can be put in order."""
        for scope in self.scopes:
            check([call for where, call in self._calls if where == scope], self._model, f"scope {scope!r}")

    def outcomes(self) -> dict[str, int]:
        """How often each kind of conditional write was made, and how often refused."""
        found: dict[str, int] = {}
        for _, call in self._calls:
            if call.certain and call.name in ("set_if", "delete_if", "compare_and_set", "pair"):
                name = f"{call.name} {call.result[0]}"
                found[name] = found.get(name, 0) + 1
        return found

    def choose(self, rng: random.Random) -> Choice:
        scope, key, other = rng.choice(self.scopes), *rng.sample(self.keys, 2)
        text = text_of(rng.choice([rng.randrange(1000), f"v{rng.randrange(1000)}", [1], {"f": 1}]))
        expected = 0 if rng.random() < 0.15 else self._revisions.get((scope, key), 0)
        ops: Ops = rng.choice([(("increment", rng.randrange(1, 9)),), (("append", "x"),), (("merge", {"m": 1}),)])
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        arguments: dict[str, tuple[Any, ...]] = {
            "set": (key, text), "get": (key,), "delete": (key,), "update": (key, ops), "list": (), "list_groups": (),
            "entry": (key,), "items": (), "take": (key, other), "set_if": (key, text, expected),
            "delete_if": (key, expected), "compare_and_set": (key, self._texts.get((scope, key), MISSING), text),
            "modify": (key,), "swap": (key, other), "pair": (key, other, text, key, expected),
        }  # fmt: skip
        return kind, scope, arguments[kind]

    def _make(self, engine: Any, kind: str, scope: str, arguments: tuple[Any, ...]) -> Any:  # type: ignore[override]
        """Make the call, and return its result in the form of the model. For asyncio: return a coroutine that does."""
        if engine is not self.engine:
            return self._made(engine, kind, scope, arguments)
        try:
            result = _paired(engine, scope, *arguments) if kind == "pair" else _begun(engine, kind, scope, arguments)
        except Conflict as conflict:
            return self._noted(kind, scope, arguments, _refused(kind, conflict))
        return self._noted(kind, scope, arguments, _plain(kind, result))

    async def _made(self, engine: Any, kind: str, scope: str, arguments: tuple[Any, ...]) -> Any:
        try:
            if kind == "pair":
                result = await _paired_async(engine, scope, *arguments)
            else:
                result = await _begun(engine, kind, scope, arguments)
        except Conflict as conflict:
            return self._noted(kind, scope, arguments, _refused(kind, conflict))
        return self._noted(kind, scope, arguments, _plain(kind, result))

    def _noted(self, kind: str, scope: str, arguments: tuple[Any, ...], result: Any) -> Any:
        """Remember what the answer of a call says about its key, for later conditions."""
        if kind in ("entry", "get", "set", "update", "modify") and result != ("gave up",):
            place = scope, arguments[0]
            self._texts[place] = result if kind == "get" else result[0 if kind == "entry" else 1]
            if kind != "get":
                self._revisions[place] = result[-1]
        elif result[:1] == ("conflict",):
            self._revisions[scope, arguments[-2 if kind == "pair" else 0]] = result[1]
        elif result[:1] == ("missed",):
            self._texts[scope, arguments[0]] = result[1]
        return result

    def _note(
        self, choice: Choice, result: Any, began: int, ended: int | None, client: str, *, cut_off: bool = False
    ) -> None:
        kind, scope, arguments = choice
        if kind == "list_groups":
            super()._note(choice, result, began, ended, client, cut_off=cut_off)
        else:
            self._calls.append((scope, Call(kind, arguments, result, began, ended, client, cut_off)))


def _begun(engine: Any, kind: str, scope: str, arguments: tuple[Any, ...]) -> Any:
    """Begin a call. Return its answer, or with `engine.aio` a coroutine."""
    match kind, arguments:
        case "get", _:
            return engine.get(scope, *arguments, _MISSING)
        case "list_groups", _:
            return engine.list_groups()
        case "update", (key, ops):
            return engine.update(scope, key, [_as_op(*op) for op in ops])
        case "set", (key, text):
            return engine.set(scope, key, json.loads(text))
        case "set_if", (key, text, expected):
            return engine.set(scope, key, json.loads(text), if_revision=expected)
        case "delete_if", (key, expected):
            return engine.delete(scope, key, if_revision=expected)
        case "compare_and_set", (key, expected, text):
            wanted = ABSENT if expected == MISSING else json.loads(expected)
            return engine.compare_and_set(scope, key, wanted, json.loads(text))
        case "modify", (key,):
            return engine.modify(scope, key, lambda value: json.loads(counted(text_of(value))), default="none")
        case "swap", (one, other):
            return engine.transact(scope, lambda tx: _swapped(tx, one, other))
        case "take", _:
            return engine.transact(scope, lambda tx: tuple(text_in(tx, key) for key in arguments))
        case _:
            return getattr(engine, kind)(scope, *arguments)


def _swapped(tx: Any, one: str, other: str) -> tuple[str, str]:
    first, second = text_in(tx, one), text_in(tx, other)
    for key, text in ((one, second), (other, first)):
        if text == MISSING:
            tx.delete(key)
        else:
            tx.set(key, json.loads(text))
    return first, second


def text_in(tx: Any, key: str) -> str:
    value = tx.get(key, _MISSING)
    return MISSING if value is _MISSING else text_of(value)


def _paired(engine: Any, scope: str, one: str, other: str, text: str, checked: str, expected: int) -> Any:
    with engine.batch(scope) as batch:
        _fill(batch, one, other, text, checked, expected)
    return batch.result


async def _paired_async(engine: Any, scope: str, one: str, other: str, text: str, checked: str, expected: int) -> Any:
    async with engine.batch(scope) as batch:
        _fill(batch, one, other, text, checked, expected)
    return batch.result


def _fill(batch: Any, one: str, other: str, text: str, checked: str, expected: int) -> None:
    batch.check(checked, revision=expected)
    batch.set(one, json.loads(text))
    batch.set(other, json.loads(text))


def _refused(kind: str, conflict: Conflict) -> tuple[Any, ...]:
    """Return the result of a write whose condition failed, or that had too many conflicts."""
    return ("gave up",) if kind in ("modify", "swap", "take") else ("conflict", conflict.revision)


def _plain(kind: str, answer: Any) -> Any:
    """Return an answer in the form of the model."""
    match kind:
        case "set" | "update":
            return before(answer), text_of(answer.new_value), answer.revision
        case "set_if":
            return "written", before(answer), answer.revision
        case "delete" | "delete_if":
            text = MISSING if answer is None else text_of(answer)  # no client writes null
            return text if kind == "delete" else ("written", text)
        case "get":
            return MISSING if answer is _MISSING else text_of(answer)
        case "entry":
            return (MISSING, 0) if answer is None else (text_of(answer.value), answer.revision)
        case "list":
            return tuple(map(text_of, answer))
        case "items":
            return tuple(sorted((key, text_of(value)) for key, value in answer))
        case "compare_and_set" if answer.swapped:
            return "swapped", answer.revision
        case "compare_and_set":
            return "missed", MISSING if answer.current is None else text_of(answer.current)
        case "modify":
            old = MISSING if answer.old_json is None else text_of(answer.old_value)
            return old, text_of(answer.new_value), answer.revision
        case "pair":
            first, second = answer.results
            return "written", before(first), before(second), answer.revision
        case _:
            return answer


def before(answer: Any) -> str:
    return MISSING if answer.created else text_of(answer.old_value)
