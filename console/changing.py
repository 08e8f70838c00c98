"""Actions of forms: change an entry, pause, resume, replay, purge. Each ends with a page that shows the result."""

from __future__ import annotations

from typing import Any

from scopestate.console.asked import Answer, Asked, Moved, Shown
from scopestate.console.pages import entry_page
from scopestate.console.rendering import CUT, formatted, link
from scopestate.errors import Conflict, DeserializationError, InvalidValue, SchemaViolation, ValueTooLarge
from scopestate.ops.values import decode, parse

_REFUSALS = (DeserializationError, InvalidValue, SchemaViolation, ValueTooLarge)
"""Errors that are shown in the form with the value, so that its text is not lost."""


def _deadline(asked: Asked) -> dict[str, Any]:
    """Return the options of `set` for the deadline that a form asks for."""
    kind = asked.field("deadline") or "keep"
    if kind != "ttl":
        return {"keep_ttl": True} if kind == "keep" else {}
    text = (asked.field("ttl") or "").strip()
    try:
        return {"ttl": float(text)}
    except ValueError:
        raise DeserializationError(f"the time to live is a number of seconds, not {text[:40]!r}") from None


def set_value(asked: Asked) -> Answer:
    """Set an entry if nothing else has changed it since the form was made; otherwise show both values."""
    scope, key, text = asked.name("scope"), asked.name("key"), asked.field("value") or ""
    try:
        options = _deadline(asked)
        value = decode(parse(text))
        asked.engine.set(scope, key, value, if_revision=asked.revision(), **options)
    except Conflict:
        return _conflict(asked, scope, key, text)
    except _REFUSALS as error:
        found = asked.engine.entry(scope, key)
        return entry_page(
            asked, scope, key, found, 422, problem=str(error), **({} if found is None else {"text": text})
        )
    return Moved(link("entry", scope=scope, key=key, done="saved"))


def _conflict(asked: Asked, scope: str, key: str, text: str) -> Answer:
    """Show the key's current value beside the refused one, and offer to overwrite it."""
    found = asked.engine.entry(scope, key)
    now = None if found is None or len(found.json) > CUT else formatted(found.json)
    return entry_page(asked, scope, key, found, 409, text=text, conflict={"yours": text, "now": now})


def create(asked: Asked) -> Answer:
    """Create an entry; refused if the key exists."""
    scope, key, text = asked.name("scope"), asked.field("key"), asked.field("value") or ""
    if key is None:
        key = asked.name("key")
    try:
        asked.engine.set(scope, key, decode(parse(text)), if_absent=True)
    except Conflict:
        return _conflict(asked, scope, key, text)
    except _REFUSALS as error:
        found = asked.engine.entry(scope, key)
        return entry_page(asked, scope, key, found, 422, problem=str(error), **({} if found else {"text": text}))
    return Moved(link("entry", scope=scope, key=key, done="created"))


def delete(asked: Asked) -> Answer:
    """Delete an entry if nothing else has changed it since the form was made."""
    scope, key = asked.name("scope"), asked.name("key")
    try:
        asked.engine.delete(scope, key, if_revision=asked.revision())
    except Conflict:
        found = asked.engine.entry(scope, key)
        said = "The key was not deleted: it has changed since the page was made. This is what it has now."
        return entry_page(asked, scope, key, found, 409, problem=said)
    return Moved(link("keys", scope=scope, done="deleted"))


# ---------------------------------------------------------------------------------------------- consumers and triggers


def consumer(asked: Asked) -> Answer:
    """Pause or resume a consumer."""
    name, consumers = asked.name("name"), asked.engine.consumers()
    if asked.choice("pause", "resume") == "pause":
        consumers.pause(name, "paused in the console")
    else:
        consumers.resume(name)
    return Moved("triggers")


def trigger(asked: Asked) -> Answer:
    """Pause or resume a trigger of this engine."""
    wanted, pause = asked.name("id"), asked.choice("pause", "resume") == "pause"
    for handle in asked.engine.triggers():
        if handle.trigger_id == wanted:
            if pause:
                handle.pause()
            else:
                handle.resume()
            return Moved("triggers")
    return Shown("message.html", {"title": "No such trigger", "text": "It may have been unregistered."}, 404)


def letters(asked: Asked) -> Answer:
    """Replay or purge dead letters: the chosen ones, or all of a consumer."""
    of = asked.optional("consumer")
    action = asked.choice("replay", "replay-all", "purge", "purge-all")
    dead, replay = asked.engine.dead_letters(of), action.startswith("replay")
    if action.endswith("all"):
        count = dead.replay(all=True) if replay else dead.purge(all=True)
    else:
        ids = asked.fields("letter")
        count = (dead.replay(ids) if replay else dead.purge(ids)) if ids else 0
    return Moved(link("dead-letters", consumer=of, done="replayed" if replay else "purged", count=count))
