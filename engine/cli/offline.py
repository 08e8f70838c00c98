"""Functions of an engine on a store, for commands that need no running engine."""

from __future__ import annotations

import os
from typing import Annotated, Any, Protocol

import msgspec
import typer

from scopestate.cli.client import EngineAt
from scopestate.cli.rules import names_config
from scopestate.cli.store import directory_of
from scopestate.cli.terminal import errors_to_exit_codes
from scopestate.config import AdapterConfig, Config, KvOptions, load
from scopestate.engine import Engine
from scopestate.errors import ConfigError, NotConnected, StoreUnusable
from scopestate.opening import open_for_tool
from scopestate.paths import expand_home
from scopestate.persistence.sharing.sockets import SOCKET_FILE
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
    with errors_to_exit_codes(as_json=engine.as_json):
        return engine._replace(url=address_of_owner(directory_of(store)), token=None)


def address_of_owner(directory: str) -> str:
    """Return the address at which the engine that has a directory open serves other processes. Raises NotConnected."""
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
    return _Running(engine) if store is None else _Files(engine, store)


class _Running:
    def __init__(self, engine: EngineAt) -> None:
        self._engine = engine

    def call(self, function_id: str, asked: dict[str, Any]) -> Any:
        result = self._engine.call(function_id, msgspec.json.encode(asked))
        return None if result is None else msgspec.json.decode(result)


class _Files:
    """A store, opened for each call without the functions and triggers of its program."""

    def __init__(self, engine: EngineAt, store: str) -> None:
        self._engine = engine
        self._store = store

    def call(self, function_id: str, asked: dict[str, Any]) -> Any:
        with errors_to_exit_codes(as_json=self._engine.as_json):
            config = self._config()
            config = msgspec.structs.replace(config, functions={}, triggers=())
            with Engine(config, adapter=open_for_tool(config)) as engine:
                return engine.call(function_id, asked)

    def _config(self) -> Config:
        """Return the configuration for the store. Raises StoreUnusable if there is none: an engine would create one."""
        if names_config(self._store):
            config = load(self._store)
        else:
            config = Config(AdapterConfig("kv", KvOptions("file_based", directory_of(self._store))))
        options = config.adapter.config
        if isinstance(options, KvOptions):
            if options.store_method != "file_based":
                raise ConfigError("this configuration has no file_based store", file=self._store)
            directory = expand_home(options.file_path)
            if not os.path.lexists(os.path.join(directory, "state.db")):
                raise StoreUnusable(
                    f"there is no store in {os.path.realpath(directory)}: it has no file state.db; nothing was made"
                )
        return config
