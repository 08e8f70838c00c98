"""A cache with the calls of diskcache: in a directory, in memory, or in any scope of an engine.

    from scopestate.integrations.cache import Cache

    cache = Cache("./data/cache")
    cache.set("ada", {"name": "Ada"}, expire=60, tag="users")
    await cache.aio.get("ada")  # the same calls for asyncio

docs/how-to/caches.md says what it holds, and what differs from diskcache. Nothing is pickled.
"""

from scopestate.integrations.cache.aio import AioCache, AioCacheTransaction
from scopestate.integrations.cache.cache import Cache
from scopestate.integrations.cache.limits import CacheStats
from scopestate.integrations.cache.transaction import CacheTransaction

__all__ = ["AioCache", "AioCacheTransaction", "Cache", "CacheStats", "CacheTransaction"]
