"""Who may connect to a server, and what they may do there."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import translate
from pathlib import Path
from typing import Final

import msgspec

from scopestate.config import AuthConfig, ServerConfig, TokenConfig
from scopestate.config.schema import with_every_list
from scopestate.errors import ConfigError, Forbidden
from scopestate.ops.functions import BUILT_IN
from scopestate.paths import expand_home

ALWAYS_ALLOWED: Final = ("engine::channels::create", "engine::workers::register", "engine::log::*")
"""What every worker may call (docs/protocol.md, section 12)."""

ENGINE_NAMESPACES: Final = ("engine::", "state::")
"""Ids that begin like this are the engine's own: a pattern of `registers` matches one only if it begins so too."""

MAX_TOKEN_BYTES: Final = 8_192


class Access:
    """What the bearer of one token may do, and the owner of what its workers register (docs/rights.md).

    Patterns: `*` is any characters, `?` is one. Every check raises Forbidden.
    """

    def __init__(self, config: TokenConfig) -> None:
        self.workers = 0
        """Workers that are connected with it."""
        self.allow(config)

    def allow(self, config: TokenConfig) -> None:
        """Allow from now on what this entry says."""
        config = with_every_list(config)
        functions, read, write = config.functions or (), config.read or (), config.write or ()
        self._functions = _matcher((*functions, *ALWAYS_ALLOWED))
        self._registers = _matcher(config.registers)
        self._registers_ours = _matcher(name for name in config.registers if name.startswith(ENGINE_NAMESPACES))
        self._read = _matcher(read)
        self._write = _matcher(write)
        self.reads_everything = "*" in read
        self.writes_everything = "*" in write
        self.full = self.reads_everything and self.writes_everything and "*" in functions and "*" in config.registers
        """Whether it may do everything; then it also sees everything that others have registered."""

    def check_call(self, function_id: str) -> None:
        """Refuse a function that may not be called."""
        if not self._functions(function_id):
            raise Forbidden(f"the token of this connection does not allow to call {function_id!r}")

    def may_call(self, function_id: str) -> bool:
        """Return whether this function may be called."""
        return bool(self._functions(function_id))

    def check_register(self, function_id: str, what: str = "function") -> None:
        """Refuse the id of a function, or of a trigger type, that may not be registered."""
        ours = function_id.startswith(ENGINE_NAMESPACES)
        if not (self._registers_ours if ours else self._registers)(function_id):
            raise Forbidden(
                f"the token of this connection does not allow to register {what} {function_id!r}: see its `registers`"
            )

    def check_read(self, scope: str) -> None:
        """Refuse a scope that may not be read."""
        if not self._read(scope):
            raise Forbidden(f"the token of this connection does not allow to read scope {scope!r}")

    def check_write(self, scope: str) -> None:
        """Refuse a scope that may not be written."""
        if not self._write(scope):
            raise Forbidden(f"the token of this connection does not allow to write scope {scope!r}")

    def check_watch(self, scope: str | None) -> None:
        """Refuse a trigger on a scope that may not be read; None: on every scope."""
        if scope is not None:
            self.check_read(scope)
        elif not self.reads_everything:
            raise Forbidden("the token of this connection does not allow a trigger on every scope: name one")

    def check_trigger_call(self, function_id: str, scope: str | None) -> None:
        """Refuse a function that a trigger would call with an event of `scope`; None: with any scope in its input.

        For a state function the token needs the right on that scope too: it would act on the scope of the event.
        """
        self.check_call(function_id)
        row = BUILT_IN.get(function_id)
        right = None if row is None else row.right
        if right == "write" and scope is not None:
            self.check_write(scope)
        elif right == "read" and scope is not None:
            self.check_read(scope)
        elif (right == "write" and not self.writes_everything) or (right == "read" and not self.reads_everything):
            raise Forbidden(f"the token of this connection does not allow {function_id!r} on every scope")

    def check_delivery(self, function_id: str, scope: str) -> None:
        """Refuse to call a function with an event of `scope`: it must be readable, and the function callable."""
        self.check_read(scope)
        self.check_trigger_call(function_id, scope)

    def readable(self, scopes: Iterable[str]) -> list[str]:
        """Return the scopes that may be read."""
        return [scope for scope in scopes if self._read(scope)]


class Gate:
    """Decides at the handshake who may connect."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError if a token cannot be had or stands there twice, or if the address needs one."""
        self._accesses = {digest: Access(token) for digest, token in _read_tokens(config.auth).items()}
        self._origins = frozenset(origin.lower().rstrip("/") for origin in config.origins)
        if not self._accesses and not config.insecure and not is_loopback(config.host):
            raise ConfigError(
                f"{config.host!r} can be reached from other machines, where any program could read and write "
                "everything: give `auth.tokens`, listen on 127.0.0.1, or say `insecure: true`",
                key="iii-worker-manager.config.host",
            )

    def reload(self, auth: AuthConfig) -> list[Access]:
        """Have other tokens, or the same with other rights, from now on; return what of the old ones is withdrawn.

        Raises ConfigError, and nothing has changed then: as in the constructor, or if the first token would come or the
        last one go. That decides whether all connections need one, those that stand too.
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
        """Return whether the bearer may connect, and its restrictions; without tokens everybody may do everything."""
        if not self._accesses:
            return True, None
        scheme, _, token = (authorization or "").partition(" ")
        found: Access | None = None
        if scheme.lower() == "bearer" and len(token) <= MAX_TOKEN_BYTES:
            given = _digest(token.strip())
            # All of them, whichever fits: how long this takes says nothing about the tokens.
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
        raise ConfigError("two entries are the same token: which of them counts?", key="auth.tokens")
    return tokens


def mistakes(config: ServerConfig) -> Iterator[ConfigError]:
    """Yield everything for which a `Gate` would be refused."""
    found = False
    for token in config.auth.tokens:
        try:
            token_of(token)
        except ConfigError as error:
            found = True
            yield error
    try:
        # Beside a token that cannot be had, what else is wrong shows without it.
        Gate(msgspec.structs.replace(config, auth=AuthConfig(), insecure=True) if found else config)
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


def _digest(token: str) -> bytes:
    # Tokens of different lengths compare in the same time, and the tokens themselves are not kept.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _matcher(patterns: Iterable[str]) -> Callable[[str], object]:
    patterns = tuple(patterns)
    if "*" in patterns:
        return lambda name: True
    # `fnmatch` also knows `[...]`; in a name a bracket is just a bracket.
    return re.compile("|".join(translate(pattern.replace("[", "[[]")) for pattern in patterns) or r"(?!)").match
