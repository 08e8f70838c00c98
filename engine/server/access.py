"""Which tokens may connect to a server, what they allow there, and which names belong to them."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import msgspec

from scopestate.config import AuthConfig, ServerConfig, TokenConfig
from scopestate.config.schema import with_every_list
from scopestate.errors import ConfigError, Forbidden
from scopestate.ops.functions import BUILT_IN, Right
from scopestate.paths import expand_home

if TYPE_CHECKING:
    from scopestate.server.worker import Worker

ALWAYS_ALLOWED: Final = ("engine::channels::create", "engine::workers::register", "engine::log::*")
"""Functions that every worker may call (docs/reference/protocol.md, section 12)."""

ENGINE_NAMESPACES: Final = ("engine::", "state::")
"""Prefixes of the engine's own ids. A pattern of `registers` must have the same prefix to match one."""

METRICS_ID: Final = "engine::metrics"
"""A token that is not full must name this in `functions` to read `/metrics`. Patterns do not match it: the figures are
those of the whole engine, and name the durable triggers of every token."""

MAX_TOKEN_BYTES: Final = 8_192

MAX_KEPT: Final = 1_000
"""Names kept for one token while no worker offers them. With more, the oldest are freed."""
MAX_KEPT_LENGTH: Final = 256
"""Longer names are not kept."""

T = TypeVar("T")


class Access:
    """The rights of one token's bearer. It owns what the token's workers register (docs/reference/rights.md).

    Patterns: `*` is any characters, `?` is one. Every check raises Forbidden.
    """

    def __init__(self, config: TokenConfig) -> None:
        self.workers = 0
        """Number of workers that are connected with the token."""
        self.allow(config)

    def allow(self, config: TokenConfig) -> None:
        """Replace the rights by those of a configuration entry."""
        config = with_every_list(config)
        functions, read, write = config.functions or (), config.read or (), config.write or ()
        self._functions = _matcher((*functions, *ALWAYS_ALLOWED))
        self._registers = _matcher(config.registers)
        self._registers_ours = _matcher(name for name in config.registers if name.startswith(ENGINE_NAMESPACES))
        self._read = _matcher(read)
        self._write = _matcher(write)
        self._begun = {"read": _beginnings(read), "write": _beginnings(write)}
        self.name = config.name
        self.full = all("*" in patterns for patterns in (functions, config.registers, read, write))
        """Whether it may do everything; then it also sees what other tokens have registered."""
        self.reads_metrics = self.full or METRICS_ID in functions
        """Whether it may read the figures of the engine."""

    def check_call(self, function_id: str) -> None:
        """Refuse a function that may not be called."""
        if not self._functions(function_id):
            raise Forbidden(f"the token of this connection may not call {function_id!r}")

    def may_call(self, function_id: str) -> bool:
        """Return whether this function may be called."""
        return bool(self._functions(function_id))

    def check_register(self, function_id: str, what: str = "function") -> None:
        """Refuse the id of a function, or of a trigger type, that may not be registered."""
        ours = function_id.startswith(ENGINE_NAMESPACES)
        if not (self._registers_ours if ours else self._registers)(function_id):
            raise Forbidden(
                f"the token of this connection may not register {what} {function_id!r}: see its `registers`"
            )

    def check_read(self, scope: str) -> None:
        """Refuse a scope that may not be read."""
        if not self._read(scope):
            raise Forbidden(f"the token of this connection may not read scope {scope!r}")

    def check_write(self, scope: str) -> None:
        """Refuse a scope that may not be written."""
        if not self._write(scope):
            raise Forbidden(f"the token of this connection may not write scope {scope!r}")

    def check_scope(self, scope: str, rights: tuple[Right, ...]) -> None:
        """Refuse a scope on which one of these rights is missing."""
        for right in rights:
            if right == "write":
                self.check_write(scope)
            else:
                self.check_read(scope)

    def covers(self, right: Right, scope_prefix: str) -> bool:
        """Return whether it has a right on every scope with this prefix."""
        return scope_prefix.startswith(self._begun[right])

    def check_watch(self, scope: str | None, scope_prefix: str | None = None) -> None:
        """Refuse a trigger on a scope that may not be read. None: on all scopes, or all with the prefix."""
        if scope is not None:
            self.check_read(scope)
        elif not self.covers("read", scope_prefix or ""):
            if scope_prefix is None:
                raise Forbidden("the token of this connection may not register a trigger on every scope: name one")
            raise Forbidden(f"the token of this connection may not read every scope {scope_prefix!r}...")

    def check_trigger_call(self, function_id: str, scope: str | None, scope_prefix: str | None = None) -> None:
        """Refuse a function that a trigger would call with an event of `scope`; None: with any scope in its input.

        For a state function the token needs the right on that scope too: it would act on the scope of the event.
        """
        self.check_call(function_id)
        row = BUILT_IN.get(function_id)
        rights = () if row is None else row.rights
        if scope is not None:
            self.check_scope(scope, rights)
        elif not all(self.covers(right, scope_prefix or "") for right in rights):
            raise Forbidden(f"the token of this connection may not call {function_id!r} on every scope")

    def consumer(self, name: str) -> str:
        """Return the full name of the consumer that the bearer calls `name`.

        Full names of a limited token's consumers begin with the token's name, so that no token can name those of
        another. Raises Forbidden if the token may have no consumers.
        """
        if self.full:
            return name
        if self.name is None:
            raise Forbidden("the token of this connection has no consumers: give it a `name` in the configuration")
        return f"{self.name}/{name}"

    def own_consumer(self, whole: str) -> str | None:
        """Return the bearer's name for a consumer with this full name; None if it may not see it."""
        if self.full:
            return whole
        owner, slash, name = whole.partition("/")
        return name if slash and owner == self.name else None

    def check_delivery(self, function_id: str, scope: str) -> None:
        """Refuse to call a function with an event of `scope`: it must be readable, and the function callable."""
        self.check_read(scope)
        self.check_trigger_call(function_id, scope)

    def may_read(self, scope: str) -> bool:
        """Return whether a scope may be read."""
        return bool(self._read(scope))

    def readable(self, scopes: Iterable[str]) -> list[str]:
        """Return the scopes that may be read."""
        return [scope for scope in scopes if self._read(scope)]


