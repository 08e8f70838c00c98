"""A bridge over TLS: the certificate is checked, unless the configuration says not to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from second_engine import OpenBridge

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.errors import ConfigError, StorageError
from scopestate.server.server import Server

TLS = Path(__file__).parents[1] / "server" / "tls"


@pytest.fixture
def far() -> Iterator[Server]:
    """A server that speaks TLS and wants a token."""
    tls = {"certfile": str(TLS / "cert.pem"), "keyfile": str(TLS / "key.pem")}
    manager = {"name": "iii-worker-manager", "config": {"port": 0, "tls": tls, "auth": {"tokens": ["s3cret"]}}}
    config = from_mapping({"workers": [manager]})
    with Engine(config) as engine, Server(engine, config=config.server) as server:
        yield server


def test_with_the_authority_and_the_token(far: Server, open_bridge: OpenBridge) -> None:
    engine = open_bridge(far.url, tls_ca_file=str(TLS / "cert.pem"), token="s3cret")
    engine.set("s", "k", 1)
    engine.close()

    assert far.engine.get("s", "k") == 1


def test_a_certificate_of_nobody_we_trust_is_refused(far: Server, open_bridge: OpenBridge) -> None:
    engine = open_bridge(far.url, token="s3cret", connect_wait_ms=500)

    with pytest.raises(StorageError, match=r"certificate verify failed.*nothing was sent"):
        engine.set("s", "k", 1)


def test_a_certificate_is_taken_unchecked_only_when_told(far: Server, open_bridge: OpenBridge) -> None:
    engine = open_bridge(far.url, tls_verify=False, token="s3cret")
    engine.set("s", "k", 1)
    engine.close()

    assert far.engine.get("s", "k") == 1


def test_a_wrong_token_fails_at_once_and_is_not_shown(far: Server, open_bridge: OpenBridge) -> None:
    engine = open_bridge(far.url, tls_verify=False, token="wr0ng", connect_wait_ms=60_000)

    with pytest.raises(StorageError, match=r"AUTH_ERROR.*nothing was sent") as caught:
        engine.set("s", "k", 1)

    assert "wr0ng" not in str(caught.value)


def test_a_file_of_authorities_that_is_not_there_stops_the_start(open_bridge: OpenBridge) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        open_bridge("wss://localhost:1", tls_ca_file="/no/such/file.pem")
