"""The options of Redis: their mistakes, what follows from them, and the addresses of servers and Sentinels in them.

Errors show only the scheme of an address and the names of its query options: in a misspelt address, any part may have
been meant as the password. For the same reason the errors of `urllib.parse`, which quote the address, are not chained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, Literal, NoReturn, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import msgspec

from scopestate.actors.ports import Mistake, Options, Wait
from scopestate.errors import ConfigError
from scopestate.paths import expand_home

_TLS_FILES = ("tls_ca_file", "tls_cert_file", "tls_key_file")
_TLS = (*_TLS_FILES, "tls_verify")
_SENTINEL = ("sentinel_service", "sentinel_username", "sentinel_password")

_A = TypeVar("_A")

PORT = 6379
SENTINEL_PORT = 26379
MAX_DATABASE = 2**31 - 1
MASK = "***"

_WRITE = "write redis://host:port, rediss://host:port for TLS, or unix:///path of a socket"
_ENCODE = "in a user name, a password or a path write `@`, `/`, `?`, `#`, `[`, `]` and spaces as %40, %2F, %3F, ..."
_HOST = re.compile(r"[\w.-]+(:.*)?|\[[0-9A-Fa-f:.]+(%[\w.-]+)?\](:.*)?")
_NO_HOST = "the host in the address contains an invalid character; write host:port"
_NO_PORT = (
    "the port is not a whole number from 1 to 65535; write host:port, a password before it as in "
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


class RedisOptions(Options, frozen=True):
    """`adapter: {name: redis, config: ...}`: scopes live in Redis or Valkey, shared by any number of engines.

    A reload changes none of it.
    """

    removed: ClassVar[dict[str, str]] = dict.fromkeys(
        ("delivery", "group", "claim_after_ms"),
        "give the trigger a name, `durable: NAME`, in its own section: of all engines that have a trigger of this name "
        "one gets each event, and another engine gets it if that one does not handle it within `ack_wait`",
    )

    redis_url: str = "redis://localhost:6379"
    """`redis://host:port`, `rediss://host:port` (TLS) or `unix:///path`. `user:password@` may stand before the host or
    path, percent-encoded; `/2`, for a path `?db=2`, is the database."""
    username: str | None = None
    """Overrides the one in `redis_url`."""
    password: str | None = None
    """Overrides the one in `redis_url`; better as `${VARIABLE}`; never logged."""
    database: Annotated[int, msgspec.Meta(ge=0, le=MAX_DATABASE)] | None = None
    """Overrides the one in `redis_url`; 0 if neither is given."""
    key_prefix: str = "state:"
    """A scope is the hash whose key is this prefix and the name of the scope. iii's prefix is `state:`."""
    sentinels: tuple[str, ...] = ()
    """`host:port` of Redis Sentinels; without a port it is 26379. They name the primary, and the host of `redis_url`
    does not count; its `rediss://` holds for them too."""
    sentinel_service: str = "mymaster"
    """The name of the service in the Sentinels' configuration."""
    sentinel_username: str | None = None
    """User name for the Sentinels, which do not get `username` and `password`."""
    sentinel_password: str | None = None
    """Password for the Sentinels, better as `${VARIABLE}`; never logged."""
    tls_ca_file: str | None = None
    """PEM file of the authorities to trust for `rediss://`; left out: the system's."""
    tls_cert_file: str | None = None
    """PEM file of the certificate to show to the server; left out: none is shown."""
    tls_key_file: str | None = None
    """PEM file of the private key; left out: it is in `tls_cert_file`."""
    tls_verify: bool = True
    """`false`: accept any certificate, so any server may be at the other end."""
    connect_timeout_ms: Wait = 5_000
    """The longest time for opening the engine, and for each later attempt to connect."""
    connect_wait_ms: Wait = 5_000
    """How long a call waits for a connection before it fails with nothing sent."""
    call_timeout_ms: Wait = 5_000
    """How long a call waits for the answer after it was sent."""
    pool_size: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8
    """Connections to each server, at most."""
    update_attempts: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 100
    """Attempts of an update while other engines change the key, before it fails with nothing written."""
    revisions: bool = True
    """`true`: each key has a revision, and may have a deadline, kept in keys `scopestate:...` beside those of iii.
    `false`: nothing is kept beside iii's keys, and what needs revisions or deadlines is refused."""
    events: Literal["local", "shared"] = "local"
    """`local`: triggers get the events of writes through this engine. `shared`: of every write of every engine with
    `events: shared` on this database and prefix."""
    events_kept: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] = 10_000
    """With `events: shared`: about how many events the stream keeps, beside those that durable triggers still need. An
    engine that is further behind reports a gap."""
    journal_events: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] = 1_000_000
    """With `events: shared` and durable triggers: about how many events the stream may hold. The engine that registered
    one last decides for all."""
    journal_when_full: Literal["block", "pause"] = "block"
    """`block`: writes wait, at most `call_timeout_ms`, and fail then with nothing written. `pause`: the oldest events
    are trimmed, and what a durable trigger has lost by that is reported."""

    @property
    def address(self) -> str:
        """The address for messages, without user name and password."""
        if self.sentinels:
            # An entry with more than host and port is an error, but it may contain a password.
            named = ", ".join(MASK if "@" in sentinel else sentinel for sentinel in self.sentinels)
            return f"{self.sentinel_service!r} of the Sentinels {named}"
        return without_credentials(self.redis_url, self.database)

    @property
    def server(self) -> RedisAddress:
        """The address and login of the server: `username`, `password` and `database` override `redis_url`.

        With `sentinels`, host and port are not used. Raises ConfigError if `redis_url` is not an address.
        """
        given = {"username": self.username, "password": self.password, "database": self.database}
        return msgspec.structs.replace(
            parse_redis_url(self.redis_url), **{name: value for name, value in given.items() if value is not None}
        )

    @property
    def sentinel_addresses(self) -> tuple[tuple[str, int], ...]:
        """Hosts and ports of the Sentinels. Raises ConfigError."""
        return tuple(parse_sentinel(sentinel) for sentinel in self.sentinels)

    @property
    def shares_events(self) -> bool:
        """True if triggers get the events of every engine."""
        return self.events == "shared"

    @property
    def tls_files(self) -> dict[str, str | None]:
        """The files for TLS by the names of their options, with `~` expanded. Raises ConfigError."""
        given = {name: getattr(self, name) for name in _TLS_FILES}
        return {name: path and expand_home(path) for name, path in given.items()}

    @property
    def connect_timeout_s(self) -> float:
        """`connect_timeout_ms` in seconds."""
        return self.connect_timeout_ms / 1000

    @property
    def connect_wait_s(self) -> float:
        """`connect_wait_ms` in seconds."""
        return self.connect_wait_ms / 1000

    @property
    def call_timeout_s(self) -> float:
        """`call_timeout_ms` in seconds."""
        return self.call_timeout_ms / 1000

    def mistakes(self) -> Iterator[Mistake]:
        """Yield the mistakes that the types do not show."""
        address, problem = _tried(parse_redis_url, self.redis_url)
        if problem is not None:
            yield Mistake("redis_url", problem)
        for i, sentinel in enumerate(self.sentinels):
            _, problem = _tried(parse_sentinel, sentinel)
            if problem is not None:
                yield Mistake("sentinels", problem, i)
        if address is not None and address.unix_path is not None and self.sentinels:
            yield Mistake(
                "sentinels", "Sentinels name a server by host and port; `redis_url` cannot be unix:// with them"
            )
        if not self.sentinels:
            for name in self._changed(_SENTINEL):
                yield Mistake(name, "there are no `sentinels`; name them, or remove this")
        if address is not None and not address.tls:
            for name in self._changed(_TLS):
                yield Mistake(name, "the connection has no TLS; write rediss:// in `redis_url`, or remove this")
        if self.tls_key_file is not None and self.tls_cert_file is None:
            yield Mistake("tls_key_file", "a key without its certificate; give `tls_cert_file` too")

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        defaults = RedisOptions()
        return [name for name in names if getattr(self, name) != getattr(defaults, name)]

    def described(self) -> str:
        """Describe where the state is kept."""
        return f"Redis at {self.address}, {self.events} events"

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["redis_url"] = without_password(self.redis_url)
        shown["sentinels"] = tuple(MASK if "@" in sentinel else sentinel for sentinel in self.sentinels)
        for name in ("password", "sentinel_password"):
            if shown[name] is not None:
                shown[name] = MASK
        return f"RedisOptions({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _tried(parse: Callable[[str], _A], text: str) -> tuple[_A | None, str | None]:
    """Return the parsed address, or the problem."""
    try:
        return parse(text), None
    except ConfigError as error:
        return None, error.problem


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
        raise ConfigError(f"{_HINTS.get(name, f'`{name}://` is not the address of a Redis server')}; {_WRITE}")
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
        raise ConfigError(f"this is not an address; {_ENCODE}; write an IPv6 address in brackets") from None
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
            f"the database in the address is not a whole number from 0 to {MAX_DATABASE}; write redis://host:port/2, "
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
