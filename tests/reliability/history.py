"""The histories that the crash tests write: known in advance, so that any prefix of them can be recognised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COMMIT_PREFIX = "orders"
"""Scopes with this prefix are on commit, the others on interval."""

SHARED = "shared"
"""Scopes that end so are written by several threads, each counting up a key of its own."""

KEYS = ("a", "b")
"""Keys of a shared scope, a thread each."""

_KEYS_ALONE = 7


def operation(number: int) -> tuple[str, str | None]:
    """Return what write `number` of a scope with one writer does: (key, new value), None for a delete."""
    if number % 5 == 0:
        return f"k{(number // 2) % _KEYS_ALONE}", None
    return f"k{number % _KEYS_ALONE}", f"{number} " + "x" * (number % 50)


def after(numbers: Iterable[int]) -> dict[str, str]:
    """Return the scope's content, in insertion order, after these writes."""
    state: dict[str, str] = {}
    for number in numbers:
        key, value = operation(number)
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value
    return state


LEDGER = "ledger"
"""Scopes that end so are written by one thread, a transaction for each number."""
EXPIRING = "expiring"
"""Scopes that end so get keys that expire soon."""
TTL_S = 0.04
"""How long their keys live."""
_ACCOUNTS = 9


def movement(number: int) -> tuple[str, str, int]:
    """Return the accounts of transaction `number`, and what moves from the first to the second."""
    one = number * 7 % _ACCOUNTS
    return f"account-{one}", f"account-{(one + 1 + number % 4) % _ACCOUNTS}", number % 100


class Transaction:
    """Transaction `number`: moves an amount, or closes an account every third time, and counts. Also on a dict."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls = 0

    def __call__(self, tx: Any) -> int:
        self.calls += 1
        one, other, amount = movement(self.number)
        if self.number % 3 == 0 and one in tx:
            amount = tx[one]
            del tx[one]
        else:
            tx[one] = tx.get(one, 0) - amount
        tx[other] = tx.get(other, 0) + amount
        tx["count"] = tx.get("count", 0) + 1
        return int(tx["count"])


class Ledger:
    """The content of a ledger after each of its transactions, found by going on from the last one asked for."""

    def __init__(self) -> None:
        self._number = 0
        self._state: dict[str, int] = {}

    def at(self, number: int) -> dict[str, int]:
        """Return the content after transaction `number`, which is not less than the one asked for before."""
        assert number >= self._number, (
            f"transaction {self._number} was on disk before, and now {number} is the last one"
        )
        while self._number < number:
            self._number += 1
            Transaction(self._number)(self._state)
        return dict(self._state)


class Replay:
    """The content of a scope after each of its writes, found by going on from the last one asked for."""

    def __init__(self) -> None:
        self._number = 0
        self._state: dict[str, str] = {}

    def at(self, number: int) -> dict[str, str]:
        """Return the content after write `number`, which is not less than the one asked for before."""
        assert number >= self._number, f"write {self._number} was on disk before, and now {number} is the last one"
        while self._number < number:
            self._number += 1
            key, value = operation(self._number)
            if value is None:
                self._state.pop(key, None)
            else:
                self._state[key] = value
        return dict(self._state)
