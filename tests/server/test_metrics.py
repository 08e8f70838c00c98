"""`GET /metrics`: the figures of the engine over HTTP, as Prometheus asks for them."""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from raw import PATIENCE_S
from serving import OpenRaw, OpenServer

from scopestate import Engine
from scopestate.figures import METRICS
from scopestate.integrations.prometheus import StateCollector
from scopestate.server.server import Server

TOKENS = {
    "auth": {
        "tokens": [
            "full",
            {"token": "scraper", "functions": ["engine::metrics"]},
            {"token": "shop", "functions": ["*"], "read": ["shop"]},
        ]
    }
}


def scrape(server: Server, *, token: str | None = None, host: str | None = None, method: str = "GET") -> Any:
    """Return the answer to one request, read to its end, as (status, headers, text)."""
    asking = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE_S)
    try:
        asking.putrequest(method, "/metrics", skip_host=True)
        if host != "":
            asking.putheader("Host", host or f"{server.host}:{server.port}")
        if token is not None:
            asking.putheader("Authorization", f"Bearer {token}")
        asking.endheaders()
        answer = asking.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        asking.close()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return the value of each sample, by name and labels."""
    return {
        (one.name, *(value for _, value in sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_the_server_shows_the_figures_of_the_collector(server: Server, connect: OpenRaw) -> None:
    engine = server.engine
    engine.on_change(scope="orders")(lambda event: None)
    engine.set("orders", "1", {"total": 5})
    engine.drain(PATIENCE_S)
    connect().call("state::set", {"scope": "orders", "key": "2", "value": 1})
    engine.drain(PATIENCE_S)

    status, headers, text = scrape(server)

    assert status == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(text)
    assert found["scopestate_up", "default"] == 1
    assert found["scopestate_deliveries_total", "default"] == 2
    assert found["scopestate_calls_total", "default", "state::set"] == 2
    registry = CollectorRegistry()
    registry.register(StateCollector(engine))
    of_collector = samples(generate_latest(registry).decode())
    assert found.keys() == of_collector.keys()
    moving = {"scopestate_threads", "scopestate_last_save_seconds"}
    assert {key: value for key, value in found.items() if key[0] not in moving} == {
        key: value for key, value in of_collector.items() if key[0] not in moving
    }
    assert {key[0] for key in found} <= METRICS


@pytest.mark.parametrize(
    ("token", "status"), [("full", 200), ("scraper", 200), ("shop", 403), ("unknown", 401), (None, 401)]
)
def test_a_token_must_be_full_or_name_the_figures(open_server: OpenServer, token: str | None, status: int) -> None:
    server = open_server(**TOKENS)

    given, headers, text = scrape(server, token=token)

    assert given == status
    assert ("scopestate_up" in text) == (status == 200)
    assert (headers["WWW-Authenticate"] == "Bearer") == (status == 401)
    assert server.status().refused == (status != 200)


def test_a_token_for_the_figures_may_do_nothing_else(open_server: OpenServer, connect: OpenRaw) -> None:
    worker = connect(open_server(**TOKENS), additional_headers={"Authorization": "Bearer scraper"})
    worker.invoke("state::get", {"scope": "s", "key": "k"})
    assert worker.receive()["error"]["code"] == "FORBIDDEN"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:49134", 200),
        ("[::1]:49134", 200),
        ("localhost", 200),
        ("engine:49134", 200),
        ("", 200),
        ("rebound.example:49134", 403),
        ("rebound.example", 403),
        ("127.0.0.1.rebound.example", 403),
    ],
)
def test_without_tokens_no_web_page_can_read_the_figures(server: Server, host: str, status: int) -> None:
    assert scrape(server, host=host)[0] == status


def test_other_methods_are_refused_and_head_has_no_body(server: Server) -> None:
    assert scrape(server, method="POST")[0] == 405
    status, headers, text = scrape(server, method="HEAD")
    assert (status, text) == (200, "")
    assert int(headers["Content-Length"]) > 1000


def test_a_slow_scrape_holds_up_no_call_and_is_shared(
    server: Server, connect: OpenRaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, reads = threading.Event(), threading.Event(), []
    stats = Engine.stats

    def slow(engine: Engine) -> Any:
        reads.append(threading.current_thread().name)
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return stats(engine)

    worker = connect()
    worker.call("state::set", {"scope": "s", "key": "k", "value": 1})
    monkeypatch.setattr(Engine, "stats", slow)
    asking = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE_S)
    other = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE_S)
    try:
        asking.request("GET", "/metrics")
        assert begun.wait(PATIENCE_S)
        other.request("GET", "/metrics")
        with urllib.request.urlopen(f"http://{server.host}:{server.port}/healthz", timeout=PATIENCE_S) as health:
            assert health.status == 200
        assert worker.call("state::get", {"scope": "s", "key": "k"}) == 1
        may_end.set()
        texts = []
        for one in (asking, other):
            answer = one.getresponse()
            texts.append(answer.read())
        assert texts[0] == texts[1]
        assert len(reads) == 1
        assert "scopestate-server" not in reads
        for one in (asking, other):  # the connections serve on
            one.request("GET", "/healthz")
            assert one.getresponse().read() == b'{"status":"ok"}'
    finally:
        may_end.set()
        asking.close()
        other.close()


def test_requests_behind_a_scrape_are_answered_after_it(server: Server) -> None:
    asking = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE_S)
    asking.connect()
    with asking.sock as plain:
        request = "GET {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n"
        plain.sendall(
            (
                request.format("/metrics", "")
                + request.format("/metrics/", "")
                + request.format("/healthz", "Connection: close\r\n")
            ).encode()
        )
        stream = plain.makefile("rb").read()
    assert stream.count(b"HTTP/1.1 200 OK") == 3
    assert stream.endswith(b'{"status":"ok"}')


def test_stopping_does_not_wait_for_a_scrape(open_server: OpenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()
    stats = Engine.stats

    def slow(engine: Engine) -> Any:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return stats(engine)

    server = open_server()
    monkeypatch.setattr(Engine, "stats", slow)
    asking = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE_S)
    try:
        asking.request("GET", "/metrics")
        assert begun.wait(PATIENCE_S)
        server.stop()
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            asking.getresponse()
    finally:
        may_end.set()
        asking.close()
