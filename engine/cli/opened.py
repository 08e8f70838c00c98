"""A store that a command opens, because no engine has it open."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from scopestate.cli.client import EngineAt
from scopestate.cli.rules import names_config
from scopestate.cli.store_work import directory_of
from scopestate.cli.terminal import errors_to_exit_codes
from scopestate.config import AdapterConfig, Config, KvOptions, load
from scopestate.engine import Engine
from scopestate.errors import ConfigError, StoreUnusable
from scopestate.opening import open_for_tool
from scopestate.paths import expand_home


class OpenedStore:
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
                    f"there is no store in {os.path.realpath(directory)}: it has no file state.db; nothing was created"
                )
        return config
