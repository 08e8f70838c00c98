"""The scopes whose changes are wanted by watches and by durable triggers."""

from __future__ import annotations

from collections.abc import Sequence


class Interest:
    """Wants the changes of a scope, or of all scopes with a prefix: for watches, or for one durable trigger."""

    __slots__ = ("began", "consumer", "ended_s", "prefix", "scope", "users")

    def __init__(self, scope: str | None, prefix: str, consumer: int | None, began: int) -> None:
        self.scope = scope
        """The scope; None: those with the prefix."""
        self.prefix = prefix
        self.consumer = consumer
        """The number of the durable trigger; None: it is of watches."""
        self.began = began
        """Every change of these scopes after this position was entered."""
        self.users = 0
        self.ended_s = 0.0
        """When its last user ended."""

    def wants(self, scope: str) -> bool:
        """Return whether it wants the changes of a scope."""
        return scope == self.scope if self.scope is not None else scope.startswith(self.prefix)

    def covers(self, scope: str | None, prefix: str) -> bool:
        """Return whether it wants everything that another one would."""
        if self.scope is not None:
            return self.scope == scope
        return (prefix if scope is None else scope).startswith(self.prefix)


What = tuple[str | None, str, int | None]
"""Scope, prefix and consumer of an interest: there is one of each."""


class Among:
    """Some scopes: each is named, or its name begins with one of some prefixes."""

    __slots__ = ("_exact", "_prefixes", "fresh", "wanted")

    def __init__(self, wanted: Sequence[tuple[str | None, str]], fresh: int = 0) -> None:
        self.wanted = tuple(wanted)
        """Each a scope, or None and a prefix."""
        self.fresh = fresh
        """The changes of the last this many entries are wanted from now on, even if the cursor is older."""
        self._exact = frozenset([scope for scope, _ in wanted if scope is not None])
        self._prefixes = tuple([prefix for scope, prefix in wanted if scope is None])

    def wants(self, scope: str) -> bool:
        """Return whether a scope is one of them."""
        return scope in self._exact or scope.startswith(self._prefixes)

    def before(self) -> tuple[tuple[str | None, str], ...]:
        """Return those whose changes after the cursor are wanted too."""
        return self.wanted[: len(self.wanted) - self.fresh]


class Interests:
    """The interests of one engine. Changed under the guard of the feed; queries need no guard."""

    def __init__(self) -> None:
        self._all: dict[What, Interest] = {}
        self._exact: dict[str, int] = {}
        """The scopes that are named, each with the number of interests that name it."""
        self._wide: tuple[Interest, ...] = ()
        """The interests in many scopes."""
        self.durable: tuple[Interest, ...] = ()
        """The interests of durable triggers."""

    def get(self, what: What) -> Interest | None:
        """Return an interest, if there is one."""
        return self._all.get(what)

    def add(self, what: What, position: int) -> Interest:
        """Make an interest, which begins after a position."""
        interest = self._all[what] = Interest(*what, position)
        self._note(interest, 1)
        return interest

    def remove(self, interest: Interest) -> None:
        """Forget an interest."""
        if self._all.pop((interest.scope, interest.prefix, interest.consumer), None) is not None:
            self._note(interest, -1)

    def _note(self, interest: Interest, more: int) -> None:
        """Note that there is an interest, or no more. There may be one for each of many scopes: they are not listed."""
        scope = interest.scope
        if scope is None:
            self._wide = _changed(self._wide, interest, more)
        else:
            count = self._exact.get(scope, 0) + more
            if count:
                self._exact[scope] = count
            else:
                del self._exact[scope]
        if interest.consumer is not None:
            self.durable = _changed(self.durable, interest, more)

    def want(self, scope: str) -> bool:
        """Return whether the changes of a scope are wanted."""
        return scope in self._exact or any(scope.startswith(one.prefix) for one in self._wide)

    def want_all(self) -> bool:
        """Return whether the changes of every scope are wanted, including future scopes."""
        return any(not one.prefix for one in self._wide)

    def cover(self, scope: str | None, prefix: str, position: int) -> bool:
        """Return whether every change of a scope, or of the scopes with a prefix, after a position was entered."""
        if scope is not None:
            named = self._all.get((scope, "", None))
            if named is not None and named.began <= position:
                return True
        return any(one.began <= position and one.covers(scope, prefix) for one in self._wide)

    def consumers(self, scope: str) -> list[int]:
        """Return the numbers of the durable triggers that want the changes of a scope."""
        return [one.consumer for one in self.durable if one.consumer is not None and one.wants(scope)]

    def begin_at(self, position: int) -> None:
        """Note that the changes entered before this position are not complete."""
        for interest in self._all.values():
            interest.began = position

    def unused(self) -> list[Interest]:
        """Return the interests that have no user any more."""
        return [one for one in self._all.values() if not one.users]


def _changed(listed: tuple[Interest, ...], interest: Interest, more: int) -> tuple[Interest, ...]:
    return (*listed, interest) if more > 0 else tuple([one for one in listed if one is not interest])
