"""A cache backend for Django, whose entries are in a directory, in memory, or in any scope of an engine.

    CACHES = {
        "default": {
            "BACKEND": "scopestate.integrations.django.StateCache",
            "LOCATION": BASE_DIR / "cache",
        }
    }

Needs the extra `django`. docs/how-to/caches.md says what it holds, and what its options are.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

try:
    from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache
    from django.core.exceptions import ImproperlyConfigured
    from django.http import HttpResponse
    from django.http.response import HttpResponseBase
    from django.utils.functional import Promise
    from django.utils.module_loading import import_string
    from django.utils.safestring import SafeString, mark_safe
except ImportError as error:
    raise ImportError("scopestate.integrations.django needs Django: pip install 'scopestate[django]'") from error

from scopestate.engine import Engine
from scopestate.integrations.cache import Cache
from scopestate.integrations.cache.values import hold
from scopestate.signals import Guard

__all__ = ["StateCache"]

_ABSENT: Final = object()
_OPTIONS: Final = frozenset(
    {"engine", "scope", "durability", "save_interval_ms", "size_limit", "max_entries", "cull_frequency", "serializer"}
)


class Serializer(Protocol):
    """A class that `serializer` in OPTIONS may name, like `django.core.cache.backends.redis.RedisSerializer`."""

    def dumps(self, value: Any, /) -> bytes | int:
        """Return a value as bytes. Whole numbers are returned as they are, so that `incr` can count."""

    def loads(self, data: Any, /) -> Any:
        """Return the value for something that `dumps` has returned."""


class StateCache(BaseCache):  # type: ignore[misc]  # Django has no types
    """A Django cache. Each thread of a process has its own object; objects with the same settings share one `Cache`.

    The engine is opened at the first call, in each process that serves requests. Processes with the same directory
    share it (docs/how-to/sharing.md). Each write of one key is one step, also `incr`, `add` and `touch`, from any
    number of processes. Errors of the engine reach the caller: see `Cache`.
    """

    def __init__(self, location: str | os.PathLike[str], params: dict[str, Any]) -> None:
        """`location` and `params` are `LOCATION` and the rest of an entry in `CACHES`."""
        super().__init__(params)
        self._location = location
        given: Mapping[str, Any] = params.get("OPTIONS", {})
        self._options = {name.lower(): value for name, value in given.items()}
        if unknown := sorted(set(self._options) - _OPTIONS):
            raise ImproperlyConfigured(
                f"StateCache does not know {', '.join(unknown)} in OPTIONS; it knows {', '.join(sorted(_OPTIONS))}"
            )
        if location and "engine" in self._options:
            raise ImproperlyConfigured("StateCache takes LOCATION, a directory, or OPTIONS['engine'], and not both")
        self._serializer = _serializer_of(self._options.get("serializer"))
        self._shared: Cache | None = None

    @property
    def _cache(self) -> Cache:
        """The cache that all threads of this process share."""
        if self._shared is None:
            self._shared = _shared_cache(self._location, self._options)
        return self._shared

    # --------------------------------------------------------------------------------------------------- one entry

    def _expire(self, timeout: Any) -> float | None:
        """Return in how many seconds an entry expires; None: never."""
        return self.default_timeout if timeout is DEFAULT_TIMEOUT else timeout  # type: ignore[no-any-return]

    def _packed(self, value: Any) -> Any:
        if self._serializer is not None:
            return self._serializer.dumps(value)
        if isinstance(value, HttpResponseBase):
            return _Response(value)
        return str(value) if isinstance(value, Promise) else value

    def _unpacked(self, value: Any) -> Any:
        return self._serializer.loads(value) if self._serializer is not None else value

    def get(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        """Return a new copy of a value, or `default`."""
        value = self._cache.get(self.make_and_validate_key(key, version), _ABSENT)
        return default if value is _ABSENT else self._unpacked(value)

    def has_key(self, key: Any, version: int | None = None) -> bool:
        """Return whether the key exists."""
        return self.make_and_validate_key(key, version) in self._cache

    def set(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        """Set a value. Raises InvalidValue, with the path, for a value that the cache cannot hold."""
        self._cache.set(self.make_and_validate_key(key, version), self._packed(value), self._expire(timeout))

    def add(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Set a value if the key does not exist; return whether it was set."""
        return self._cache.add(self.make_and_validate_key(key, version), self._packed(value), self._expire(timeout))

    def touch(self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Make an entry expire in `timeout` seconds from now; return whether it exists."""
        return self._cache.touch(self.make_and_validate_key(key, version), self._expire(timeout))

    def delete(self, key: Any, version: int | None = None) -> bool:
        """Remove an entry; return whether there was one."""
        return self._cache.delete(self.make_and_validate_key(key, version))

    def incr(self, key: Any, delta: int = 1, version: int | None = None) -> Any:
        """Add `delta` in one step; the deadline stays. Raises ValueError if the key does not exist."""
        try:
            return self._cache.incr(self.make_and_validate_key(key, version), delta, default=None)
        except KeyError:
            raise ValueError(f"Key {key!r} not found") from None

    # ------------------------------------------------------------------------------------------------ many entries

    def set_many(
        self, data: Mapping[Any, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[Any]:
        """Set many values, 500 in each step. Returns [], as no key can fail alone."""
        self._cache.set_many(self._named(data, version), self._expire(timeout))
        return []

    def _named(self, data: Mapping[Any, Any], version: int | None) -> dict[str, Any]:
        return {self.make_and_validate_key(key, version): self._packed(value) for key, value in data.items()}

    def delete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        """Remove many entries, 500 in each step."""
        self._cache.delete_many([self.make_and_validate_key(key, version) for key in keys])

    def clear(self) -> None:
        """Remove all entries of the scope: those of every prefix and version."""
        self._cache.clear()

    # ----------------------------------------------------------------------------------------------------- asyncio

    # Calls that are not defined here run the ones above on a thread, as in Django's own backends.

    async def aget(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        """As `get`."""
        value = await self._cache.aio.get(self.make_and_validate_key(key, version), _ABSENT)
        return default if value is _ABSENT else self._unpacked(value)

    async def ahas_key(self, key: Any, version: int | None = None) -> bool:
        """As `has_key`."""
        return await self._cache.aio.contains(self.make_and_validate_key(key, version))

    async def aset(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:  # noqa: ASYNC109 - as Django has it
        """As `set`."""
        name = self.make_and_validate_key(key, version)
        await self._cache.aio.set(name, self._packed(value), self._expire(timeout))

    async def aadd(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:  # noqa: ASYNC109 - as Django has it
        """As `add`."""
        name = self.make_and_validate_key(key, version)
        return await self._cache.aio.add(name, self._packed(value), self._expire(timeout))

    async def atouch(self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:  # noqa: ASYNC109 - as Django has it
        """As `touch`."""
        return await self._cache.aio.touch(self.make_and_validate_key(key, version), self._expire(timeout))

    async def adelete(self, key: Any, version: int | None = None) -> bool:
        """As `delete`."""
        return await self._cache.aio.delete(self.make_and_validate_key(key, version))

    async def aincr(self, key: Any, delta: int = 1, version: int | None = None) -> Any:
        """As `incr`."""
        try:
            return await self._cache.aio.incr(self.make_and_validate_key(key, version), delta, default=None)
        except KeyError:
            raise ValueError(f"Key {key!r} not found") from None

    async def aset_many(
        self,
        data: Mapping[Any, Any],
        timeout: Any = DEFAULT_TIMEOUT,  # noqa: ASYNC109 - as Django has it
        version: int | None = None,
    ) -> list[Any]:
        """As `set_many`."""
        await self._cache.aio.set_many(self._named(data, version), self._expire(timeout))
        return []

    async def adelete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        """As `delete_many`."""
        await self._cache.aio.delete_many([self.make_and_validate_key(key, version) for key in keys])

    async def aclear(self) -> None:
        """As `clear`."""
        await self._cache.aio.clear()


def _serializer_of(given: Any) -> Serializer | None:
    found = import_string(given) if isinstance(given, str) else given
    made: Serializer | None = found() if callable(found) else found
    return made


# ------------------------------------------------------------------------------------------------------ what it holds


class _Response:
    """A response to be stored, as Django's middleware for whole pages does."""

    def __init__(self, response: Any) -> None:
        # Read here, so that a response that is a stream or not rendered yet raises in the call that gives it.
        self.data = {
            "status": response.status_code,
            "reason": response.reason_phrase,
            "charset": response.charset,
            "headers": [list(pair) for pair in response.headers.items()],
            "cookies": [morsel.OutputString() for morsel in response.cookies.values()],
            "content": base64.b64encode(response.content).decode("ascii"),
        }


def _answer(data: Mapping[str, Any]) -> HttpResponse:
    answer = HttpResponse(
        base64.b64decode(data["content"]), status=data["status"], reason=data["reason"], charset=data["charset"]
    )
    for name in list(answer.headers):
        del answer.headers[name]
    for name, value in data["headers"]:
        answer.headers[name] = value
    for cookie in data["cookies"]:
        answer.cookies.load(cookie)
    return answer


hold(_Response, "HttpResponse", lambda response: response.data, _answer)
hold(SafeString, "SafeString", str.__str__, mark_safe)


# -------------------------------------------------------------------------------------------------- one for a process

_exclusive = Guard()
_caches: dict[tuple[Any, ...], Cache] = {}


def _shared_cache(location: str | os.PathLike[str], options: Mapping[str, Any]) -> Cache:
    place = os.path.abspath(location) if location else ""
    scope, engine = options.get("scope", "django"), options.get("engine")
    limits = {name: options[name] for name in ("size_limit", "max_entries") if name in options}
    saving = {name: options[name] for name in ("durability", "save_interval_ms") if name in options}
    if engine is not None:
        engine = _engine_of(engine)
    name = (place, scope, engine, *sorted(limits.items()), *sorted(saving.items()))

    def one() -> Cache:
        if name not in _caches:
            _caches[name] = Cache(engine or place or None, scope=scope, **limits, **saving)
        return _caches[name]

    return _exclusive.run(one)


def _engine_of(given: Any) -> Engine:
    named = import_string(given) if isinstance(given, str) else given
    made = named() if callable(named) else named
    if not isinstance(made, Engine):
        raise ImproperlyConfigured(
            f"OPTIONS['engine'] is an Engine, a function that returns one, or a path to either, not {made!r:.80}"
        )
    return made


def _after_fork() -> None:
    global _exclusive  # noqa: PLW0603 - a thread that is not there in the child may hold it
    _exclusive = Guard()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
