"""Opening an engine at one real server: by every kind of address, and what is said if that fails."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from one_server import CERT, KEY
from opening import config_at, open_at
from ports import HOST, free_port
from servers import BINARIES, VALKEY, Binary, Sentinel, Server, StartServer

from scopestate import Engine
from scopestate.config import RedisOptions
from scopestate.errors import StorageError
from scopestate.persistence.redis import dialling

WITHIN_S = 20.0


def _refusal(url: str, **redis: Any) -> str:
    """Return what is said of an address that is no good; fail if that takes longer, or names a secret."""
    begun = time.monotonic()
    with pytest.raises(StorageError) as refused:
        open_at(url, **redis)
    took_s = time.monotonic() - begun

    assert took_s < WITHIN_S, f"it took {took_s:.1f} s"
    error: BaseException | None = refused.value
    while error is not None:
        for secret in ("sesame", "wrong-1"):
            assert secret not in str(error)
            assert secret not in repr(error)
        error = error.__cause__ or error.__context__
    return str(refused.value)


def _works(url: str, **redis: Any) -> None:
    with open_at(url, **redis) as engine:
        engine.set("s", "k", 1)
        assert engine.get("s", "k") == 1
        assert engine.list_groups() == ["s"]


def test_rules_for_scopes_are_said_to_do_nothing(valkey: Server, caplog: pytest.LogCaptureFixture) -> None:
    rules = {"scopes": [{"prefix": "tmp:", "durability": "memory"}]}

    with Engine.from_config(config_at(valkey.url) | rules):
        assert "`durability` under `scopes:` has no effect with the adapter redis" in caplog.text


# --------------------------------------------------------------------------------------------------------- addresses


def test_a_socket_of_this_machine(start_server: StartServer, server_binary: Binary) -> None:
    server = start_server(server_binary, unix_socket=True, password="sesame7/@")

    _works(server.socket_url)

    assert server.ask("HGET", "state:s", "k") == "1"


def test_a_password_with_characters_that_an_address_has_to_encode(start_server: StartServer) -> None:
    _works(start_server(password="sesame@:/?#[]%20\u00fc").url)


def test_a_user_who_may_only_touch_the_state(start_server: StartServer, server_binary: Binary) -> None:
    """The least that an engine needs, events not being shared."""
    rules = ">sesame-7 ~state:* +@read +@write +@scripting +@connection +scan"
    server = start_server(server_binary, users={"app": f"{rules} ~scopestate:* +time", "plain": rules})

    _works(server.url_for(user="app", password="sesame-7"))
    _works(server.url_for(user="plain", password="sesame-7"), revisions=False)
    with pytest.raises(StorageError, match="no revisions"):
        _works(server.url_for(user="plain", password="sesame-7"))


def test_a_database_by_its_number(start_server: StartServer) -> None:
    server = start_server()

    _works(server.url_for(database=3))
    _works(server.url, database=4)

    assert [server.client(db=number).exists("state:s") for number in range(5)] == [0, 0, 0, 1, 1]


def _with_tls() -> list[Binary]:
    return [binary for binary in BINARIES if binary.tls]


def test_tls_with_the_server_s_certificate_looked_at(start_server: StartServer) -> None:
    for binary in _with_tls():
        server = start_server(binary, tls=True, password="sesame-7")

        _works(server.url, tls_ca_file=str(CERT))
        _works(server.url, tls_verify=False)
        unknown = _refusal(server.url)

        assert "certificate verify failed" in unknown
        assert f"{HOST}:{server.port}" in unknown


def test_tls_with_a_certificate_of_ours(start_server: StartServer) -> None:
    for binary in _with_tls():
        server = start_server(binary, tls=True, client_certificates=True)

        _works(server.url, tls_ca_file=str(CERT), tls_cert_file=str(CERT), tls_key_file=str(KEY))
        refused = _refusal(server.url, tls_ca_file=str(CERT), connect_timeout_ms=700)

        assert f"{HOST}:{server.port}" in refused


def test_tls_where_the_server_speaks_none(redis_server: Server) -> None:
    text = _refusal(f"rediss://{HOST}:{redis_server.port}", connect_timeout_ms=700)

    assert f"{HOST}:{redis_server.port}" in text
    assert "does the server speak TLS? If not, write redis://" in text


@pytest.mark.parametrize("what", ["is not there", "is none"])
@pytest.mark.parametrize("name", ["tls_ca_file", "tls_cert_file", "tls_key_file"])
def test_a_file_for_tls_that_cannot_be_used_is_named(valkey: Server, tmp_path: Path, name: str, what: str) -> None:
    path = tmp_path / "some.pem"
    if what == "is none":
        path.write_text("no certificate", encoding="utf-8")
    files = {name: str(path)} | ({"tls_cert_file": str(CERT)} if name == "tls_key_file" else {})

    assert f"`{name}` {path} cannot be used: " in _refusal(f"rediss://{HOST}:{valkey.port}", **files)


def test_no_tls_where_the_server_speaks_nothing_else(start_server: StartServer) -> None:
    for binary in _with_tls():
        server = start_server(binary, tls=True)

        text = _refusal(f"redis://{HOST}:{server.port}", connect_timeout_ms=700)

        assert f"{HOST}:{server.port}" in text
        assert "does the server want TLS? Then write rediss://" in text


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_port_where_nobody_listens() -> None:
    port = free_port()

    text = _refusal(f"redis://app:sesame-7@{HOST}:{port}")

    assert f"redis://{HOST}:{port}" in text
    assert "refused" in text


def test_a_socket_that_is_not_there(tmp_path: Any) -> None:
    path = tmp_path / "none.sock"

    assert f"unix://{path}" in _refusal(f"unix://:sesame-7@{path}")


@pytest.mark.parametrize("login", ["wrong-1", None])
def test_a_wrong_password_or_none(start_server: StartServer, server_binary: Binary, login: str | None) -> None:
    server = start_server(server_binary, password="sesame-7")

    text = _refusal(server.url_for(password=login))

    assert f"redis://{HOST}:{server.port}" in text
    assert "password" in text.lower() or "authentication" in text.lower()


@pytest.mark.parametrize("password", ["sesame-7", "sesame" * 50, "sesame\n'\"\u00fc"])
def test_a_server_that_echoes_the_password_is_not_quoted(
    start_server: StartServer, server_binary: Binary, password: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(server_binary, extra=['rename-command AUTH ""'])

    text = _refusal(server.url, username="shop", password=password)

    assert f"redis://{HOST}:{server.port}: the server refused the login" in text
    assert "sesame" not in caplog.text


def test_a_sentinel_that_echoes_its_password_is_not_quoted() -> None:
    said = b"-ERR what is AUTH sesame-7?\r\n"
    with socket.create_server((HOST, 0)) as listener, _Echoing(listener, said):
        name = f"{HOST}:{listener.getsockname()[1]}"

        text = _refusal("redis://localhost", sentinels=[name], sentinel_password="sesame-7")

    assert f"{name}: the server refused the login" in text


def test_words_that_are_in_the_password_too_are_quoted_if_they_are_not_the_server_s() -> None:
    text = _refusal(f"redis://{HOST}:{free_port()}", password="refused")

    assert "Connection refused" in text


class _Echoing:
    """Somebody who says the same thing to whoever connects."""

    def __init__(self, listener: socket.socket, said: bytes) -> None:
        self._listener = listener
        self._said = said

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(self._said)
                    connection.recv(1000)


def test_a_user_who_is_not_there(start_server: StartServer) -> None:
    server = start_server(users={"app": ">sesame-7 ~* +@all"})

    assert f"redis://{HOST}:{server.port}" in _refusal(server.url_for(user="nobody", password="sesame-7"))


def test_a_database_that_the_server_does_not_have(start_server: StartServer) -> None:
    server = start_server(extra=["databases 2"])

    text = _refusal(server.url_for(database=2))

    assert f"redis://{HOST}:{server.port}/2" in text
    assert "DB index is out of range" in text


def test_a_server_that_does_not_answer_is_given_up_in_time(start_server: StartServer) -> None:
    server = start_server()
    server.pause()

    text = _refusal(server.url_for(password="sesame-7"), connect_timeout_ms=700)

    assert f"redis://{HOST}:{server.port}: no answer within 0.7 s" in text
    assert RedisOptions().connect_timeout_ms == 5000


def test_a_connection_that_is_cut_in_time_is_not_taken_for_one_that_the_server_closed(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    server.pause()
    cut, refused = dialling._cut, threading.Event()

    def cut_and_be_slow(dialled: Any) -> None:
        cut(dialled)
        refused.wait(20)

    monkeypatch.setattr(dialling, "_cut", cut_and_be_slow)
    text = _refusal(server.url, connect_timeout_ms=700)
    refused.set()

    assert "no answer within 0.7 s" in text


def test_somebody_who_answers_and_is_no_redis() -> None:
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        # Nobody accepts: the kernel takes the connection, and no more comes.
        assert f"redis://{HOST}:{port}" in _refusal(f"redis://{HOST}:{port}", connect_timeout_ms=700)


def test_a_sentinel_in_the_place_of_a_server(start_server: StartServer) -> None:
    with Sentinel(VALKEY, "svc", start_server(), quorum=1, down_after_ms=60_000) as sentinel:
        assert f"redis://{HOST}:{sentinel.port}" in (text := _refusal(f"redis://{HOST}:{sentinel.port}"))
        assert "name it in `sentinels`" in text
