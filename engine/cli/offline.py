"""Functions of an engine on a store, for commands that need no running engine."""

from __future__ import annotations

import os
from typing import Annotated, Any, Protocol

import msgspec
import typer

from scopestate.cli.client import EngineAt
from scopestate.cli.terminal import errors_to_exit_codes
from scopestate.errors import NotConnected
from scopestate.paths import expand_home
from scopestate.wire.address import Address

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="STORE",
        help="In place of a running engine: the directory of a store, or the configuration file (.yaml) that names it "
        "or Redis. If engines use the directory, it is reached through them.",
    ),
]

Owned = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="STORE",
        help="In place of an address: the directory of a store, or the configuration file (.yaml) that names it; the "
        "engine that has it open answers.",
    ),
]


def owner_of(engine: EngineAt, store: str | None) -> EngineAt:
    """Return the engine that has a store open, by the socket in its directory; without a store, `engine`.

    Ends the program if no engine has the store open, or if that engine does not share its directory.
    """
    if store is None:
        return engine
    from scopestate.cli.store_work import directory_of  # noqa: PLC0415 - not needed for a running engine

    with errors_to_exit_codes(as_json=engine.as_json):
        return engine._replace(url=address_of_owner(directory_of(store)), token=None)


def address_of_owner(directory: str) -> str:
    """Return the address at which the engine that has a directory open serves other processes. Raises NotConnected."""
    from scopestate.persistence.sharing.sockets import SOCKET_FILE  # noqa: PLC0415 - as above

    place = os.path.realpath(expand_home(directory))
    socket_file = os.path.join(place, SOCKET_FILE)
    if not os.path.lexists(socket_file):
        raise NotConnected(
            f"no engine serves other processes in {place}: start the program that uses it, with `share: auto`"
        )
    return Address.of_path(socket_file).url


class Place(Protocol):
    """Where functions are called."""

    def call(self, function_id: str, asked: dict[str, Any]) -> Any:
        """Call a function and return its result. Errors end the program."""


def at(engine: EngineAt, store: str | None) -> Place:
    """Return the running engine, or the store if one is named."""
    if store is None:
        return _Running(engine)
    from scopestate.cli.opened import OpenedStore  # noqa: PLC0415 - an engine is slow to import

    return OpenedStore(engine, store)


class _Running:
    def __init__(self, engine: EngineAt) -> None:
        self._engine = engine

    def call(self, function_id: str, asked: dict[str, Any]) -> Any:
        result = self._engine.call(function_id, msgspec.json.encode(asked))
        return None if result is None else msgspec.json.decode(result)
