"""What a Redis adapter is told."""

from __future__ import annotations

import msgspec


class RedisOptions(msgspec.Struct, frozen=True):
    """Where Redis is and how to talk to it. Times in seconds."""

    host: str = "localhost"
    port: int = 6379
    unix_path: str | None = None
    """A socket of this machine, instead of host and port."""
    username: str | None = None
    password: str | None = None
    database: int = 0
    address: str = "redis://localhost:6379"
    """For messages; without a password."""
    sentinels: tuple[tuple[str, int], ...] = ()
    """Hosts and ports of Sentinels; then they say where the primary is, and `host` and `port` do not count."""
    sentinel_service: str = "mymaster"
    sentinel_username: str | None = None
    sentinel_password: str | None = None
    tls: bool = False
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    tls_verify: bool = True
    connect_timeout_s: float = 5.0
    connect_wait_s: float = 5.0
    call_timeout_s: float = 5.0
    pool_size: int = 8
    key_prefix: str = "state:"
    update_attempts: int = 100
    events_kept: int = 0
    """How many events the stream keeps; 0: events are not shared."""
    delivery: str = "each"
    """`each`: every engine gets every event; `one`: one engine of the group does."""
    group: str = "scopestate"
    claim_after_s: float = 30.0
    """When the events of an engine that shows no life go to another one of its group."""

    def __repr__(self) -> str:
        return f"RedisOptions({self.address})"  # the fields include passwords
