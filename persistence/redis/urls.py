"""Addresses of Redis servers: `redis://`, `rediss://` and `unix://`; `host:port` of Sentinels.

Errors show only the scheme of an address and the names of its query options: in a misspelt address, any part may have
been meant as the password. For the same reason the errors of `urllib.parse`, which quote the address, are not chained.
"""

from __future__ import annotations

import re
from typing import NoReturn
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import msgspec

from scopestate.errors import ConfigError

PORT = 6379
SENTINEL_PORT = 26379
MAX_DATABASE = 2**31 - 1
MASK = "***"

_WRITE = "write redis://host:port, rediss://host:port for TLS, or unix:///path of a socket"
_ENCODE = "in a user name, a password or a path write `@`, `/`, `?`, `#`, `[`, `]` and spaces as %40, %2F, %3F, ..."
_HOST = re.compile(r"[\w.-]+(:.*)?|\[[0-9A-Fa-f:.]+(%[\w.-]+)?\](:.*)?")
_NO_HOST = "the address has a character in its host that no host has; write host:port"
_NO_PORT = (
    "the port is no whole number from 1 to 65535; write host:port, a password before it as in "
    "redis://:PASSWORD@host:port, an IPv6 address in brackets"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,19})://")
_HINTS = {
    "ws": "`ws://` is the address of another engine, for `name: bridge`",
    "wss": "`wss://` is the address of another engine, for `name: bridge`",
    "http": "`http://` is the address of a web server",
    "https": "`https://` is the address of a web server",
    "valkey": "Valkey has the address of Redis too",
    "valkeys": "Valkey has the address of Redis too",
    "redis+sentinel": "Sentinels are named in `sentinels`",
    "redis-sentinel": "Sentinels are named in `sentinels`",
}
# Options in the addresses of redis-py, redis-rs and go-redis, with the field that replaces them.
_FIELDS = {
    "username": "username",
    "user": "username",
    "password": "password",
    "pass": "password",
    "database": "database",
    "timeout": "connect_wait_ms",
    "pool_timeout": "connect_wait_ms",
    "socket_connect_timeout": "connect_timeout_ms",
    "dial_timeout": "connect_timeout_ms",
    "socket_timeout": "call_timeout_ms",
    "read_timeout": "call_timeout_ms",
    "max_connections": "pool_size",
    "pool_size": "pool_size",
    "ssl_ca_certs": "tls_ca_file",
    "ssl_certfile": "tls_cert_file",
    "ssl_keyfile": "tls_key_file",
    "ssl_cert_reqs": "tls_verify",
    "ssl_check_hostname": "tls_verify",
    "skip_verify": "tls_verify",
}


class RedisAddress(msgspec.Struct, frozen=True):
    """The address of a Redis server, and the login. All parts are decoded."""

    host: str
    """Name or IP address, IPv6 without brackets; "" if there is a `unix_path`."""
    port: int
    """1 to 65535; 0 if there is a `unix_path`."""
    unix_path: str | None = None
    tls: bool = False
    username: str | None = None
    password: str | None = None
    database: int | None = None
    """None if the address has no database."""

    def __repr__(self) -> str:
        return (
            f"RedisAddress(host={self.host!r}, port={self.port}, unix_path={self.unix_path!r}, tls={self.tls}, "
            f"username={self.username!r}, password={MASK if self.password is not None else None}, "
            f"database={self.database})"
        )


