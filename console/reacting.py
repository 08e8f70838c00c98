"""The pages about triggers and consumers, dead letters, workers and functions."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from scopestate.actors.consuming import ConsumerStatus
from scopestate.console.asked import Answer, Asked, Shown
from scopestate.console.elsewhere import functions, triggers_elsewhere, workers_of
from scopestate.console.rendering import value_html
from scopestate.errors import ScopestateError

LETTERS_OF_A_PAGE: Final = 50


def triggers(asked: Asked) -> Answer:
    """Show the triggers of this engine, and the consumers of durable triggers."""
    engine = asked.engine
    consumers: list[ConsumerStatus] = []
    consumers_note = "There are none."
    try:
        consumers = list(engine.consumers())
    except ScopestateError as error:  # such as a missing right: the rest of the page is shown
        consumers_note = f"They cannot be read: {error}"
    facts = {
        "consumers_note": consumers_note,
        "triggers": [
            {
                "handle": handle,
                "paused": handle.paused,
                "options": msgspec.json.encode(handle.trigger.options()).decode(),
            }
            for handle in engine.triggers()
        ],
        "elsewhere": triggers_elsewhere(engine),
        "consumers": consumers,
        "failures": list(reversed(engine._failures.copy())),
    }
    return Shown("triggers.html", facts)


def dead_letters(asked: Asked) -> Answer:
    """Show the events that durable triggers have given up."""
    consumer, after = asked.optional("consumer"), asked.optional("after")
    letters = asked.engine.dead_letters(consumer).list(LETTERS_OF_A_PAGE + 1, after)
    shown = letters[:LETTERS_OF_A_PAGE]
    facts = {
        "letters": shown,
        "consumer": consumer,
        "first": after is None,
        "next": shown[-1].id if len(letters) > len(shown) else None,
        "count": asked.engine.dead_letters(consumer).count(),
    }
    return Shown("dead_letters.html", facts)


def dead_letter(asked: Asked) -> Answer:
    """Show a dead letter: its event and its error."""
    letter = asked.engine.dead_letters().get(asked.name("id"))
    if letter is None:
        text = "It may have been replayed or purged."
        return Shown("message.html", {"title": "No such dead letter", "text": text}, 404)
    event: Any = letter.event
    facts = {
        "letter": letter,
        "old": None if event.old_json is None else value_html(event.old_json),
        "new": None if event.new_json is None else value_html(event.new_json),
    }
    return Shown("dead_letter.html", facts)


def workers(asked: Asked) -> Answer:
    """Show the workers of the server, and the functions that can be called."""
    found = workers_of(asked.engine)
    return Shown("workers.html", {"workers": found, "functions": functions(asked.engine)})
