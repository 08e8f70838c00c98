"""Configuration: typed structs, the YAML file, hot reload.

`load` reads a file and `ConfigWatcher` follows it. `DEFAULT_FILE` is the commented default that ships with the package.
"""

from __future__ import annotations

from pathlib import Path

from scopestate.config.loader import check, examine, from_mapping, load, loads, validate
from scopestate.config.schema import (
    AdapterConfig,
    AuthConfig,
    Config,
    FunctionRef,
    LimitsConfig,
    RetryConfig,
    ScopeRule,
    ServerConfig,
    TlsConfig,
    TokenConfig,
    TriggerConfig,
)
from scopestate.config.watch import ConfigWatcher
from scopestate.persistence.bridge.options import BridgeOptions
from scopestate.persistence.local import KvOptions
from scopestate.persistence.redis.options import RedisOptions

DEFAULT_FILE = Path(__file__).with_name("engine.yaml")
"""Every option with its default, in comments; a file_based store under `./data`."""

__all__ = [
    "DEFAULT_FILE",
    "AdapterConfig",
    "AuthConfig",
    "BridgeOptions",
    "Config",
    "ConfigWatcher",
    "FunctionRef",
    "KvOptions",
    "LimitsConfig",
    "RedisOptions",
    "RetryConfig",
    "ScopeRule",
    "ServerConfig",
    "TlsConfig",
    "TokenConfig",
    "TriggerConfig",
    "check",
    "examine",
    "from_mapping",
    "load",
    "loads",
    "validate",
]