def parse_redis_url(url: str) -> RedisAddress:
    """Parse an address. An empty user name or password counts as missing; the default port is 6379.

    The database is the path (`redis://host/2`) or the query (`?db=2`), which works for `unix://` too.

    Raises:
        ConfigError: it is not an address; the text contains no user name and no password.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        raise ConfigError(f"the address does not begin with redis://, rediss:// or unix://; {_WRITE}")
    name = scheme[1].lower()
    if name not in {"redis", "rediss", "unix"}:
        raise ConfigError(f"{_HINTS.get(name, f'`{name}://` is no address of a Redis server')}; {_WRITE}")
    parts = _split(url)
    username, password = (_decoded(part) or None for part in (parts.username or "", parts.password or ""))
    if name == "unix":
        path = _unix_path(parts)
        return RedisAddress("", 0, path, False, username, password, _database("", parts.query))
    host, port = _host_and_port(parts, PORT)
    return RedisAddress(host, port, None, name == "rediss", username, password, _database(parts.path, parts.query))


def parse_sentinel(text: str) -> tuple[str, int]:
    """Parse `host`, `host:port` or `[IPv6]:port` of a Sentinel; the default port is 26379. Raises ConfigError."""
    if "@" in text or "://" in text:
        raise ConfigError(
            "a Sentinel is `host:port` alone; `sentinel_username` and `sentinel_password` say as whom to log in, "
            "and rediss:// in `redis_url` to use TLS"
        )
    if not text or re.search(r"[\s/?#,\\]", text) or not text.isprintable():
        raise ConfigError("a Sentinel is `host:port`, each an entry of its own, as in [one:26379, two:26379]")
    return _host_and_port(_split(f"//{text}"), SENTINEL_PORT)


def without_credentials(url: str, database: int | None = None) -> str:
    """Return the address without user name and password, for messages; `database` overrides its own.

    If it is not an address, return only the scheme.
    """
    try:
        address = parse_redis_url(url)
    except ConfigError:
        scheme = _SCHEME.match(url)
        return f"{scheme[0]}{MASK}" if scheme else MASK
    return _text(address, "", address.database if database is None else database)


def without_password(url: str) -> str:
    """Return the address with `***` for its password. If it is not an address, return only the scheme."""
    try:
        address = parse_redis_url(url)
    except ConfigError:
        return without_credentials(url)
    if address.username is None and address.password is None:
        return without_credentials(url)
    # A user name alone is masked too, as it may be meant as the password.
    login = MASK if address.password is None else f"{address.username or ''}:{MASK}"
    return _text(address, f"{login}@", address.database)


def _text(address: RedisAddress, login: str, database: int | None) -> str:
    if address.unix_path is not None:
        return f"unix://{login}{address.unix_path}" + ("" if database is None else f"?db={database}")
    host = f"[{address.host}]" if ":" in address.host else address.host
    path = "" if database is None else f"/{database}"
    return f"redis{'s' if address.tls else ''}://{login}{host}:{address.port}{path}"


def _split(url: str) -> SplitResult:
    # `urlsplit` silently drops tabs and line ends.
    if " " in url or not url.isprintable():
        raise ConfigError(f"the address has a space or an unprintable character in it; {_ENCODE}")
    # Versions of CPython differ in what `urlsplit` refuses in and around the brackets of an IPv6 address.
    host = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0].rpartition("@")[2]
    if "[" in host and "]" in host and _HOST.fullmatch(host) is None:
        raise ConfigError(_NO_HOST)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError(f"this is not an address; {_ENCODE}; an IPv6 address stands in brackets") from None
    if "@" in parts.path + parts.query + parts.fragment:
        raise ConfigError(f"what stands before the `@` of the address cannot be read; {_ENCODE}")
    if parts.fragment or url.endswith("#"):
        raise ConfigError(f"the address has a `#` in it; {_ENCODE}")
    return parts


def _host_and_port(parts: SplitResult, default: int) -> tuple[str, int]:
    try:
        port = parts.port
    except ValueError:
        raise ConfigError(_NO_PORT) from None
    if not parts.hostname:
        raise ConfigError("the address names no host; write host:port")
    if port == 0:
        raise ConfigError(_NO_PORT)
    # `urlsplit` accepts nearly any character in a host name.
    if _HOST.fullmatch(parts.netloc.rpartition("@")[2]) is None:
        raise ConfigError(_NO_HOST)
    return parts.hostname, default if port is None else port


def _unix_path(parts: SplitResult) -> str:
    if parts.netloc.rpartition("@")[2]:
        raise ConfigError("a socket has no host: begin its path with a slash, as in unix:///run/redis.sock")
    path = _decoded(parts.path)
    if path.endswith("/") or not path:
        raise ConfigError("the address names no socket; write its path, as in unix:///run/redis.sock")
    if "\0" in path:
        raise ConfigError("the path of the socket has a NUL character in it")
    return path


def _database(path: str, query: str) -> int | None:
    given = [path[1:]] if path not in {"", "/"} else []
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name != "db":
            _refuse_option(name)
        given.append(value)
    if len(given) > 1:
        raise ConfigError("the address names its database more than once; keep one of them")
    if not given:
        return None
    if re.fullmatch(r"[0-9]{1,10}", given[0]) is None or int(given[0]) > MAX_DATABASE:
        raise ConfigError(
            f"the database in the address is no whole number from 0 to {MAX_DATABASE}; write redis://host:port/2, "
            "or unix:///path?db=2"
        )
    return int(given[0])


def _refuse_option(name: str) -> NoReturn:
    what = f"query option `{name}`" if re.fullmatch(r"\w{1,40}", name, re.ASCII) else "a query option"
    field = _FIELDS.get(name.lower())
    rest = f"use the field `{field}`" if field else "the other options are fields beside `redis_url`"
    raise ConfigError(f"the address has {what}, and only `db` is read there; {rest}")


def _decoded(part: str) -> str:
    try:
        return unquote(part, errors="strict")
    except UnicodeDecodeError:
        raise ConfigError("the address has a %-code in it that is not UTF-8") from None
