"""What the server's error replies mean to a caller."""

from __future__ import annotations

from typing import Final

from scopestate.errors import StorageError
from scopestate.persistence.redis.connection import Refusal
from scopestate.persistence.redis.link import PASSING

NOTHING: Final = "nothing was written"

_MEANINGS: Final[dict[str, str]] = {
    "OOM": "Redis at {address} has no memory left for writes{nothing}: raise its maxmemory, or delete something",
    "READONLY": "Redis at {address} is a read-only replica{nothing}: connect to the primary, or set `sentinels`",
    "MISCONF": "Redis at {address} refuses writes because it cannot save its data{nothing}: see its log",
    "NOREPLICAS": "Redis at {address} refuses writes because too few replicas follow it{nothing}",
    "NOPERM": "the user of this connection to Redis at {address} may not do that ({text}){nothing}",
    "NOAUTH": "Redis at {address} asks for a password{nothing}: set `password`",
    "WRONGTYPE": (
        "what Redis at {address} has at {keys} is not what scopestate keeps there{nothing}: delete it, or choose "
        "another key_prefix"
    ),
}


def explain(
    refusal: Refusal, address: str, *keys: bytes | str, nothing: str = NOTHING, waited: bool = True
) -> StorageError:
    """Return the error for a refusal that is final.

    `keys`: what the command concerns, if it is about keys; the server does not say which of them it means. `nothing`:
    what has not happened, "" for a read. `waited`: it was tried for `call_timeout_ms`, if it was worth waiting.
    """
    word, text = refusal.word, refusal.text
    if word == "ERR":
        # Redis 6 puts the word of a command that failed within a script further back.
        word = next((known for known in _MEANINGS if f" {known} " in text), word)
        if "ACL failure in script" in text:
            word = "NOPERM"
    names = [repr(key if isinstance(key, str) else key.decode(errors="replace")) for key in keys]
    clause = f"; {nothing}" if nothing else ""
    if word in PASSING:
        within = " within call_timeout_ms" if waited else ""
        problem = f"Redis at {address} was not ready for it{within} ({text}){clause}"
    elif word in _MEANINGS and (names or word != "WRONGTYPE"):
        either = " or ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
        problem = _MEANINGS[word].format(address=address, keys=either, text=text, nothing=clause)
    else:
        problem = f"Redis at {address} refused it: {text}"
        if names and nothing:
            problem += f"; read {names[0]} before retrying a write"
    error = StorageError(problem)
    error.__cause__ = refusal
    return error