class Claims(Generic[T]):
    """Name -> the offers of workers under it. The newest offer serves; when it is removed, the one before serves again.

    All workers that offer the same name have the same token (`Worker.access`; without tokens, None for all). When the
    last of them is disconnected, the name is kept for the token as long as another of its workers is connected: no
    other token can take the name during the second of a restart. On the server's event loop only.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._offers: dict[str, dict[Worker, T]] = {}
        self._kept: dict[str, Access] = {}
        self._kept_of: dict[Access, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._offers)

    def offered_by(self, worker: Worker) -> list[str]:
        """Return the names that this worker offers, whether its offers serve or not."""
        return [name for name, offers in self._offers.items() if worker in offers]

    def serving(self, name: str) -> T | None:
        """Return the offer that serves this name, or None."""
        offers = self._offers.get(name)
        return None if offers is None else next(reversed(offers.values()))

    def all(self) -> list[T]:
        """Return the serving offer of each name."""
        return [next(reversed(offers.values())) for offers in self._offers.values()]

    def only_by(self, name: str, worker: Worker) -> bool:
        """Return whether only this worker offers the name."""
        offers = self._offers.get(name)
        return offers is not None and len(offers) == 1 and worker in offers

    def belongs_to(self, name: str, access: Access | None) -> bool:
        """Return whether the name is offered by, or kept for, the workers of this token."""
        offers = self._offers.get(name)
        if offers is not None:
            return next(iter(offers)).access is access
        return access is not None and self._kept.get(name) is access

    def check(self, name: str, access: Access | None) -> None:
        """Raise Forbidden if the name belongs to another token."""
        if (name in self._offers or name in self._kept) and not self.belongs_to(name, access):
            raise Forbidden(f"{self._what} {name!r} is another worker's, which has another token: choose another")

    def put(self, name: str, worker: Worker, offer: T) -> None:
        """Let this worker serve the name, which `check` has passed. Its earlier offer under the name is replaced."""
        self._release(name)
        offers = self._offers.setdefault(name, {})
        offers.pop(worker, None)
        offers[worker] = offer

    def remove(self, name: str, worker: Worker, *, keep: bool) -> bool:
        """Remove this worker's offer; return whether it was the one that served the name.

        With `keep`, if it was the last offer, keep the name for the token: for a lost worker, not for one that
        withdraws.
        """
        offers = self._offers.get(name)
        if offers is None or worker not in offers:
            return False
        served = next(reversed(offers)) is worker
        del offers[worker]
        if not offers:
            del self._offers[name]
            if keep and worker.access is not None:
                self._keep(name, worker.access)
        return served

    def clear(self, name: str) -> list[T]:
        """Remove and return all offers under this name, which is then free."""
        return list(self._offers.pop(name, {}).values())

    def last_worker_left(self, access: Access) -> None:
        """Free the names kept for a token of which no worker is connected any more."""
        for name in self._kept_of.pop(access, ()):
            del self._kept[name]

    def _keep(self, name: str, access: Access) -> None:
        if len(name) > MAX_KEPT_LENGTH:
            return
        kept = self._kept_of.setdefault(access, {})
        kept[name] = None
        self._kept[name] = access
        if len(kept) > MAX_KEPT:
            self._release(next(iter(kept)))

    def _release(self, name: str) -> None:
        access = self._kept.pop(name, None)
        if access is not None:
            del self._kept_of[access][name]


class AccessCheck:
    """Decides at the handshake which connections are accepted."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError if a token cannot be read or occurs twice, or if the address needs one."""
        self._accesses = {digest: Access(token) for digest, token in _read_tokens(config.auth).items()}
        self._origins = frozenset(origin.lower().rstrip("/") for origin in config.origins)
        if not self._accesses and not config.insecure and not is_loopback(config.host):
            raise ConfigError(
                f"{config.host!r} can be reached from other machines, where any program could read and write "
                "everything: give `auth.tokens`, listen on 127.0.0.1, or say `insecure: true`",
                key="iii-worker-manager.config.host",
            )

    def reload(self, auth: AuthConfig) -> list[Access]:
        """Replace the tokens and their rights; return the tokens that are withdrawn.

        Raises ConfigError, and changes nothing then: as in the constructor, or if the first token would be added or the
        last one removed. That decides whether connections need a token, open ones included.
        """
        tokens = _read_tokens(auth)
        if bool(tokens) != bool(self._accesses):
            raise ConfigError("whether there are tokens at all is decided when the server starts", key="auth.tokens")
        before = self._accesses
        self._accesses = {digest: before.get(digest) or Access(token) for digest, token in tokens.items()}
        for digest, token in tokens.items():
            self._accesses[digest].allow(token)
        return [access for digest, access in before.items() if digest not in tokens]

    def admits(self, authorization: str | None) -> tuple[bool, Access | None]:
        """Return whether the bearer may connect, and its rights; None: there are no tokens, so it may do everything."""
        if not self._accesses:
            return True, None
        scheme, _, token = (authorization or "").partition(" ")
        found: Access | None = None
        if scheme.lower() == "bearer" and len(token) <= MAX_TOKEN_BYTES:
            given = _digest(token.strip())
            # Compare with all of them, even after a match, so that the time taken reveals nothing about the tokens.
            for digest, access in self._accesses.items():
                if hmac.compare_digest(digest, given):
                    found = access
        return found is not None, found

    def admits_origin(self, origin: str | None) -> bool:
        """Return whether a page of this origin may connect. Browsers always send the header."""
        return origin is None or "*" in self._origins or origin.lower().rstrip("/") in self._origins


