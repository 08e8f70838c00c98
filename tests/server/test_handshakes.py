"""Before a connection is a WebSocket: probes of /healthz, connections that say nothing, renewed certificates."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import logging
import shutil
import socket
import ssl
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import picows
import pytest
from raw import PATIENCE_S, RawWorker
from reliability.living import until
from serving import OpenRaw, OpenServer

from scopestate.server import handshakes
from scopestate.server.server import Server

TLS = Path(__file__).parent / "tls"


def ask(server: Server, *pieces: str, close: bool = False) -> list[tuple[int, dict[str, str], bytes]]:
    """Send the pieces one by one; return the answers (status, headers, body) until the server closes."""
    with socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            plain.sendall(piece.encode("latin-1"))
        if close:
            plain.shutdown(socket.SHUT_WR)
        stream = plain.makefile("rb")
        answers = []
        while line := stream.readline():
            status = int(line.split()[1])
            headers = {}
            while (header := stream.readline().decode().strip()) != "":
                name, _, value = header.partition(": ")
                headers[name] = value
            head = any(piece.startswith("HEAD") for piece in pieces)
            answers.append((status, headers, b"" if head else stream.read(int(headers["Content-Length"]))))
        return answers


CLOSE = "Host: a\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [f"GET /healthz HTTP/1.1\r\n{CLOSE}"],
        ["GET /healthz HTTP/1.0\r\n\r\n"],
        ["GET /healthz HTTP/1.0\n\n"],
        [f"GET /healthz?verbose=1 HTTP/1.1\r\n{CLOSE}"],
        [f"GET /healthz/ HTTP/1.1\r\n{CLOSE}"],
        [f"GET http://a:1/healthz HTTP/1.1\r\n{CLOSE}"],
        ["GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: CLOSE\r\n\r\n"],
        ["GET /healthz HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nUser-Agent: kube-probe/1.30\r\nConnection: close\r\n\r\n"],
        list(f"GET /healthz HTTP/1.1\r\n{CLOSE}"),
    ],
)
def test_every_kind_of_probe_is_answered(server: Server, pieces: list[str]) -> None:
    ((status, headers, body),) = ask(server, *pieces)

    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert headers["Connection"] == "close"
    assert json.loads(body)["status"] == "ok"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_head_is_answered_without_a_body(server: Server, version: str) -> None:
    ((status, headers, _),) = ask(server, f"HEAD /healthz HTTP/{version}\r\n{CLOSE}")
    assert status == 200
    assert int(headers["Content-Length"]) > 0


def test_one_connection_serves_several_probes(server: Server) -> None:
    keep = "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    old = "GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"

    answers = ask(server, keep + keep, old, f"GET /healthz HTTP/1.1\r\n{CLOSE}")  # two at once, then one by one

    assert [status for status, _, _ in answers] == [200] * 4
    assert [headers.get("Connection") for _, headers, _ in answers] == [None, None, "keep-alive", "close"]


def test_a_prober_that_closes_its_side_at_once_is_answered(server: Server) -> None:
    assert ask(server, "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", close=True)[0][0] == 200


def test_the_engines_trouble_is_503(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.engine.close()
    ((status, _, body),) = ask(server, f"GET /healthz HTTP/1.1\r\n{CLOSE}")
    assert status == 503
    assert json.loads(body)["status"] == "failing"


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("POST /healthz HTTP/1.1", 405),
        ("DELETE /healthz HTTP/1.0", 405),
        ("OPTIONS / HTTP/1.1", 405),
        ("POST / HTTP/1.1", 405),
        ("GET / HTTP/1.1", 426),
        ("GET /otel HTTP/1.1", 426),
        ("GET /nothing HTTP/1.1", 404),
        ("POST /nothing HTTP/1.1", 404),
        ("GET /healthz HTTP/2.0", 400),
        ("GET /healthz", 400),
        ("GET  HTTP/1.1", 400),
    ],
)
def test_what_is_no_probe_gets_the_status_that_says_so(server: Server, request_line: str, status: int) -> None:
    ((given, headers, _),) = ask(server, f"{request_line}\r\n{CLOSE}")
    assert given == status
    assert (status == 405) == ("Allow" in headers)


@pytest.mark.parametrize(
    "rubbish", ["\x16\x03\x01\x02\x00\x01\x00\x01\xfc", "\0" * 100, "GET /healthz HTTP/1.1\r\n: x\r\n\r\n"]
)
def test_rubbish_is_400_at_once(server: Server, rubbish: str) -> None:
    assert ask(server, rubbish)[0][0] == 400


def test_a_body_ends_the_connection_unread(server: Server) -> None:
    body = "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    answers = ask(server, f"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n{body}")
    assert [status for status, _, _ in answers] == [405]


def test_a_head_without_end_is_431(server: Server) -> None:
    with contextlib.suppress(ConnectionError):  # the rest of it may meet a closed connection
        assert ask(server, "GET / HTTP/1.1\r\n" + "a: b\r\n" * 3_000)[0][0] == 431


def test_a_websocket_may_come_with_keep_alive_in_its_connection_header(server: Server) -> None:
    request = (
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as firefox:
        # A frame that came with the request is not lost: an empty text message, then a ping.
        firefox.sendall(request.encode() + b"\x89\x80" + bytes(4))
        stream = firefox.makefile("rb")
        assert stream.readline().split()[1] == b"101"
        while stream.readline().strip():
            pass
        opcode, size = stream.read(2)
        assert (opcode, json.loads(stream.read(size))["type"]) == (0x81, "workerregistered")
        assert stream.read(2) == b"\x8a\x00"


def test_connections_that_say_nothing_are_counted_and_make_room(
    open_server: OpenServer, connect: OpenRaw, caplog: pytest.LogCaptureFixture
) -> None:
    server = open_server(max_connections=8)
    silent = [socket.create_connection((server.host, server.port), timeout=PATIENCE_S) for _ in range(20)]
    try:
        for oldest in silent[:12]:
            assert oldest.recv(1) == b""  # cut off
        worker = connect(server)

        assert worker.call("state::list_groups", {}) == {"groups": []}
        status = server.status()
        assert (status.connections, status.workers) == (1, 1)
        assert status.handshakes <= 8
        assert status.turned_away >= 12
    finally:
        for plain in silent:
            plain.close()
    wait_until(lambda: server.status().handshakes == 0)


def test_a_connection_that_says_nothing_ends(open_server: OpenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKE_S", 0.05)
    server = open_server()
    for begun in (b"", b"GET /hea"):
        with socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as slow:
            slow.sendall(begun)
            assert slow.recv(1) == b""
    until(lambda: server.status().handshakes == 0, "a handshake is left")


def test_stopping_ends_connections_that_say_nothing(open_server: OpenServer) -> None:
    server = open_server()
    with socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as silent:
        wait_until(lambda: server.status().handshakes == 1)
        server.stop()
        assert silent.recv(1) == b""


CROWDED = """
import json, resource, sys
from scopestate import Engine
from scopestate.server.server import Server

resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
adapter = {"name": "kv", "config": {"store_method": "file_based", "file_path": sys.argv[1]}}
with Engine.from_config({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}) as engine:
    with Server(engine, port=0) as server:
        print(server.port, flush=True)
        for scope in sys.stdin:
            with open(__file__):
                print(json.dumps([engine.get(scope.strip(), "k"), server.status().turned_away > 0]), flush=True)
"""


def test_a_crowd_leaves_the_engine_its_descriptors(tmp_path: Path) -> None:
    from scopestate import Engine

    adapter = {"name": "kv", "config": {"store_method": "file_based", "file_path": str(tmp_path / "store")}}
    with Engine.from_config({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}) as engine:
        for number in range(3):
            engine.set(f"s{number}", "k", number)
    (tmp_path / "crowded.py").write_text(textwrap.dedent(CROWDED))
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "crowded.py"), str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    port = int(child.stdout.readline())
    crowd = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) for _ in range(300)]
    try:
        worker = RawWorker(f"ws://127.0.0.1:{port}")  # one that speaks gets in
        for number in range(3):
            child.stdin.write(f"s{number}\n")
            child.stdin.flush()
            assert json.loads(child.stdout.readline()) == [number, True]
        assert worker.call("state::get", {"scope": "s2", "key": "k"}) == 2
        worker.close()
    finally:
        for plain in crowd:
            plain.close()
        child.stdin.close()
        child.wait(PATIENCE_S)
        child.stdout.close()
    assert child.returncode == 0


def subject(server: Server) -> str:
    """Connect over TLS; return the common name in the server's certificate."""
    trusting = ssl.create_default_context()
    for name in ("cert.pem", "renewed-cert.pem"):
        trusting.load_verify_locations(TLS / name)
    with (
        socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as plain,
        trusting.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        certificate: Any = secure.getpeercert()
        return next(value for ((name, value),) in certificate["subject"] if name == "commonName")


def test_a_renewed_certificate_is_taken_up_and_a_broken_one_is_not(
    open_server: OpenServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(TLS / "cert.pem", cert)
    shutil.copy(TLS / "key.pem", key)
    server = open_server(tls={"certfile": str(cert), "keyfile": str(key)})
    old = RawWorker(server.url, ssl=ssl.create_default_context(cafile=str(TLS / "cert.pem")))
    before = subject(server)

    cert.write_text("half a certificate", encoding="utf-8")
    assert subject(server) == before
    assert "the renewed certificate could not be loaded" in caplog.text
    caplog.clear()
    assert subject(server) == before
    assert not caplog.records  # said once
    key.unlink()
    assert subject(server) == before

    shutil.copy(TLS / "renewed-key.pem", key)
    shutil.copy(TLS / "renewed-cert.pem", cert)
    with caplog.at_level(logging.INFO):
        assert subject(server) == "renewed" != before
    assert "was loaded" in caplog.text
    old.settle()  # what stands, stays
    old.close()


def wait_until(true: Any) -> None:
    """Wait for a condition of the server."""
    until(true, "it never became true")


# ------------------------------------------------------------------------------------------------------------- picows


def test_picows_makes_its_protocol_as_the_server_does() -> None:
    # The server gives accepted connections to `WSProtocol`, which is private to picows and takes its arguments by
    # position. `ws_create_server` is the public function that does the same.
    source = ast.parse(inspect.getsource(picows.ws_create_server))
    made = [
        [ast.unparse(argument) for argument in call.args]
        for call in ast.walk(source)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "WSProtocol"
    ]
    expected = [
        "None",
        "None",
        "False",
        "ws_listener_factory",
        "_resolve_logger(logger_name, 'server')",
        "disconnect_on_exception",
        "websocket_handshake_timeout",
        "enable_auto_ping",
        "auto_ping_idle_timeout",
        "auto_ping_reply_timeout",
        "auto_ping_strategy",
        "enable_auto_pong",
        "max_frame_size",
        "None",
        "read_buffer_init_size",
    ]
    assert made == [expected], (
        "picows makes its WSProtocol in another way than before: give it the same arguments in "
        "Server._make_handshakes (engine/server/server.py), then change this list and the version in pyproject.toml"
    )
