"""Names and values of other string types arrive at handlers as plain text, through a bridge too."""

from __future__ import annotations

import pytest
from plain_names import check_that_only_plain_names_arrive
from second_engine import OpenBridge, RemoteProcess


@pytest.mark.parametrize("events", ["local", "remote"])
def test_only_plain_names_arrive(events: str, remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    check_that_only_plain_names_arrive(open_bridge(remote.url, events=events))
