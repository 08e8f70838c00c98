"""What the options of the redis adapter mean together, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from scopestate.config.schema import RedisConfig
from scopestate.errors import ConfigError
from scopestate.persistence.redis.urls import RedisAddress, parse_redis_url, parse_sentinel

_TLS = ("tls_ca_file", "tls_cert_file", "tls_key_file", "tls_verify")
_SENTINEL = ("sentinel_service", "sentinel_username", "sentinel_password")


class Mistake(NamedTuple):
    """What is wrong, and with which field. `item` counts from 0 if it is one entry of a list."""

    key: str
    problem: str
    item: int | None = None


def server_address(config: RedisConfig) -> RedisAddress:
    """Return where the server is and as whom to log in: what the fields say goes before what `redis_url` says.

    With `sentinels`, host and port do not count, all else does.

    Raises:
        ConfigError: `redis_url` is not an address.
    """
    address = parse_redis_url(config.redis_url)
    given = {name: getattr(config, name) for name in ("username", "password", "database")}
    return msgspec.structs.replace(address, **{name: value for name, value in given.items() if value is not None})


def mistakes(config: RedisConfig) -> Iterator[Mistake]:
    """Yield what types alone do not tell. A field that is named here is never one at its default."""
    address, problem = _tried(parse_redis_url, config.redis_url)
    if problem is not None:
        yield Mistake("redis_url", problem)
    for i, sentinel in enumerate(config.sentinels):
        _, problem = _tried(parse_sentinel, sentinel)
        if problem is not None:
            yield Mistake("sentinels", problem, i)
    if address is not None and address.unix_path is not None and config.sentinels:
        yield Mistake("sentinels", "Sentinels name a server by host and port; `redis_url` cannot be unix:// with them")
    if not config.sentinels:
        for name in _changed(config, _SENTINEL):
            yield Mistake(name, "there are no `sentinels`; name them, or remove this")
    if address is not None and not address.tls:
        for name in _changed(config, _TLS):
            yield Mistake(name, "the connection has no TLS; write rediss:// in `redis_url`, or remove this")
    if config.tls_key_file is not None and config.tls_cert_file is None:
        yield Mistake("tls_key_file", "a key without its certificate; give `tls_cert_file` too")
    if config.delivery == "one" and config.events != "shared":
        yield Mistake("delivery", "`one` is a choice among the engines that share events; write `events: shared` too")
    if not config.group:
        yield Mistake("group", "expected a non-empty string")


def _tried(parse: Callable[[str], RedisAddress | tuple[str, int]], text: str) -> tuple[RedisAddress | None, str | None]:
    """Return what `parse` gives, if it is an address, and what is wrong."""
    try:
        found = parse(text)
    except ConfigError as error:
        return None, error.problem
    return found if isinstance(found, RedisAddress) else None, None


def _changed(config: RedisConfig, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(config, name) != getattr(RedisConfig(), name)]
