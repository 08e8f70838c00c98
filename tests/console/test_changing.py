"""What forms change: entries under the revision that was seen, consumers, triggers and dead letters."""

from __future__ import annotations

import threading

from visitors import Visitor, text_of, visit

from scopestate import Engine, Retry


def test_a_value_is_edited(engine: Engine, writer: Visitor) -> None:
    revision = engine.set("users", "ada", {"logins": 1}).revision

    html = writer.send("set?scope=users&key=ada", value='{"logins": 2}', revision=revision, deadline="keep")

    assert "The value was saved" in html
    assert engine.get("users", "ada") == {"logins": 2}


def test_an_edit_of_what_has_changed_shows_both_values_and_loses_neither(engine: Engine, writer: Visitor) -> None:
    seen = engine.set("users", "ada", {"logins": 1}).revision
    engine.set("users", "ada", {"logins": 7})

    html = writer.send("set?scope=users&key=ada", 409, value='{"logins": 2}', revision=seen, deadline="keep")

    assert engine.get("users", "ada") == {"logins": 7}
    text = text_of(html)
    assert "Nothing was written" in text
    assert text.index("Your value") < text.index("&#34;logins&#34;: 2") < text.index("&#34;logins&#34;: 7")
    entry = engine.entry("users", "ada")
    assert entry is not None
    assert f'name="revision" value="{entry.revision}"' in html

    writer.send("set?scope=users&key=ada", value='{"logins": 2}', revision=entry.revision, deadline="keep")

    assert engine.get("users", "ada") == {"logins": 2}


def test_an_edit_of_what_was_deleted_is_a_conflict(engine: Engine, writer: Visitor) -> None:
    seen = engine.set("users", "ada", 1).revision
    engine.delete("users", "ada")

    html = writer.send("set?scope=users&key=ada", 409, value="2", revision=seen, deadline="keep")

    assert "it was deleted" in html
    assert engine.entry("users", "ada") is None


def test_the_deadline_is_kept_removed_or_set(engine: Engine, writer: Visitor) -> None:
    revision = engine.set("s", "k", 1, ttl=1000).revision
    address = "set?scope=s&key=k"

    writer.send(address, value="2", revision=revision, deadline="keep")
    kept = engine.ttl("s", "k")
    assert kept is not None
    assert kept > 900
    writer.send(address, value="3", revision=engine.entry("s", "k").revision, deadline="none")  # type: ignore[union-attr]
    assert engine.ttl("s", "k") is None
    writer.send(address, value="4", revision=engine.entry("s", "k").revision, deadline="ttl", ttl="60")  # type: ignore[union-attr]
    left = engine.ttl("s", "k")
    assert left is not None
    assert 0 < left <= 60


def test_what_is_not_json_is_refused_and_the_text_stays(engine: Engine, writer: Visitor) -> None:
    revision = engine.set("s", "k", 1).revision

    html = writer.send("set?scope=s&key=k", 422, value="{not <json>", revision=revision, deadline="keep")
    late = writer.send("set?scope=s&key=k", 422, value="2", revision=revision, deadline="ttl", ttl="soon")
    none = writer.send("set?scope=s&key=k", 422, value="2", revision="x", deadline="keep")

    assert "{not &lt;json&gt;</textarea>" in html
    assert "number of seconds" in late
    assert "whole number" in none
    assert engine.get("s", "k") == 1


def test_a_value_keeps_what_it_says_to_the_last_digit(engine: Engine, writer: Visitor) -> None:
    text = '{"big": 9007199254740993, "small": 1.50, "text": "\\u00e9\\n"}'

    writer.send("create?scope=s&key=k", value=text)

    assert engine.get("s", "k") == {"big": 9007199254740993, "small": 1.5, "text": "é\n"}


def test_a_key_is_created_and_not_overwritten(engine: Engine, writer: Visitor) -> None:
    assert "The value was created" in writer.send("create?scope=s", key="new key/1", value="[1]")
    again = writer.send("create?scope=s", 409, key="new key/1", value="[2]")

    assert engine.get("s", "new key/1") == [1]
    assert "Nothing was written" in again


def test_a_key_with_a_newline_is_edited_and_deleted(engine: Engine, writer: Visitor) -> None:
    revision = engine.set("s", "two\nlines", 1).revision

    writer.send("set?scope=s&key=two%0Alines", value="2", revision=revision, deadline="keep")
    assert engine.get("s", "two\nlines") == 2
    entry = engine.entry("s", "two\nlines")
    assert entry is not None
    html = writer.send("delete?scope=s&key=two%0Alines", revision=entry.revision)

    assert "The key was deleted" in html
    assert engine.keys("s") == []


