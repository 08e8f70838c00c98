"""What the server's error replies mean to a caller."""

from __future__ import annotations

from typing import Final

from scopestate.errors import StorageError
from scopestate.persistence.redis.connection import Refusal
from scopestate.persistence.redis.link import PASSING

_NOTHING: Final = "nothing was written"

_MEANINGS: Final[dict[str, str]] = {
    "OOM": f"Redis at {{address}} has no memory left for writes; {_NOTHING}: raise its maxmemory, or delete something",
    "READONLY": f"Redis at {{address}} is a read-only replica; {_NOTHING}: connect to the primary, or set `sentinels`",
    "MISCONF": f"Redis at {{address}} refuses writes because it cannot save its data; {_NOTHING}: see its log",
    "NOREPLICAS": f"Redis at {{address}} refuses writes because too few replicas follow it; {_NOTHING}",
    "NOPERM": f"the user of this connection to Redis at {{address}} may not do that ({{text}}); {_NOTHING}",
    "NOAUTH": f"Redis at {{address}} asks for a password; {_NOTHING}: set `password`",
    "WRONGTYPE": (
        f"what Redis at {{address}} has at {{key}}, or at a key of the events, is not what scopestate keeps there; "
        f"{_NOTHING}: delete it, or choose another key_prefix"
    ),
}


def explain(refusal: Refusal, address: str, hash_key: bytes) -> StorageError:
    """Return the error for a refusal that is final."""
    word, text = refusal.word, refusal.text
    if word == "ERR":
        # Redis 6 puts the word of a command that failed within a script further back.
        word = next((known for known in _MEANINGS if f" {known} " in text), word)
    key = repr(hash_key.decode(errors="replace"))
    if word in PASSING:
        problem = f"Redis at {address} was not ready for it within call_timeout_ms ({text}); {_NOTHING}"
    elif word in _MEANINGS:
        problem = _MEANINGS[word].format(address=address, key=key, text=text)
    else:
        problem = f"Redis at {address} refused it: {text}"
        if hash_key:
            problem += f"; read {key} before retrying a write"
    error = StorageError(problem)
    error.__cause__ = refusal
    return error
