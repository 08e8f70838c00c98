"""The base class of the options of a backend. The configuration file is read into them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import msgspec

Wait = Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
"""Milliseconds, at most one day. Keeps typing errors (or nanoseconds) away from timers, which overflow far above."""


class Mistake(NamedTuple):
    """A problem of an option. `item` is the index if it is an entry of a list."""

    key: str
    problem: str
    item: int | None = None


class Options(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`config:` of an adapter."""

    def mistakes(self) -> Iterator[Mistake]:
        """Yield the mistakes that the types do not show. An option at its default is never one."""
        return iter(())

    def refuse_server(self, host: str, port: int) -> None:
        """Raise ConfigError if the options name a server of this engine, at that address, as another engine."""

    def described(self) -> str:
        """Describe where the state is kept, without passwords."""
        raise NotImplementedError
