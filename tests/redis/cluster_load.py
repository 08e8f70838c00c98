"""Writers for tests of a cluster, and where its scopes are."""

from __future__ import annotations

import threading
from collections.abc import Callable

from reliability.living import InThread
from servers import Cluster, Server, wait_until

from scopestate import Engine
from scopestate.errors import ScopestateError


class Writers:
    """Threads that each set key `k` of a scope to 1, 2, ... until they are told to end."""

    def __init__(self, engine: Engine, scopes: list[str]) -> None:
        self.acknowledged: dict[str, list[int]] = {scope: [] for scope in scopes}
        self.uncertain: dict[str, list[int]] = {scope: [] for scope in scopes}
        """What may have been written: the call has failed."""
        self._over = threading.Event()
        self._engine = engine
        self._threads = [InThread(self._of(scope)) for scope in scopes]

    def _of(self, scope: str) -> Callable[[], None]:
        def write() -> None:
            number = 0
            while not self._over.is_set():
                number += 1
                try:
                    self._engine.set(scope, "k", number)
                except ScopestateError:
                    self.uncertain[scope].append(number)
                else:
                    self.acknowledged[scope].append(number)

        return write

    def wait_for_more(self, count: int = 20, scopes: list[str] | None = None) -> None:
        before = {scope: len(numbers) for scope, numbers in self.acknowledged.items()}
        wait_until(
            lambda: all(
                len(self.acknowledged[scope]) >= before[scope] + count for scope in scopes or self.acknowledged
            ),
            "writes that go through",
        )

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.result()


def scopes_on_each(cluster: Cluster, prefix: str, each: int) -> dict[Server, list[str]]:
    """Return names of scopes by the primary that has them."""
    found: dict[Server, list[str]] = {}
    number = 0
    while len(found) < 3 or any(len(scopes) < each for scopes in found.values()):
        scope = f"s{number}"
        scopes = found.setdefault(cluster.owner(prefix + scope), [])
        if len(scopes) < each:
            scopes.append(scope)
        number += 1
    return found


def replica_of(cluster: Cluster, primary: Server) -> Server:
    port = primary.port
    return next(
        node
        for node in cluster.nodes
        if node.running and (role := node.ask("ROLE"))[0] == "slave" and int(role[2]) == port
    )
