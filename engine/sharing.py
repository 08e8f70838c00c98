"""An engine whose scopes live in Redis."""

from __future__ import annotations

from typing import Any

from scopestate.actors.redis_scope import RedisScopeActor
from scopestate.actors.reply import deliver
from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.config import RedisConfig
from scopestate.config.redis_options import server_address
from scopestate.config.redis_urls import parse_sentinel
from scopestate.persistence.redis.adapter import RedisAdapter
from scopestate.persistence.redis.options import RedisOptions


def options_of(config: RedisConfig) -> RedisOptions:
    """Return the adapter's options for a configuration; milliseconds become seconds."""
    address = server_address(config)
    return RedisOptions(
        host=address.host,
        port=address.port,
        unix_path=address.unix_path,
        username=address.username,
        password=address.password,
        database=address.database or 0,
        address=config.address,
        sentinels=tuple(parse_sentinel(sentinel) for sentinel in config.sentinels),
        sentinel_service=config.sentinel_service,
        sentinel_username=config.sentinel_username,
        sentinel_password=config.sentinel_password,
        tls=address.tls,
        tls_ca_file=config.tls_ca_file,
        tls_cert_file=config.tls_cert_file,
        tls_key_file=config.tls_key_file,
        tls_verify=config.tls_verify,
        connect_timeout_s=config.connect_timeout_ms / 1000,
        connect_wait_s=config.connect_wait_ms / 1000,
        call_timeout_s=config.call_timeout_ms / 1000,
        pool_size=config.pool_size,
        key_prefix=config.key_prefix,
        update_attempts=config.update_attempts,
        events_kept=config.events_kept if config.events == "shared" else 0,
    )


def open_redis(config: RedisConfig) -> RedisAdapter:
    """Open the adapter, connected. Raises StorageError."""
    return RedisAdapter(options_of(config), deliver)


class RedisScopes:
    """Makes the scopes of an engine whose state is in Redis."""

    def __init__(self, adapter: Any) -> None:
        self._store = adapter

    def make_scope(self, scope: str, around: Surroundings) -> ScopeActor:
        """Make the actor of one scope."""
        return RedisScopeActor(scope, around, self._store)
