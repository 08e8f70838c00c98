"""What the options of all backends have in common. A configuration file is read straight into them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import msgspec

Wait = Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
"""Milliseconds, at most one day: keeps a typing slip (or nanoseconds) away from timers, which overflow far above it."""


class Mistake(NamedTuple):
    """What is wrong, and with which option. `item` counts from 0 if it is one entry of a list."""

    key: str
    problem: str
    item: int | None = None


class Options(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`config:` of an adapter."""

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what types alone do not tell. An option that is at its default is never among them."""
        return iter(())

    def refuse_server(self, host: str, port: int) -> None:
        """Raise ConfigError if a server of this engine at that address is what the options name as another engine."""

    def described(self) -> str:
        """Return where the state is, in words; without passwords."""
        raise NotImplementedError
