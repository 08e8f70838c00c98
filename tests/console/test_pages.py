"""The pages that read: what they show, and that nothing that a caller has written is more than text there."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from visitors import HOST, Visitor, text_of, visit

from scopestate import Engine
from scopestate.console import allow_everyone, console

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    '"><script>alert(1)</script>',
    "\x1b[31mred\x1b[0m",
    "two\nlines",
    "",
    "a/b//../c",
    "100%25 %2F",
    "?q=1&r=2#top",
    "\u202egnp.exe",
    "key with spaces ",
    "\N{GRINNING FACE}",
]


@pytest.mark.parametrize("page", ["", "scopes", "changes", "triggers", "dead-letters", "workers"])
def test_each_page_is_there_in_an_empty_engine(reader: Visitor, page: str) -> None:
    html = reader.page(page)

    assert "<h1>" in html
    assert html.count('aria-current="page"') == 1


def test_the_overview_shows_health_and_counts(engine: Engine, reader: Visitor) -> None:
    engine.set("users", "ada", 1)

    text = text_of(reader.page())

    assert "Healthy" in text
    assert "Keys in memory 1" in text
    assert "state::set 1" in text


def test_the_overview_tells_what_is_wrong(engine: Engine, reader: Visitor) -> None:
    engine.close()

    text = text_of(reader.page())

    assert "There are problems the engine is closed" in text


def test_scopes_are_listed_with_their_keys_and_sizes(engine: Engine, reader: Visitor) -> None:
    for number in range(3):
        engine.set("users", f"u{number}", "x")
    engine.set("jobs", "j", 1)

    assert "users 3 memory" in text_of(reader.page("scopes"))
    assert "users 3 15 bytes memory" in text_of(reader.page("scopes?sizes=1"))
    found = text_of(reader.page("scopes?prefix=jo"))
    assert "jobs 1 memory" in found
    assert "users" not in found


def test_scopes_come_in_pages(engine: Engine, reader: Visitor) -> None:
    for number in range(230):
        engine.set(f"s{number:03}", "k", 1)

    first = reader.page("scopes")
    second = reader.page("scopes?after=s099")
    last = reader.page("scopes?after=s199")

    assert "s099" in first
    assert "s100</a>" not in first
    assert 'href="scopes?after=s099"' in first
    assert "s100" in second
    assert "s229" in last
    assert "Next page" not in last


def test_keys_come_in_pages_and_by_prefix(engine: Engine, reader: Visitor) -> None:
    for number in range(120):
        engine.set("users", f"u{number:03}", {"n": number})

    seen: list[str] = []
    address = "keys?scope=users"
    while True:
        html = reader.page(address)
        seen += [f"u{number:03}" for number in range(120) if f">u{number:03}</a>" in html]
        if "Next page" not in html:
            break
        address = html.split('rel="next" href="')[1].split('"')[0].replace("&amp;", "&")

    assert seen == [f"u{number:03}" for number in range(120)]
    assert "10 keys begin with u01" in text_of(reader.page("keys?scope=users&prefix=u01"))
    assert "u119" in reader.page("keys?scope=users&order=desc")


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_can_be_shown_and_opened_and_is_only_text(engine: Engine, writer: Visitor, name: str) -> None:
    engine.set(name, name, name)

    pages = [
        writer.page("scopes"),
        writer.page(f"keys?scope={quote(name, safe='')}"),
        writer.page(f"entry?scope={quote(name, safe='')}&key={quote(name, safe='')}"),
    ]

    for html in pages:
        assert "<img src=x" not in html
        assert "<script>" not in html
        assert "\x1b" not in text_of(html)
        assert "\u202e" not in text_of(html)
    assert "Revision" in pages[2]
    address = pages[1].split('<th scope="row"><a href="')[1].split('"')[0].replace("&amp;", "&")
    assert "Revision" in writer.page(address)


def test_a_value_is_a_tree(engine: Engine, reader: Visitor) -> None:
    engine.set("s", "k", {"name": "Ada", "deep": [{"x": 1.5}, None, True], "empty": {}, "<b>": "<i>"})

    html = reader.page("entry?scope=s&key=k")

    assert '<span class="key">"name"</span>' in html.replace("&#34;", '"')
    assert "3 items" in html
    assert "&lt;b&gt;" in html
    assert "<i>" not in html


def test_a_tree_is_bounded_in_nodes_and_depth(engine: Engine, reader: Visitor) -> None:
    engine.set("s", "wide", list(range(10_000)))
    deep: list[object] = []
    for _ in range(80):
        deep = [deep]
    engine.set("s", "deep", deep)

    wide = reader.page("entry?scope=s&key=wide")

    assert "8,001 more" in wide
    assert len(wide) < 400_000
    assert "deeper than what is shown" in reader.page("entry?scope=s&key=deep")


def test_a_large_value_is_cut_and_can_be_downloaded(engine: Engine, writer: Visitor) -> None:
    engine.set("s", "big", "x" * 5_000_000)

    html = writer.page("entry?scope=s&key=big")
    response = writer.client.get("download?scope=s&key=big")

    assert len(html) < 200_000
    assert "4.8 MB" in html
    assert "too large to be edited" in html
    assert len(response.content) == 5_000_002
    assert response.headers["Content-Disposition"].startswith("attachment;")
    assert response.headers["Content-Type"] == "application/json"


def test_a_key_that_does_not_exist_is_not_found(reader: Visitor) -> None:
    assert "There is no such key" in reader.page("entry?scope=s&key=k", 404)
    assert "nothing to download" in reader.page("download?scope=s&key=k", 404)


def test_an_entry_shows_its_deadline_and_its_history(kept: Engine) -> None:
    for number in range(3):
        kept.set("users", "ada", {"logins": number}, ttl=3600)
    kept.set("users", "bob", 1)

    text = text_of(visit(kept).page("entry?scope=users&key=ada"))

    assert "UTC (in 60 min)" in text
    changes = text.split("History")[1]
    assert changes.count("updated") == 2
    assert changes.count("created") == 1
    assert changes.index("&#34;logins&#34;:2") < changes.index("&#34;logins&#34;:0")


def test_a_scope_without_a_history_says_so(engine: Engine, reader: Visitor) -> None:
    engine.set("s", "k", 1)

    assert "rule `history`" in text_of(reader.page("entry?scope=s&key=k"))


def test_a_wrong_address_says_what_is_wrong(engine: Engine, reader: Visitor) -> None:
    engine.set("s", "k", 1)

    assert "needs `key`" in reader.page("entry?scope=s", 422)
    assert "cursor" in reader.page("keys?scope=s&cursor=nonsense", 422)
    assert "no page at this address" in reader.page("nowhere", 404)


def test_a_closed_engine_is_an_answer(engine: Engine, reader: Visitor) -> None:
    engine.close()

    assert "The service ends" in reader.page("scopes", 503)


def test_links_are_relative_so_any_mount_serves(engine: Engine, reader: Visitor) -> None:
    engine.set("s", "k", 1)

    for page in ("", "scopes", "keys?scope=s", "entry?scope=s&key=k", "changes", "workers"):
        html = reader.page(page)
        assert 'href="/' not in html
        assert 'src="/' not in html
        assert 'action="/' not in html


def test_the_forms_of_a_page_name_a_scope_with_line_ends(engine: Engine, reader: Visitor) -> None:
    engine.set("two\nlines", "k", 1)

    html = reader.page("keys?scope=two%0Alines")

    assert 'name="scope_quoted" value="two%0Alines"' in html
    assert ">k</a>" in reader.page("keys?scope_quoted=two%250Alines&prefix=k")


def test_it_is_mounted_in_fastapi_with_and_without_the_slash(engine: Engine) -> None:
    app = FastAPI()
    app.mount("/deep/state", console(engine, auth=allow_everyone, hosts=[HOST]))
    client = TestClient(app, base_url=f"http://{HOST}")

    response = client.get("/deep/state")

    assert response.status_code == 200
    assert response.url.path == "/deep/state/"
    assert client.get("/deep/state/scopes").status_code == 200


def test_a_value_at_the_limit_of_nesting_is_shown_and_a_deeper_one_is_refused(engine: Engine, writer: Visitor) -> None:
    writer.send("create?scope=s&key=deep", value="[" * 128 + "]" * 128)

    assert "deeper than what is shown" in writer.page("entry?scope=s&key=deep")
    for text in ("[" * 100_000 + "]" * 100_000, "1" * 5_000, '"\\ud800"'):
        assert "There is no such key" in writer.send("create?scope=s&key=other", 422, value=text)


def test_numbers_of_the_address_are_bounded(engine: Engine, writer: Visitor) -> None:
    revision = engine.set("s", "k", 1).revision

    assert ">k</a>" in writer.page(f"keys?scope=s&limit={'9' * 5_000}")
    assert ">k</a>" in writer.page("keys?scope=s&limit=-1")
    assert "whole number" in writer.send("delete?scope=s&key=k", 422, revision=f"{revision}" * 5_000)
    assert engine.get("s", "k") == 1
