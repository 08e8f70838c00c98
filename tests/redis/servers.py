"""Real servers for the tests: one, a cluster of three or six, and a primary that sentinels watch; all on loopback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import redis
from one_server import BINARIES, LIVING, VALKEY, Binary, Server, ServerProcess, wait_until
from ports import HOST, free_port
from redis.cluster import ClusterNode

__all__ = [
    "BINARIES",
    "LIVING",
    "VALKEY",
    "Binary",
    "Cluster",
    "Sentinel",
    "SentinelSetup",
    "Server",
    "StartServer",
    "wait_until",
]

StartServer = Callable[..., Server]
"""The fixture `start_server`: takes what `Server` takes."""

SLOTS = 16_384


class Cluster:
    """Three primaries that share the slots evenly, each with a replica if `replicas`. A context manager.

    Takes two seconds or more: a node's word that the cluster is up is worth nothing before it has waited that long.
    """

    NODE_TIMEOUT_MS = 1000

    def __init__(self, binary: Binary = VALKEY, *, replicas: bool = False, extra: Sequence[str] = ()) -> None:
        self.nodes: list[Server] = []
        """The three primaries, then their replicas in the same order; as it was at the start."""
        self._ids: dict[str, Server] = {}
        self._home: dict[int, Server] = {}
        self._half_moved: dict[int, Server] = {}
        self._stack = ExitStack()
        try:
            for _ in range(6 if replicas else 3):
                bus = free_port()
                lines = ["cluster-enabled yes", f"cluster-port {bus}", f"cluster-node-timeout {self.NODE_TIMEOUT_MS}"]
                node = self._stack.enter_context(Server(binary, extra=[*lines, *extra]))
                self.nodes.append(node)
                self._ids[node.ask("CLUSTER MYID")] = node
            self._join()
            for primary, replica in zip(self.nodes[:3], self.nodes[3:], strict=False):
                replica.ask("CLUSTER REPLICATE", self._id(primary))
            wait_until(
                lambda: all(self._replicas_known_to(node) == set(self.nodes[3:]) for node in self.nodes), "replicas"
            )
            self.wait_until_ok()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def urls(self) -> list[str]:
        """The primaries' addresses."""
        return [node.url for node in self.nodes[:3]]

    def close(self) -> None:
        self._stack.close()

    def client(self, **options: Any) -> redis.RedisCluster:
        """Return a client that follows redirections; the caller closes it."""
        start = ClusterNode(*self._any().address)  # type: ignore[no-untyped-call]
        return redis.RedisCluster(startup_nodes=[start], decode_responses=True, **options)

    def slot(self, key: str) -> int:
        """Return the slot of a key, by the server's own count."""
        return int(self._any().ask("CLUSTER KEYSLOT", key))

    def owner(self, key_or_slot: str | int) -> Server:
        """Return the primary that serves the key or the slot, in the view of a node that runs."""
        slot = key_or_slot if isinstance(key_or_slot, int) else self.slot(key_or_slot)
        return self._ids[self._owners(self._any())[slot]]

    def move_slot(self, slot: int, to: Server) -> None:
        """Move a slot with all its keys; on return every node knows: the old owner answers MOVED."""
        self.begin_move(slot, to)
        self.finish_move(slot)

    def begin_move(self, slot: int, to: Server, keys: Sequence[str] = ()) -> None:
        """Begin to move a slot, and leave it there with only `keys` moved.

        The owner still serves the keys it has and answers ASK for all others, new ones too. End it with `finish_move`.
        """
        source = self.owner(slot)
        assert source is not to, f"slot {slot} is there already"
        to.ask("CLUSTER SETSLOT", slot, "IMPORTING", self._id(source))
        source.ask("CLUSTER SETSLOT", slot, "MIGRATING", self._id(to))
        self._half_moved[slot] = to
        self._migrate(source, to, keys)

    def finish_move(self, slot: int) -> None:
        """Move what is left of a slot that `begin_move` began with."""
        source, to = self.owner(slot), self._half_moved.pop(slot)
        while keys := source.ask("CLUSTER GETKEYSINSLOT", slot, 100):
            self._migrate(source, to, keys)
        # The new owner first: between the two steps, a slot without an owner would be an error, one with two is not.
        others = [node for node in self._primaries() if node not in (source, to)]
        for node in (to, source, *others):
            node.ask("CLUSTER SETSLOT", slot, "NODE", self._id(to))
        wait_until(self._agree, f"slot {slot} known to be moved")
        assert self.owner(slot) is to

    def fresh(self) -> None:
        """Empty it and give every slot back to its first owner. Not after a node was killed: take another cluster."""
        for slot in list(self._half_moved):
            self.finish_move(slot)
        for node in self._primaries():
            node.fresh()
        owners = self._owners(self._any())
        for slot, home in self._home.items():
            if self._ids[owners[slot]] is not home:
                self.move_slot(slot, home)

    def wait_until_ok(self) -> None:
        """Wait until every running node says that the cluster is up, and every replica is in step."""

        def ok() -> bool:
            return (
                self._agree()
                and len(self._owners(self._any())) == SLOTS
                and all(self._info(node)["cluster_state"] == "ok" for node in self._running())
                and all(
                    node.ask("INFO", "replication").get("master_link_status", "up") == "up" for node in self._running()
                )
            )

        wait_until(ok, lambda: "\n".join(str(self._info(node)) for node in self._running()))

    def wait_until_replicated(self) -> None:
        """Wait until the replicas have everything that their primaries have acknowledged: they may be promoted then."""
        wanted = {node.port: node.ask("ROLE")[1] for node in self._primaries()}

        def have() -> bool:
            roles = [node.ask("ROLE") for node in self._running()]
            return all(int(role[4]) >= wanted[int(role[2])] for role in roles if role[0] == "slave")

        wait_until(have, "replicas that are in step")

    def kill_primary(self, key_or_slot: str | int) -> Server:
        """SIGKILL the primary of a key and return it. `wait_for_takeover` waits for its replica to take its place."""
        primary = self.owner(key_or_slot)
        primary.kill()
        return primary

    def wait_for_takeover(self, dead: Server) -> None:
        """Wait until another node serves the slots of a killed primary, and all other nodes report that."""
        gone = self._id(dead)
        wait_until(
            lambda: all(gone not in self._owners(node).values() for node in self._running()),
            lambda: f"a node that takes the place of {dead}",
        )
        self.wait_until_ok()

    def _join(self) -> None:
        """Give each of the first three a third of the slots, and make every node known to every other."""
        shares = [range(at * SLOTS // 3, (at + 1) * SLOTS // 3) for at in range(3)]
        for epoch, node in enumerate(self.nodes, 1):
            node.ask("CLUSTER SET-CONFIG-EPOCH", epoch)
        for node, share in zip(self.nodes, shares, strict=False):
            node.ask("CLUSTER ADDSLOTSRANGE", share[0], share[-1])
            self._home |= dict.fromkeys(share, node)
        # Each to each: by gossip alone it takes seconds more.
        for node in self.nodes:
            for other in self.nodes:
                if other is not node:
                    bus = other.ask("CONFIG GET", "cluster-port")["cluster-port"]
                    node.ask("CLUSTER MEET", HOST, other.port, bus)
        # By their ids: while two nodes shake hands, each is counted under a name that is made up.
        wait_until(
            lambda: all(self._ids.keys() <= self._known_to(node) for node in self.nodes), "nodes that know each other"
        )

    def _migrate(self, source: Server, to: Server, keys: Sequence[str]) -> None:
        if keys:
            source.ask("MIGRATE", HOST, to.port, "", 0, 5000, "KEYS", *keys)

    def _agree(self) -> bool:
        """Whether all see the same owners, of the same epochs.

        A node that moves a slot makes itself the newest by an epoch above those that it has heard of. Two moves in a
        row, faster than the word of the first goes round, would use one epoch twice, and the slot might jump back.
        """
        views = []
        for node in self._running():
            known = node.ask("CLUSTER NODES").values()
            views.append((self._owners(node), {other["node_id"]: other["epoch"] for other in known}))
        return all(view == views[0] for view in views)

    def _running(self) -> list[Server]:
        return [node for node in self.nodes if node.running]

    def _any(self) -> Server:
        return self._running()[0]

    def _primaries(self) -> list[Server]:
        return [node for node in self._running() if node.ask("ROLE")[0] == "master"]

    def _id(self, node: Server) -> str:
        return next(name for name, known in self._ids.items() if known is node)

    def _info(self, node: Server) -> Any:
        return node.ask("CLUSTER INFO")

    def _known_to(self, node: Server) -> set[str]:
        return {other["node_id"] for other in node.ask("CLUSTER NODES").values()}

    def _replicas_known_to(self, node: Server) -> set[Server]:
        """Return the replicas that `node` knows of."""
        others = node.ask("CLUSTER NODES").values()
        return {self._ids[other["node_id"]] for other in others if "slave" in other["flags"]}

    def _owners(self, node: Server) -> dict[int, str]:
        """Map each slot to the id of its owner as `node` sees it."""
        ranges = node.ask("CLUSTER SLOTS")
        return {slot: owner[2] for low, high, owner, *_ in ranges for slot in range(low, high + 1)}


class Sentinel(ServerProcess):
    """One sentinel: the same program in another mode."""

    flags = ("--sentinel",)

    def __init__(
        self,
        binary: Binary,
        name: str,
        primary: Server,
        *,
        quorum: int,
        down_after_ms: int,
        user: str | None = None,
        epoch: int = 0,
    ) -> None:
        """`user`: as whom it logs in at the servers, with the password `pw`; `epoch`: number of the last fail-over."""
        self._name = name
        self._quorum = quorum
        options = [f"sentinel down-after-milliseconds {name} {down_after_ms}"]
        options += [f"sentinel failover-timeout {name} {2 * down_after_ms + 2000}"]
        options += [f"sentinel auth-pass {name} {primary.password}"] if primary.password else []
        options += [f"sentinel auth-user {name} {user}", f"sentinel auth-pass {name} pw"] if user else []
        self._options = options

        def lines(port: int, folder: Path) -> list[str]:
            return self._lines(port, folder, primary, epoch)

        super().__init__(binary, lines)

    def watch(self, primary: Server) -> None:
        """Set it up anew: from its next start on it watches another primary, and knows of no fail-over."""
        text = "\n".join(self._lines(self.port, self.folder, primary, 0))
        (self.folder / "server.conf").write_text(text + "\n", encoding="utf-8")

    def _lines(self, port: int, folder: Path, primary: Server, epoch: int) -> list[str]:
        monitor = f"sentinel monitor {self._name} {HOST} {primary.port} {self._quorum}"
        where = [f"bind {HOST}", f"port {port}", f'dir "{folder}"', monitor, *self._options]
        return [*where, f"sentinel config-epoch {self._name} {epoch}", f"sentinel current-epoch {epoch}"]


class SentinelSetup:
    """A primary, a replica, and sentinels that put the one in the place of the other. A context manager.

    The sentinels' quorum is their majority. More than one take two seconds to find each other.
    """

    NAME = "scopestate-test"

    def __init__(
        self,
        binary: Binary = VALKEY,
        *,
        sentinels: int = 3,
        down_after_ms: int = 500,
        password: str | None = None,
        persistent: bool = False,
        extra: Sequence[str] = (),
    ) -> None:
        self.name = self.NAME
        """The service's name, as clients ask for it."""
        self.password = password
        self.sentinels: list[Sentinel] = []
        self._stack = ExitStack()
        try:
            options: dict[str, Any] = {"password": password, "persistent": persistent, "extra": extra}
            first = self._stack.enter_context(Server(binary, **options))
            second = self._stack.enter_context(Server(binary, replica_of=first, **options))
            self.nodes = (first, second)
            for _ in range(sentinels):
                watching = Sentinel(binary, self.name, first, quorum=sentinels // 2 + 1, down_after_ms=down_after_ms)
                self.sentinels.append(self._stack.enter_context(watching))
            self.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where the sentinels are."""
        return [sentinel.address for sentinel in self.sentinels]

    def primary(self) -> Server:
        """Return the server that the first running sentinel calls the primary."""
        return self._primary_of(self._watching()[0])

    def replica(self) -> Server:
        """Return the other one; it may be down, or not know yet that it is the replica."""
        first, second = self.nodes
        return second if self.primary() is first else first

    def fail_over(self) -> Server:
        """Let a sentinel change the roles while both servers run; return the new primary when it accepts writes."""
        before = self.primary()
        wait_until(self._begin, "a replica that may take over")
        return self.wait_for_new_primary(before)

    def kill_primary(self) -> Server:
        """SIGKILL the primary and return the new one when it accepts writes."""
        before = self.primary()
        before.kill()
        return self.wait_for_new_primary(before)

    def wait_for_new_primary(self, before: Server) -> Server:
        """Wait until every running sentinel names another primary than `before`, and it accepts writes."""
        after = self.nodes[1 - self.nodes.index(before)]

        def changed() -> bool:
            named = all(self._primary_of(sentinel) is after for sentinel in self._watching())
            return named and bool(after.ask("ROLE")[0] == "master")

        wait_until(changed, lambda: "\n".join(sentinel.log for sentinel in self.sentinels))
        return after

    def wait_until_ready(self) -> None:
        """Wait until each sentinel knows the others and a replica that is in step.

        After a fail-over it takes ten seconds or more until a sentinel makes the old primary a replica of the new one.
        """
        others = len(self._watching()) - 1

        def ready() -> bool:
            if self.replica().ask("INFO", "replication").get("master_link_status") != "up":
                return False
            seen = [sentinel.ask("SENTINEL MASTER", self.name) for sentinel in self._watching()]
            return all(
                state["num-slaves"] == 1 and state["num-other-sentinels"] >= others and state["flags"] == "master"
                for state in seen
            )

        wait_until(ready, lambda: "\n".join(sentinel.log for sentinel in self.sentinels))

    def _begin(self) -> bool:
        return bool(self._watching()[0].ask("SENTINEL FAILOVER", self.name))

    def _watching(self) -> list[Sentinel]:
        return [sentinel for sentinel in self.sentinels if sentinel.running]

    def _primary_of(self, sentinel: Sentinel) -> Server:
        _, port = sentinel.ask("SENTINEL GET-MASTER-ADDR-BY-NAME", self.name)
        return next(node for node in self.nodes if node.port == port)
