"""The servers that the other tests here stand on do what those tests take for granted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from one_server import CERT, KEY
from ports import free_port
from servers import LIVING, VALKEY, Binary, Cluster, SentinelSetup, Server, StartServer, wait_until


def test_this_folder_does_not_hide_the_library() -> None:
    tests = Path(__file__).parents[1]
    program = f"import sys; sys.path.insert(0, {str(tests)!r}); import redis; print(redis.__file__)"

    seen = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tests)

    assert seen.stdout.strip() == redis.__file__
    assert tests not in Path(redis.__file__).parents


CERTIFICATE = (f'tls-cert-file "{CERT}"', f'tls-key-file "{KEY}"', f'tls-ca-cert-file "{CERT}"')

# -------------------------------------------------------------------------------------------------------- one server


def test_a_server_answers_as_soon_as_it_is_there(server_binary: Binary) -> None:
    with Server(server_binary) as server:
        assert redis.Redis is type(server.client())
        assert server.client().set("k", "v") is True
        assert server.ask("GET", "k") == "v"


def test_nothing_is_left_of_a_server_even_if_the_test_fails(server_binary: Binary) -> None:
    def fail() -> None:
        with Server(server_binary) as server:
            started.append(server)
            server.pause()
            raise RuntimeError

    started: list[Server] = []
    with pytest.raises(RuntimeError):
        fail()
    (server,) = started

    assert not server.folder.exists()
    assert server not in LIVING
    assert server.process is not None
    with pytest.raises(ProcessLookupError):
        os.kill(server.process.pid, 0)


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(server_binary: Binary) -> None:
    before = set(LIVING)

    with pytest.raises(AssertionError, match="no-such-option"):
        Server(server_binary, extra=["no-such-option yes"])

    assert before == LIVING


def test_the_shared_server_is_empty_and_knows_no_script_part_one(redis_server: Server) -> None:
    _is_empty_then_fill(redis_server)


def test_the_shared_server_is_empty_and_knows_no_script_part_two(redis_server: Server) -> None:
    _is_empty_then_fill(redis_server)


def _is_empty_then_fill(server: Server) -> None:
    script = "return 1"
    in_the_third = server.client(db=3)
    assert server.ask("DBSIZE") == 0
    assert in_the_third.dbsize() == 0
    assert server.client().script_exists("e0e1f9fabfc9d4800c877a703b823ac0578ff8db") == [False]
    server.ask("SET", "k", "v")
    in_the_third.set("k", "v")
    assert server.client().script_load(script) == "e0e1f9fabfc9d4800c877a703b823ac0578ff8db"


@pytest.mark.parametrize("persistent", [True, False])
def test_a_killed_server_comes_back_at_the_same_place_with_what_it_kept(
    server_binary: Binary, start_server: StartServer, persistent: bool
) -> None:
    server = start_server(server_binary, persistent=persistent)
    url = server.url
    server.ask("SET", "k", "v")

    server.kill()
    with pytest.raises(redis.ConnectionError):
        server.client().ping()
    server.start()

    assert server.url == url
    assert server.ask("GET", "k") == ("v" if persistent else None)


def test_an_orderly_restart_keeps_nothing_either_unless_told(server_binary: Binary, start_server: StartServer) -> None:
    forgets, keeps = start_server(server_binary), start_server(server_binary, persistent=True)
    for server in (forgets, keeps):
        server.ask("SET", "k", "v")
        server.restart()

    assert [server.ask("GET", "k") for server in (forgets, keeps)] == [None, "v"]


def test_a_paused_server_takes_requests_and_answers_when_it_goes_on(
    server_binary: Binary, start_server: StartServer
) -> None:
    server = start_server(server_binary)
    client = server.client(socket_timeout=1.0, retry=None)
    client.ping()

    server.pause()
    with pytest.raises(redis.TimeoutError):
        client.set("k", "v")
    server.resume()

    wait_until(lambda: server.ask("GET", "k") == "v", "the write that was waiting")


def test_a_password_is_asked_for_and_is_part_of_the_url(server_binary: Binary, start_server: StartServer) -> None:
    server = start_server(server_binary, password="p@ss/w:rd")

    with redis.Redis.from_url(server.url) as client:
        assert client.ping() is True
    with redis.Redis.from_url(server.url_for()) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_a_user_may_do_what_its_rules_say(server_binary: Binary, start_server: StartServer) -> None:
    server = start_server(server_binary, users={"app": ">secret ~state:* +@all"})

    with redis.Redis.from_url(server.url_for(user="app", password="secret")) as client:
        assert client.hset("state:s", "k", "1") == 1
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.set("elsewhere", "1")


def test_a_unix_socket(server_binary: Binary, start_server: StartServer) -> None:
    server = start_server(server_binary, unix_socket=True, password="secret")

    with redis.Redis.from_url(server.socket_url) as client:
        assert client.set("k", "v") is True
    assert server.ask("GET", "k") == "v"


def test_tls_where_the_program_has_it(server_binary: Binary, start_server: StartServer) -> None:
    if not server_binary.tls:
        with pytest.raises(AssertionError, match="built without TLS"):
            start_server(server_binary, tls=True)
        with pytest.raises(AssertionError, match="did not start"):
            start_server(server_binary, extra=[f"tls-port {free_port()}", *CERTIFICATE])
        return
    server = start_server(server_binary, tls=True)
    strict = start_server(server_binary, tls=True, client_certificates=True)

    assert server.url.startswith("rediss://")
    assert server.ask("PING") is True
    assert strict.ask("PING") is True
    with redis.Redis.from_url(server.url) as client, pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY"):
        client.ping()


def test_a_server_whose_memory_is_full(server_binary: Binary, start_server: StartServer) -> None:
    server = start_server(server_binary, max_memory="1kb")  # less than it needs for itself

    with pytest.raises(redis.exceptions.OutOfMemoryError):
        server.ask("SET", "k", "v")
    assert server.ask("GET", "k") is None


def test_a_replica_has_what_its_primary_had_and_refuses_writes(
    server_binary: Binary, start_server: StartServer
) -> None:
    primary = start_server(server_binary, password="secret")
    primary.ask("SET", "k", "v")
    replica = start_server(server_binary, password="secret", replica_of=primary)

    assert replica.ask("GET", "k") == "v"
    with pytest.raises(redis.exceptions.ReadOnlyError):
        replica.ask("SET", "k", "w")


# --------------------------------------------------------------------------------------------------------- a cluster


def _another(cluster: Cluster, than: Server) -> Server:
    return next(node for node in cluster.nodes[:3] if node is not than)


def test_every_slot_of_a_cluster_has_an_owner(server_binary: Binary) -> None:
    with Cluster(server_binary) as cluster:
        assert len(cluster.urls) == 3
        assert [cluster.owner(slot) for slot in (0, 8192, 16383)] == cluster.nodes
        with cluster.client() as client:
            assert client.mset_nonatomic({f"k{number}": number for number in range(100)})
        assert sum(node.ask("DBSIZE") for node in cluster.nodes) == 100


def test_the_old_owner_of_a_moved_slot_says_where_it_went(cluster: Cluster) -> None:
    old = cluster.owner("k")
    new = _another(cluster, old)
    old.ask("SET", "k", "v")

    cluster.move_slot(cluster.slot("k"), new)

    with pytest.raises(redis.exceptions.MovedError) as moved:
        old.ask("GET", "k")
    assert moved.value.port == new.port
    assert new.ask("GET", "k") == "v"
    assert cluster.owner("k") is new


def test_a_slot_that_moves_again_and_again_is_known_everywhere_each_time(cluster: Cluster) -> None:
    slot = cluster.slot("k")

    for number in range(30):
        new = cluster.nodes[number % 3]
        if new is not cluster.owner(slot):
            cluster.move_slot(slot, new)
        new.ask("SET", "k", number)
        for other in set(cluster.nodes) - {new}:
            with pytest.raises(redis.exceptions.MovedError) as moved:
                other.ask("GET", "k")
            assert moved.value.port == new.port


def test_the_owner_of_a_half_moved_slot_asks_for_what_has_gone_on(cluster: Cluster) -> None:
    old = cluster.owner("{tag}here")
    new = _another(cluster, old)
    for key in ("{tag}here", "{tag}gone"):
        old.ask("SET", key, "v")

    cluster.begin_move(cluster.slot("tag"), new, ["{tag}gone"])

    assert old.ask("GET", "{tag}here") == "v"
    for key in ("{tag}gone", "{tag}new"):
        with pytest.raises(redis.exceptions.AskError) as asked:
            old.ask("GET", key)
        assert asked.value.port == new.port
    with pytest.raises(redis.exceptions.MovedError):
        new.ask("GET", "{tag}gone")
    with new.client().pipeline(transaction=False) as asking:
        assert asking.execute_command("ASKING").get("{tag}gone").execute()[1] == "v"

    cluster.finish_move(cluster.slot("tag"))

    assert [new.ask("GET", key) for key in ("{tag}here", "{tag}gone")] == ["v", "v"]


@pytest.mark.parametrize("half", [True, False])
def test_a_shared_cluster_is_as_at_the_start(cluster: Cluster, half: bool) -> None:
    home, slot = cluster.owner("k"), cluster.slot("k")
    home.ask("SET", "k", "v")
    (cluster.begin_move if half else cluster.move_slot)(slot, _another(cluster, home))

    cluster.fresh()

    assert cluster.owner(slot) is home
    assert home.ask("GET", "k") is None


def test_a_replica_takes_the_place_of_a_killed_primary(server_binary: Binary) -> None:
    with Cluster(server_binary, replicas=True) as cluster:
        cluster.owner("k").ask("SET", "k", "v")
        cluster.owner("k").ask("WAIT", 1, 10_000)

        dead = cluster.kill_primary("k")
        cluster.wait_for_takeover(dead)

        assert cluster.owner("k") is cluster.nodes[cluster.nodes.index(dead) + 3]
        assert cluster.owner("k").ask("GET", "k") == "v"


# -------------------------------------------------------------------------------------------------------- sentinels


def test_sentinels_put_a_replica_in_the_place_of_a_killed_primary(server_binary: Binary) -> None:
    with SentinelSetup(server_binary, password="secret") as setup:
        first, second = setup.primary(), setup.replica()
        assert {first, second} == set(setup.nodes)
        assert len(setup.addresses) == 3

        assert setup.kill_primary() is second

        assert setup.primary() is second
        assert not first.running
        assert second.ask("SET", "k", "v") is True


def test_a_fail_over_by_request_changes_the_roles_while_both_run(server_binary: Binary) -> None:
    with SentinelSetup(server_binary, sentinels=1) as setup:
        first = setup.primary()

        second = setup.fail_over()

        assert second is not first
        assert second.ask("SET", "k", "v") is True
        assert setup.replica() is first
        assert first.running


def test_clients_find_the_primary_through_the_sentinels() -> None:
    with SentinelSetup(VALKEY, sentinels=1) as setup:
        finder = redis.Sentinel(setup.addresses)
        assert finder.discover_master(setup.name) == setup.primary().address
        for sentinel in finder.sentinels:
            sentinel.close()