def _read_tokens(auth: AuthConfig) -> dict[bytes, TokenConfig]:
    tokens = {_digest(token_of(token)): token for token in auth.tokens}
    if len(tokens) < len(auth.tokens):
        raise ConfigError("two entries have the same token; remove one of them", key="auth.tokens")
    return tokens


def mistakes(config: ServerConfig) -> Iterator[ConfigError]:
    """Yield every mistake for which AccessCheck would raise."""
    found = False
    for token in config.auth.tokens:
        try:
            token_of(token)
        except ConfigError as error:
            found = True
            yield error
    try:
        # With a token that cannot be read, the other mistakes are found without the tokens.
        AccessCheck(msgspec.structs.replace(config, auth=AuthConfig(), insecure=True) if found else config)
    except ConfigError as error:
        yield error


def token_of(config: TokenConfig) -> str:
    """Return a configured token. Raises ConfigError, which does not show it."""
    if config.env is not None:
        token, where = os.environ.get(config.env, ""), f"environment variable {config.env}"
    elif config.file is not None:
        where = f"file {config.file}"
        try:
            token = Path(expand_home(config.file)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read a token from {where}: {error}", key="auth.tokens") from error
    else:
        token, where = config.token or "", "`token`"
    token = token.strip()
    if not token:
        raise ConfigError(f"there is no token in {where}", key="auth.tokens")
    if not token.isascii() or not token.isprintable() or " " in token or len(token) > MAX_TOKEN_BYTES:
        raise ConfigError(f"the token in {where} has characters that a header cannot carry", key="auth.tokens")
    return token


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cannot_be_rebound(host: str | None, own: str) -> bool:
    """Return whether a request with this `Host` header cannot come from a web page of another host.

    A page can later make its own host name point at this machine, and can then read the answers. It cannot do so with
    an IP address, the server's own name, or a name without a dot.
    """
    if host is None:
        return True  # not from a browser
    name = host.strip().rpartition("]")[0].lstrip("[") or host.strip().partition(":")[0]
    if name.lower() == own.lower():
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name
    return True


def _digest(token: str) -> bytes:
    # Tokens of different lengths compare in the same time, and the tokens themselves are not kept.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _beginnings(patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the prefixes of which these patterns match every name: `a-` for `a-*`."""
    ended = [pattern.rstrip("*") for pattern in patterns if pattern.endswith("*")]
    return tuple(begun for begun in ended if not {"*", "?"}.intersection(begun))


def _matcher(patterns: Iterable[str]) -> Callable[[str], object]:
    patterns = tuple(patterns)
    if "*" in patterns:
        return lambda name: True
    # `fnmatch` also knows `[...]`; in a name a bracket is just a bracket.
    return re.compile("|".join(translate(pattern.replace("[", "[[]")) for pattern in patterns) or r"(?!)").match
