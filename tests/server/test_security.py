"""Who may connect, and what they may do there."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from raw import PATIENCE_S, RawWorker
from serving import OpenRaw, OpenServer, server_config
from websockets.exceptions import InvalidStatus

from scopestate import Engine
from scopestate.config import AuthConfig, ServerConfig, TokenConfig, from_mapping, loads
from scopestate.errors import ConfigError
from scopestate.server.access import AccessCheck, is_loopback
from scopestate.server.server import Server

TLS = Path(__file__).parent / "tls"
ADMIN = "admin-token-0001"
GUEST = "guest-token-0002"


def bearer(token: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


# ------------------------------------------------------------------------------------------------------ the gate


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST"])
def test_loopback_needs_no_token(host: str) -> None:
    assert AccessCheck(ServerConfig(host=host)).admits(None) == (True, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.1", "example.org"])
def test_other_addresses_need_a_token_or_insecure(host: str) -> None:
    with pytest.raises(ConfigError, match=r"auth\.tokens.*insecure: true"):
        AccessCheck(ServerConfig(host=host))
    assert AccessCheck(ServerConfig(host=host, insecure=True)).admits(None) == (True, None)
    assert AccessCheck(ServerConfig(host=host, auth=AuthConfig((TokenConfig(token=ADMIN),)))).admits(None) == (
        False,
        None,
    )


def test_is_loopback_is_not_fooled() -> None:
    assert not is_loopback("127.0.0.1.example.org")
    assert not is_loopback("localhost.example.org")


@pytest.mark.parametrize(
    "authorization",
    [None, "", ADMIN, f"Basic {ADMIN}", "Bearer", "Bearer ", f"Bearer {ADMIN}x", "Bearer " + "x" * 9_000],
)
def test_a_wrong_token_is_not_admitted(authorization: str | None) -> None:
    assert AccessCheck(ServerConfig(auth=AuthConfig((TokenConfig(token=ADMIN),)))).admits(authorization) == (
        False,
        None,
    )


def test_tokens_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{ADMIN}\n", encoding="utf-8")
    monkeypatch.setenv("GUEST_TOKEN", GUEST)
    config = server_config({"auth": {"tokens": [{"file": str(tmp_path / "token")}, {"env": "GUEST_TOKEN"}]}})
    gate = AccessCheck(config)

    assert gate.admits(f"Bearer {ADMIN}")[0]
    assert gate.admits(f"bearer {GUEST}")[0]


@pytest.mark.parametrize(
    ("token", "problem"),
    [
        ({"env": "NOT_SET_ANYWHERE"}, "no token in environment variable NOT_SET_ANYWHERE"),
        ({"file": "/nowhere/token"}, "cannot read a token from file /nowhere/token"),
        ({"token": "two words"}, "characters that a header cannot carry"),
    ],
)
def test_a_token_that_cannot_be_had_is_an_error(token: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        AccessCheck(server_config({"auth": {"tokens": [token]}}))


def test_the_configuration_reads_tokens_and_never_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", ADMIN)
    text = """
    - name: iii-worker-manager
      config:
        host: 0.0.0.0
        insecure: false
        auth:
          tokens:
            - ${MY_TOKEN}
            - {token: "secret-two", functions: ["state::*"], read: [users], write: []}
        tls: {certfile: cert.pem}
        origins: ["https://example.org"]
    """
    server = loads(text).server
    assert server is not None

    assert [token.token for token in server.auth.tokens] == [ADMIN, "secret-two"]
    assert server.auth.tokens[1].functions == ("state::*",)
    assert server.auth.tokens[1].write == ()
    assert ADMIN not in repr(server)
    assert "secret-two" not in repr(server)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"rbac": {}}, "unknown key `rbac`"),
        ({"port": 70_000}, "expected a whole number from 0 to 65535"),
        ({"insecure": "yes"}, "expected true or false"),
        ({"auth": {"tokens": [123_456]}}, "a token is a string"),
        ({"auth": {"tokens": [{}]}}, "give one of `token`, `env` and `file`"),
        ({"auth": {"tokens": [{"token": "a", "env": "B"}]}}, "give one of"),
        ({"auth": {"tokens": [" "]}}, "the token is empty"),
        ({"tls": {}}, "`certfile` is missing"),
    ],
)
def test_mistakes_in_the_entry_are_said(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        server_config(config)
    assert "123456" not in str(caught.value)


def test_a_second_entry_is_an_error() -> None:
    with pytest.raises(ConfigError, match="a second iii-worker-manager entry"):
        from_mapping([{"name": "iii-worker-manager"}, {"name": "iii-worker-manager"}])


# ------------------------------------------------------------------------------------------------ at the handshake


def test_a_worker_without_a_token_is_told_so_and_closed(
    open_server: OpenServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = open_server(auth={"tokens": [ADMIN]})
    with caplog.at_level(logging.DEBUG, "scopestate"):
        for options in ({}, bearer("wrong-token-0003")):
            worker = RawWorker(server.url, greeted=False, **options)
            assert worker.receive()["error"]["code"] == "AUTH_ERROR"
            assert worker.closed_with()[0] == 1008
            worker.close()
        admitted = RawWorker(server.url, **bearer(ADMIN))
        assert admitted.call("state::list_groups", {}) == {"groups": []}
        admitted.close()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("scopestate")]
    assert [text for text in said if "wrong-token" in text or ADMIN in text] == []


@pytest.mark.parametrize(
    ("origins", "origin", "admitted"),
    [
        ([], "http://evil.example", False),
        ([], "null", False),
        ([], None, True),
        (["https://good.example"], "https://good.example", True),
        (["https://good.example"], "https://good.example.evil.example", False),
        (["*"], "http://anything.example", True),
    ],
)
def test_web_pages_need_an_allowed_origin(
    open_server: OpenServer, origins: list[str], origin: str | None, *, admitted: bool
) -> None:
    server = open_server(origins=origins)
    for path in ("/", "/otel"):
        if admitted:
            RawWorker(server.url, path=path, greeted=False, origin=origin).close()
        else:
            with pytest.raises(InvalidStatus, match="403"):
                RawWorker(server.url, path=path, greeted=False, origin=origin)


def test_tls(open_server: OpenServer) -> None:
    server = open_server(tls={"certfile": str(TLS / "cert.pem"), "keyfile": str(TLS / "key.pem")})
    trusting = ssl.create_default_context(cafile=str(TLS / "cert.pem"))
    assert server.url.startswith("wss://")

    worker = RawWorker(server.url, ssl=trusting)
    worker.call("state::set", {"scope": "s", "key": "k", "value": "x" * 3_000_000})
    assert len(worker.call("state::get", {"scope": "s", "key": "k"})) == 3_000_000
    for number in range(200):
        worker.invoke("state::get", {"scope": "s", "key": number and "none"})
    assert [worker.receive()["type"] for _ in range(200)] == ["invocationresult"] * 200
    worker.close()
    url = server.url.replace("wss", "https") + "/healthz"
    with urllib.request.urlopen(url, timeout=PATIENCE_S, context=trusting) as answer:
        assert json.load(answer)["status"] == "ok"


def test_a_certificate_that_cannot_be_read_is_an_error(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate", encoding="utf-8")
    for name in ("cert.pem", "missing.pem"):
        with pytest.raises(ConfigError, match=name):
            Server(engine, config=server_config({"tls": {"certfile": str(tmp_path / name)}}))


def test_a_file_is_for_from_config() -> None:
    wrong: Any = "engine.yaml"
    with pytest.raises(ConfigError, match=r"use Server\.from_config\(\.\.\.\)"):
        Server(wrong)


def test_a_plain_request_that_is_no_websocket_is_refused(server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert plain.recv(100).startswith(b"HTTP/1.1 426")


# ------------------------------------------------------------------------------------------------------ permissions


@pytest.fixture
def guarded(open_server: OpenServer) -> Server:
    return open_server(
        auth={
            "tokens": [
                ADMIN,
                {
                    "token": GUEST,
                    "functions": ["state::*", "shop.*", "engine::triggers::list"],
                    "registers": ["shop.*"],
                    "read": ["shop", "public-?"],
                    "write": ["shop"],
                },
            ]
        }
    )


@pytest.fixture
def guest(guarded: Server, connect: OpenRaw) -> RawWorker:
    return connect(guarded, **bearer(GUEST))


@pytest.mark.parametrize(
    ("function_id", "data", "allowed"),
    [
        ("state::get", {"scope": "shop", "key": "k"}, True),
        ("state::get", {"scope": "public-1", "key": "k"}, True),
        ("state::get", {"scope": "public-22", "key": "k"}, False),
        ("state::get", {"scope": "private", "key": "k"}, False),
        ("state::list", {"scope": "private"}, False),
        ("state::set", {"scope": "shop", "key": "k", "value": 1}, True),
        ("state::set", {"scope": "public-1", "key": "k", "value": 1}, False),
        ("state::delete", {"scope": "private", "key": "k"}, False),
        ("state::update", {"scope": "private", "key": "k", "ops": []}, False),
        ("app.secret", {}, False),
        ("engine::workers::list", {}, False),
        ("engine::workers::register", {}, True),
        ("engine::channels::create", {}, True),
    ],
)
def test_what_a_token_allows(
    guest: RawWorker, engine: Engine, function_id: str, data: dict[str, Any], *, allowed: bool
) -> None:
    engine.register_function("app.secret", lambda _: "secret")
    answer = guest.ask(function_id, data)

    if allowed:
        assert "error" not in answer
    else:
        assert answer["error"]["code"] == "FORBIDDEN"
        assert engine.list_groups() == []


def test_list_groups_shows_what_may_be_read(guest: RawWorker, engine: Engine) -> None:
    for scope in ("private", "shop", "public-1"):
        engine.set(scope, "k", 1)

    assert guest.call("state::list_groups", {}) == {"groups": ["public-1", "shop"]}


def test_registrations_are_limited_too(
    guarded: Server, guest: RawWorker, connect: OpenRaw, caplog: pytest.LogCaptureFixture
) -> None:
    admin = connect(guarded, **bearer(ADMIN))
    guest.register("shop.on")
    guest.register("other.on")
    assert admin.ask("other.on", {})["error"]["code"] == "function_not_found"
    assert "may not register function 'other.on'" in caplog.text

    guest.trigger("shop.on", {"scope": "shop"})
    for function_id, config in (
        ("shop.on", {}),
        ("shop.on", {"scope": "private"}),
        ("app.secret", {"scope": "shop"}),
        ("shop.on", {"scope": "shop", "condition_function_id": "app.secret"}),
    ):
        trigger = {"type": "registertrigger", "id": "t", "trigger_type": "state", "function_id": function_id}
        guest.send({**trigger, "config": config})
        assert "may not" in guest.receive()["error"]["message"]


def test_a_limited_worker_cannot_take_the_triggers_of_others(
    guarded: Server, guest: RawWorker, connect: OpenRaw, engine: Engine
) -> None:
    admin = connect(guarded, **bearer(ADMIN))
    admin.register("admin.on")
    trigger_id = admin.trigger("admin.on", {"scope": "shop"})

    guest.send({"type": "unregistertrigger", "id": trigger_id})
    guest.send(
        {
            "type": "registertrigger",
            "id": trigger_id,
            "trigger_type": "state",
            "function_id": "shop.on",
            "config": {"scope": "shop"},
        }
    )
    assert "another worker's" in guest.receive()["error"]["message"]
    assert engine.triggers()[0].trigger.function_id == "admin.on"
