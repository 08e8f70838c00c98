"""Names and values of other string types arrive at handlers as plain text, from scopes in Redis too."""

from __future__ import annotations

import pytest
from on_redis import OpenRedis, open_redis
from plain_names import check_that_only_plain_names_arrive
from servers import Server

__all__ = ["open_redis"]


@pytest.mark.parametrize("events", ["local", "shared"])
def test_only_plain_names_arrive(events: str, valkey: Server, open_redis: OpenRedis) -> None:
    check_that_only_plain_names_arrive(open_redis(valkey.url, events=events))