def test_what_has_changed_is_not_deleted(engine: Engine, writer: Visitor) -> None:
    seen = engine.set("s", "k", 1).revision
    engine.set("s", "k", 2)

    html = writer.send("delete?scope=s&key=k", 409, revision=seen)

    assert "was not deleted" in html
    assert engine.get("s", "k") == 2


def test_a_trigger_is_paused_and_resumed(engine: Engine, writer: Visitor) -> None:
    engine.on_change(scope="s")(lambda event: None)
    (handle,) = engine.triggers()

    assert "paused" in text_of(writer.send(f"trigger?id={handle.trigger_id}", do="pause"))
    assert handle.paused
    writer.send(f"trigger?id={handle.trigger_id}", do="resume")
    assert not handle.paused
    writer.send("trigger?id=unknown", 404, do="pause")


def test_the_last_errors_of_handlers_are_shown(engine: Engine, reader: Visitor) -> None:
    @engine.on_change(scope="s")
    def fails(event: object) -> None:
        raise ValueError("it is <broken>")

    engine.set("s", "k", 1)
    engine.drain()

    text = text_of(reader.page("triggers"))
    assert "ValueError" in text
    assert "it is &lt;broken&gt;" in text
    assert "s / k" in text


def _with_letters(engine: Engine, count: int) -> None:
    """Have a consumer `mailer` give up so many events."""
    given_up = threading.Semaphore(0)

    @engine.on_change(scope="users", durable="mailer", retry=Retry(attempts=1))
    def fails(event: object) -> None:
        raise ValueError("no mail today")

    engine.on_dead_letter(lambda failure: given_up.release())
    for number in range(count):
        engine.set("users", f"u{number}", number)
    for _ in range(count):
        assert given_up.acquire(timeout=30)
    engine.flush()


def test_a_consumer_is_paused_and_resumed(kept: Engine) -> None:
    _with_letters(kept, 1)
    writer = visit(kept, write=True)

    html = writer.send("consumers?name=mailer", do="pause")

    assert "paused in the console" in html
    assert kept.consumers()["mailer"].paused == "paused in the console"
    writer.send("consumers?name=mailer", do="resume")
    assert kept.consumers()["mailer"].paused is None


def test_dead_letters_are_shown_replayed_and_purged(kept: Engine) -> None:
    _with_letters(kept, 3)
    writer = visit(kept, write=True)
    first, second, third = kept.dead_letters().list()

    html = writer.page("dead-letters")
    letter = writer.page(f"dead-letter?id={first.id}")

    assert "3 events that consumers have given up" in text_of(html)
    assert "no mail today" in html
    assert "no mail today" in letter
    assert "Traceback" in letter
    assert "1 purged" in text_of(writer.send("letters", letter=first.id, do="purge"))
    assert kept.dead_letters().get(first.id) is None
    kept.consumers().pause("mailer")
    assert "1 replayed" in text_of(writer.send("letters?consumer=mailer", letter=second.id, do="replay"))
    assert [one.id for one in kept.dead_letters().list()] == [third.id]
    assert "1 purged" in text_of(writer.send("letters", do="purge-all"))
    assert "0 replayed" in text_of(writer.send("letters", do="replay"))
    assert "There are none" in writer.page("dead-letters")
    assert writer.page("dead-letter?id=unknown", 404)


def test_a_reader_gets_no_forms_and_changes_nothing(engine: Engine, reader: Visitor) -> None:
    revision = engine.set("s", "k", 1).revision

    assert 'method="post"' not in reader.page("entry?scope=s&key=k")
    assert 'method="post"' not in reader.page("keys?scope=s")
    response = reader.client.post("set?scope=s&key=k", data={"value": "2", "revision": revision})

    assert response.status_code == 403
    assert "Read only" in response.text
    assert engine.get("s", "k") == 1


def test_a_form_that_says_nothing_known_does_nothing(kept: Engine) -> None:
    _with_letters(kept, 1)
    writer = visit(kept, write=True)

    for action in ("letters", "consumers?name=mailer", "trigger?id=x"):
        assert "needs `do`" in writer.send(action, 422, do="burn")
    assert kept.dead_letters().count() == 1
