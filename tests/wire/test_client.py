"""The client: calls over one connection that breaks and comes back."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Raw

sys.path.insert(0, str(Path(__file__).parent))

from talking import PATIENCE_S, PlayedServer, played_server

from scopestate.errors import (
    CallTimeout,
    ConfigError,
    ConnectionLost,
    MessageTooLarge,
    NotConnected,
    Overloaded,
    RemoteFailure,
)
from scopestate.wire import frames
from scopestate.wire.address import Address, checked_url
from scopestate.wire.client import _FRAME_ROOM, Client
from scopestate.wire.options import ClientOptions

pytestmark = pytest.mark.asyncio


def quick(**options: Any) -> ClientOptions:
    """Options of a client that reconnects at once. A call that nothing ends is not ended by a time limit either."""
    hour_s = 3600.0
    return ClientOptions(
        **{
            "backoff_first_s": 0.01,
            "backoff_most_s": 0.05,
            "connect_wait_s": hour_s,
            "call_timeout_s": hour_s,
            **options,
        }
    )


async def test_a_call_is_answered_whatever_the_order_of_the_answers() -> None:
    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        first = asyncio.ensure_future(client.call("f", {"n": 1}))
        second = asyncio.ensure_future(client.call("f", {"n": 2}))
        calls = [await peer.next_call(), await peer.next_call()]
        assert [msgspec.json.decode(call.data) for call in calls] == [{"n": 1}, {"n": 2}]

        await peer.answer(calls[1], b'"two"')
        await peer.answer(calls[0], b'"one"')

        assert (await first, await second) == ("one", "two")


async def test_no_value_and_null_are_two_things() -> None:
    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        asked = [asyncio.ensure_future(client.call_raw("state::get", b"{}")) for _ in range(2)]
        await peer.answer(await peer.next_call())
        await peer.answer(await peer.next_call(), b"null")

        assert await asyncio.gather(*asked) == [None, b"null"]


async def test_an_error_of_the_other_side_keeps_its_code() -> None:
    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        asked = asyncio.ensure_future(client.call("f"))
        await peer.answer(await peer.next_call(), code="no_such_thing", message="not today", stacktrace="line 1")

        with pytest.raises(RemoteFailure) as caught:
            await asked

    assert (caught.value.code, caught.value.message, caught.value.stacktrace) == (
        "no_such_thing",
        "not today",
        "line 1",
    )


async def test_it_introduces_itself_after_its_registrations() -> None:
    async def handler(_: bytes) -> bytes | None:
        return None

    async with played_server() as server:
        client = Client(Address(server.url, token="s3cret"), quick(name="me", headers={"X-More": "1"}))
        client.register_function("app::f", handler)
        trigger_id = client.register_trigger("state", "app::f", {"scope": "s"})
        async with client:
            peer = await server.next_peer()
            function = await peer.next(frames.RegisterFunction)
            trigger = await peer.next(frames.RegisterTrigger)
            introduction = await peer.next(frames.InvokeFunction)
            await peer.send(frames.Ping())
            await peer.next(frames.Pong)  # so what came before it was read
            assert client.worker_id is not None

    assert function.id == "app::f"
    assert (trigger.id, trigger.function_id, bytes(trigger.config)) == (trigger_id, "app::f", b'{"scope":"s"}')
    assert (introduction.function_id, introduction.action) == ("engine::workers::register", frames.Void())
    assert msgspec.json.decode(introduction.data)["name"] == "me"
    assert (peer.headers["Authorization"], peer.headers["X-More"]) == ("Bearer s3cret", "1")


async def test_calls_made_without_a_connection_wait_for_one_and_keep_their_order() -> None:
    async with played_server() as server:
        url = server.url
        await server.stop()
        async with Client(url, quick()) as client:
            asked = [asyncio.ensure_future(client.call("f", n)) for n in range(5)]
            await asyncio.sleep(0)
            await server.start()
            peer = await server.next_peer()
            for n in range(5):
                call = await peer.next_call()
                assert bytes(call.data) == str(n).encode()
                await peer.answer(call, bytes(call.data))

            assert await asyncio.gather(*asked) == [0, 1, 2, 3, 4]


async def test_a_call_that_finds_no_connection_in_time_says_that_nothing_was_sent() -> None:
    async with played_server() as server:
        url = server.url
    async with Client(url, quick(connect_wait_s=0.05)) as client:
        with pytest.raises(NotConnected, match=r"cannot connect.*waited 0\.05 s, nothing was sent"):
            await client.call("f")


async def test_a_call_that_was_sent_when_the_connection_broke_may_have_been_applied() -> None:
    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        asked = asyncio.ensure_future(client.call("state::set", {}))
        await peer.next_call()
        peer.drop()

        with pytest.raises(ConnectionLost, match="a write may have been applied: read the key before retrying"):
            await asked


async def test_after_a_loss_it_connects_again_and_registers_again() -> None:
    states: list[bool] = []

    async def handler(data: bytes) -> bytes | None:
        return data

    async with (
        played_server() as server,
        Client(server.url, quick(), on_change=lambda connected, _: states.append(connected)) as client,
    ):
        client.register_function("f", handler)
        client.register_trigger("state", "f", {})
        peer = await server.next_peer()
        await client.wait_connected(PATIENCE_S)
        peer.drop()
        peer = await server.next_peer()
        assert (await peer.next(frames.RegisterFunction)).id == "f"
        assert (await peer.next(frames.RegisterTrigger)).function_id == "f"
        await peer.send(frames.InvokeFunction("f", Raw(b"7"), "00000000-0000-4000-8000-000000000001"))
        assert bytes((await peer.next(frames.InvocationResult)).result) == b"7"

    assert states == [True, False, True, False]


async def test_a_call_has_a_deadline_and_its_late_answer_is_dropped() -> None:
    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        await client.wait_connected(PATIENCE_S)
        with pytest.raises(CallTimeout, match=r"no answer to f within 0\.05 s; it may have been done") as caught:
            await client.call("f", timeout_s=0.05)
        assert caught.value.sent
        late = await peer.next_call()
        await peer.answer(late, b"1")

        asked = asyncio.ensure_future(client.call("g"))
        await peer.answer(await peer.next_call(), b"2")
        assert await asked == 2


async def test_a_cancelled_call_that_was_not_sent_is_never_sent() -> None:
    async with played_server() as server:
        url = server.url
        await server.stop()
        async with Client(url, quick()) as client:
            given_up = asyncio.ensure_future(client.call("given up"))
            wanted = asyncio.ensure_future(client.call("wanted"))
            await asyncio.sleep(0)
            given_up.cancel()
            await server.start()
            peer = await server.next_peer()
            call = await peer.next_call()
            await peer.answer(call, b"1")

            assert (call.function_id, await wanted) == ("wanted", 1)
            assert len(client._pending()) == 0


async def test_a_refused_token_fails_calls_at_once_and_is_tried_again() -> None:
    async with played_server() as server:
        server.status = 401
        async with Client(Address(server.url, token="wrong"), quick()) as client:
            with pytest.raises(NotConnected, match="HTTP 401; is the token right") as caught:
                await client.call("f")
            assert "wrong" not in str(caught.value)
            server.status = None
            await client.wait_connected(PATIENCE_S)


async def test_the_servers_goodbye_is_the_reason_that_callers_see() -> None:
    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        asked = asyncio.ensure_future(client.call("f"))
        await peer.next_call()
        await peer.send(frames.Error(frames.ErrorBody("LIMIT", "too many registrations")))
        await peer.socket.close(1008)

        with pytest.raises(ConnectionLost, match=r"too many registrations \(LIMIT\)"):
            await asked


async def test_a_call_that_the_server_did_not_even_listen_to_was_not_applied() -> None:
    async with played_server() as server, Client(Address(server.url, token="wrong"), quick()) as client:
        peer = await server.next_peer()
        asked = asyncio.ensure_future(client.call("f"))
        await peer.next_call()
        await peer.send(frames.Error(frames.ErrorBody("AUTH_ERROR", "who are you?")))
        await peer.socket.close(1008)

        with pytest.raises(NotConnected, match=r"who are you\? \(AUTH_ERROR\)"):
            await asked


async def test_it_answers_pings_and_shrugs_at_what_it_does_not_know() -> None:
    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        await peer.socket.send('{"type":"ping"}')
        assert isinstance(await peer.next(frames.Pong), frames.Pong)
        for text in ("", "  ", "{", "[]", '{"type":"observer"}', '{"type":"invocationresult"}', '{"type":"pong"}'):
            await peer.socket.send(text)
        await peer.socket.send(b'{"type":"ping"}')
        assert isinstance(await peer.next(frames.Pong), frames.Pong)
        assert client.connections == 1


async def test_a_call_of_a_function_it_lacks_is_answered_so() -> None:
    async with played_server() as server, Client(server.url, quick()):
        peer = await server.next_peer()
        await peer.send(frames.InvokeFunction("nobody", Raw(b"{}"), "00000000-0000-4000-8000-000000000001"))
        answer = await peer.next(frames.InvocationResult)

    assert answer.error == frames.ErrorBody("function_not_found", "Function nobody not found")


async def test_what_a_function_raises_goes_back_as_an_error() -> None:
    async def fails(_: bytes) -> bytes | None:
        raise ValueError("too bad")

    async with played_server() as server, Client(server.url, quick()) as client:
        client.register_function("f", fails)
        peer = await server.next_peer()
        await peer.send(frames.InvokeFunction("f", Raw(b"{}"), "00000000-0000-4000-8000-000000000001"))
        answer = await peer.next(frames.InvocationResult)

    assert answer.error == frames.ErrorBody("invocation_failed", "ValueError: too bad")


async def test_a_function_or_trigger_that_is_withdrawn_is_not_registered_again() -> None:
    async def handler(data: bytes) -> bytes | None:
        return data

    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        await client.wait_connected(PATIENCE_S)
        client.register_function("f", handler)
        client.register_function("stays", handler)
        trigger_id = client.register_trigger("state", "f", {})
        client.unregister_trigger(trigger_id)
        client.unregister_trigger("unknown")
        client.unregister_function("f")
        client.unregister_function("unknown")
        assert (await peer.next(frames.UnregisterTrigger)).id == trigger_id
        assert (await peer.next(frames.UnregisterFunction)).id == "f"

        peer.drop()
        peer = await server.next_peer()
        await peer.next(frames.InvokeFunction)  # the introduction, behind all registrations

    registered = [data for data in peer.raw if b'"registerfunction"' in data or b'"registertrigger"' in data]
    assert [b'"stays"' in data for data in registered] == [True]


async def test_an_answer_does_not_go_to_a_connection_that_did_not_ask() -> None:
    begun, gate = asyncio.Event(), asyncio.Event()

    async def slow(_: bytes) -> bytes | None:
        begun.set()
        await gate.wait()
        return b"1"

    async with played_server() as server, Client(server.url, quick()) as client:
        client.register_function("f", slow)
        peer = await server.next_peer()
        await peer.send(frames.InvokeFunction("f", Raw(b"{}"), "00000000-0000-4000-8000-000000000001"))
        await asyncio.wait_for(begun.wait(), PATIENCE_S)
        peer.drop()
        peer = await server.next_peer()
        await client.wait_connected(PATIENCE_S)
        gate.set()
        await peer.send(frames.InvokeFunction("nobody", Raw(b"{}"), "00000000-0000-4000-8000-000000000002"))
        answer = await peer.next(frames.InvocationResult)

    assert answer.function_id == "nobody"


async def test_an_ordered_function_takes_its_calls_one_after_another() -> None:
    seen: list[bytes] = []
    begun, gate = asyncio.Event(), asyncio.Event()

    async def slow(data: bytes) -> bytes | None:
        seen.append(data)
        begun.set()
        await gate.wait()
        return None

    async with played_server() as server, Client(server.url, quick()) as client:
        client.register_function("f", slow, ordered=True)
        peer = await server.next_peer()
        for n in range(3):
            await peer.send(frames.InvokeFunction("f", Raw(b"%d" % n), f"00000000-0000-4000-8000-00000000000{n}"))
        await peer.send(frames.Ping())
        await peer.next(frames.Pong)  # so all three calls are here
        await asyncio.wait_for(begun.wait(), PATIENCE_S)
        assert seen == [b"0"]
        gate.set()
        for _ in range(3):
            await peer.next(frames.InvocationResult)

    assert seen == [b"0", b"1", b"2"]


async def test_big_values_pass_and_too_big_ones_are_refused_before_they_are_sent() -> None:
    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        big = b'"%s"' % (b"x" * 5_000_000)
        asked = asyncio.ensure_future(client.call_raw("f", big))
        await peer.answer(await peer.next_call(), big)
        assert await asked == big

    async with played_server() as server, Client(server.url, quick(max_message_bytes=10_000)) as client:
        with pytest.raises(MessageTooLarge, match="takes 10002 bytes"):
            await client.call_raw("f", b'"%s"' % (b"x" * 10_000))


async def test_too_many_calls_are_refused() -> None:
    async with played_server() as server, Client(server.url, quick(max_pending=2)) as client:
        asked = [asyncio.ensure_future(client.call("f")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="slow down"):
            await client.call("f")
        peer = await server.next_peer()
        for _ in asked:
            await peer.answer(await peer.next_call(), b"1")
        assert await asyncio.gather(*asked) == [1, 1]


async def test_closing_fails_what_is_under_way_and_ends_the_connection_politely() -> None:
    async with played_server() as server:
        client = Client(server.url, quick())
        client.start()
        peer = await server.next_peer()
        asked = asyncio.ensure_future(client.call("f"))
        await peer.next_call()

        await client.close()
        await client.close()

        with pytest.raises(ConnectionLost, match="this client is closed"):
            await asked
        with pytest.raises(NotConnected, match="this client is closed"):
            await client.call("f")
        await asyncio.wait_for(peer.socket.wait_closed(), PATIENCE_S)
        assert peer.socket.close_code == 1000


@pytest.mark.parametrize(
    "url", ["", "localhost:49134", "http://localhost", "ws://", "ws://h:x", "ws://h:0", "ws://me:pw@h", "ws://h:70000"]
)
async def test_an_address_that_cannot_be_one(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_url(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "é"])
async def test_a_token_that_no_header_can_hold_is_not_shown(token: str) -> None:
    with pytest.raises(ConfigError, match="not shown here"):
        Address("ws://h", token=token)


async def test_a_file_of_authorities_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Client(Address("wss://localhost:1", tls_ca_file=str(tmp_path / "none.pem")))


async def test_a_server_that_comes_later_is_found(tmp_path: Path) -> None:
    server = PlayedServer()
    await server.start()
    await server.stop()
    async with Client(server.url, quick()) as client:
        with pytest.raises(NotConnected, match="cannot connect"):
            await client.wait_connected(0.05)
        await server.start()
        await client.wait_connected(PATIENCE_S)
        assert client.connected
    await server.stop()


def nothing_under_way(client: Client) -> None:
    """Fail if the client still has a call, or one to send."""
    pending = client._pending()
    assert (len(pending), len(pending.unsent)) == (0, 0)


async def in_step(peer: Any) -> None:
    """Wait until the client has read everything that was sent to it so far."""
    await peer.send(frames.Ping())
    await peer.next(frames.Pong)


async def test_each_way_in_which_a_call_ends_gives_its_place_back() -> None:
    async with played_server() as server, Client(server.url, quick(max_pending=2)) as client:
        peer = await server.next_peer()
        for round_ in range(3):
            answered = asyncio.ensure_future(client.call("answered"))
            failed = asyncio.ensure_future(client.call("failed"))
            await peer.answer(await peer.next_call(), b"1")
            await peer.answer(await peer.next_call(), code="no", message="no")
            assert await answered == 1
            with pytest.raises(RemoteFailure):
                await failed

            with pytest.raises(CallTimeout):
                await client.call("late", timeout_s=0.01)
            given_up = asyncio.ensure_future(client.call("given up"))
            late, call = await peer.next_call(), await peer.next_call()
            given_up.cancel()
            await asyncio.wait([given_up])
            nothing_under_way(client)
            await peer.answer(late, b"1")
            await peer.answer(call, b"1")  # nobody waits for these two
            await in_step(peer)
            nothing_under_way(client)

            lost = [asyncio.ensure_future(client.call("lost")) for _ in range(2)]
            await peer.next_call()
            await peer.next_call()
            peer.drop()
            for outcome in await asyncio.gather(*lost, return_exceptions=True):
                assert isinstance(outcome, ConnectionLost)
            nothing_under_way(client)
            peer = await server.next_peer()
            await client.wait_connected(PATIENCE_S)
            assert client.connections == round_ + 2


async def test_calls_that_are_never_sent_leave_nothing() -> None:
    async with played_server() as server:
        url = server.url
    async with Client(url, quick(connect_wait_s=0.01, max_pending=1)) as client:
        for _ in range(3):
            with pytest.raises(NotConnected):
                await client.call("f")
            assert len(client._pending()) == 0
    nothing_under_way(client)


async def test_a_call_that_was_sent_is_not_failed_by_the_wait_for_a_connection() -> None:
    async with played_server() as server:
        url = server.url
        await server.stop()
        async with Client(url, quick(connect_wait_s=PATIENCE_S)) as client:
            outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            call = client.post("f", b"1", lambda result, error: outcome.set_result((result, error)))
            to_connect = call.timer
            await server.start()
            peer = await server.next_peer()
            asked = await peer.next_call()
            assert to_connect is not None
            assert to_connect.cancelled()
            to_answer = call.timer
            assert to_answer is not None
            assert not to_answer.cancelled()
            await peer.answer(asked, b"2")
            assert await asyncio.wait_for(outcome, PATIENCE_S) == (b"2", None)
            assert to_answer.cancelled()


async def test_what_takes_an_outcome_and_fails_costs_the_other_calls_nothing() -> None:
    def fails(result: bytes | None, error: Exception | None) -> None:
        raise ValueError("not mine")

    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        client.post("f", b"1", fails)
        asked = asyncio.ensure_future(client.call("g"))
        for _ in range(2):
            await peer.answer(await peer.next_call(), b"2")
        assert await asked == 2
        nothing_under_way(client)


async def test_a_payload_of_exactly_the_limit_is_sent() -> None:
    limit = 10_000
    async with played_server() as server, Client(server.url, quick(max_message_bytes=limit)) as client:
        peer = await server.next_peer()
        room = limit - _FRAME_ROOM
        asked = asyncio.ensure_future(client.call_raw("f", b'"%s"' % (b"x" * (room - 2))))
        await peer.answer(await peer.next_call(), b"1")
        assert await asked == b"1"
        with pytest.raises(MessageTooLarge):
            await client.call_raw("f", b'"%s"' % (b"x" * (room - 1)))


async def test_an_answer_of_exactly_the_limit_is_sent_and_one_byte_more_fails_its_call() -> None:
    async def returns(data: bytes) -> bytes | None:
        return data

    caller = "00000000-0000-4000-8000-000000000001"
    fixed = len(frames.encode(frames.InvocationResult(caller, "f", Raw(b'""'))))
    async with played_server() as server, Client(server.url, quick(max_message_bytes=10_000)) as client:
        client.register_function("f", returns)
        peer = await server.next_peer()
        for more, code in ((0, None), (1, "MESSAGE_TOO_LARGE"), (0, None)):
            text = b'"%s"' % (b"x" * (10_000 - fixed + more))
            await peer.send(frames.InvokeFunction("f", Raw(text), caller))
            answer = await peer.next(frames.InvocationResult)
            assert (answer.error.code if answer.error else None) == code


async def cancelled_within(_: bytes) -> bytes | None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.cancel()
    await future
    return None


@pytest.mark.parametrize("ordered", [False, True], ids=["beside each other", "ordered"])
async def test_a_function_serves_on_whatever_its_calls_did(ordered: bool) -> None:
    async def function(data: bytes) -> bytes | None:
        if data == b'"fail"':
            raise ValueError("no")
        if data == b'"remote"':
            raise RemoteFailure("f", "CODE", "no")
        if data == b'"exit"':
            raise SystemExit(3)
        if data == b'"generator"':
            raise GeneratorExit
        return await cancelled_within(data) if data == b'"cancelled"' else data

    async with played_server() as server, Client(server.url, quick()) as client:
        client.register_function("f", function, ordered=ordered)
        peer = await server.next_peer()
        for round_ in range(3):
            outcomes = []
            ends = (b'"good"', b'"fail"', b'"remote"', b'"cancelled"', b'"exit"', b'"generator"', b'"good"')
            for number, data in enumerate(ends):
                caller = f"00000000-0000-4000-8000-0000000{round_:02}{number:03}"
                await peer.send(frames.InvokeFunction("f", Raw(data), caller))
                answer = await peer.next(frames.InvocationResult)
                assert answer.invocation_id == caller
                outcomes.append(answer.error.code if answer.error else bytes(answer.result))
            failed = "invocation_failed"
            assert outcomes == [b'"good"', failed, "CODE", failed, failed, failed, b'"good"']
        await in_step(peer)
        assert not client._functions._running


async def test_a_call_of_a_function_that_wants_no_answer_gets_none() -> None:
    async with played_server() as server, Client(server.url, quick()) as client:
        client.register_function("f", cancelled_within)
        peer = await server.next_peer()
        await peer.send(frames.InvokeFunction("f", Raw(b"1"), None, action=frames.Void()))
        await peer.send(frames.InvokeFunction("nobody", Raw(b"1"), None, action=frames.Void()))
        await in_step(peer)

    assert not [data for data in peer.raw if b'"invocationresult"' in data]


async def test_an_ordered_function_that_is_registered_again_starts_with_nothing_waiting() -> None:
    begun, gate = asyncio.Event(), asyncio.Event()
    seen: list[tuple[str, bytes]] = []

    async def first(data: bytes) -> bytes | None:
        seen.append(("first", data))
        begun.set()
        await gate.wait()
        return None

    async def second(data: bytes) -> bytes | None:
        seen.append(("second", data))
        return None

    async with played_server() as server, Client(server.url, quick()) as client:
        client.register_function("f", first, ordered=True)
        peer = await server.next_peer()
        for n in range(2):
            await peer.send(frames.InvokeFunction("f", Raw(b"%d" % n), f"00000000-0000-4000-8000-00000000000{n}"))
        await in_step(peer)
        await asyncio.wait_for(begun.wait(), PATIENCE_S)
        client.register_function("f", second, ordered=True)
        await peer.send(frames.InvokeFunction("f", Raw(b"2"), "00000000-0000-4000-8000-000000000002"))
        assert (await peer.next(frames.InvocationResult)).invocation_id.endswith("2")
        gate.set()
        assert (await peer.next(frames.InvocationResult)).invocation_id.endswith("0")

    assert seen == [("first", b"0"), ("second", b"2")]


async def test_a_client_that_is_closed_cancels_its_functions_and_answers_nothing_more() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def endless(_: bytes) -> bytes | None:
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()
        return None

    async with played_server() as server:
        async with Client(server.url, quick()) as client:
            client.register_function("f", endless)
            peer = await server.next_peer()
            await peer.send(frames.InvokeFunction("f", Raw(b"1"), "00000000-0000-4000-8000-000000000001"))
            await asyncio.wait_for(begun.wait(), PATIENCE_S)
        await asyncio.wait_for(ended.wait(), PATIENCE_S)
        await asyncio.wait_for(peer.socket.wait_closed(), PATIENCE_S)

    assert not [data for data in peer.raw if b'"invocationresult"' in data]


async def test_each_change_of_the_connection_is_told_once() -> None:
    told: list[tuple[bool, str]] = []
    refused: list[Any] = []
    async with played_server() as server:
        url = server.url
        client = Client(url, quick(), on_change=lambda *change: told.append(change), on_trigger_refused=refused.append)
        async with client:
            for _ in range(3):
                peer = await server.next_peer()
                await client.wait_connected(PATIENCE_S)
                assert client.why_not is None
                problem = frames.ErrorBody("CODE", "no")
                await peer.send(frames.TriggerRegistrationResult("t", "state", "f", problem))
                await in_step(peer)
                peer.drop()
            peer = await server.next_peer()
            await client.wait_connected(PATIENCE_S)
        assert client.why_not == "this client is closed"

    assert [connected for connected, _ in told] == [True, False] * 4
    assert all(reason.startswith("the connection was lost") for connected, reason in told[1:-1] if not connected)
    assert told[-1] == (False, "this client is closed")
    assert [(error.code, error.message) for error in refused] == [("CODE", "no")] * 3


async def test_a_call_that_cannot_be_made_fails_at_once_however_often_and_long_it_could_wait() -> None:
    async with played_server() as server:
        server.status = 403
        client = Client(server.url, quick())
        async with client:
            with pytest.raises(NotConnected, match="HTTP 403"):
                await asyncio.wait_for(client.call("first"), PATIENCE_S)
            for _ in range(3):
                with pytest.raises(NotConnected, match="HTTP 403"):
                    await asyncio.wait_for(client.call("f"), PATIENCE_S)
        for _ in range(3):
            with pytest.raises(NotConnected, match="this client is closed"):
                await asyncio.wait_for(client.call("f"), PATIENCE_S)
        nothing_under_way(client)


async def test_a_call_that_a_connection_does_not_take_in_time_says_that_nothing_was_sent() -> None:
    async with played_server() as server, Client(server.url, quick()) as client:
        peer = await server.next_peer()
        await client.wait_connected(PATIENCE_S)
        peer.socket.transport.pause_reading()
        big = b'"%s"' % (b"x" * 20_000_000)
        blocking = asyncio.ensure_future(client.call_raw("big", big))
        for _ in range(2):
            with pytest.raises(CallTimeout) as late:
                await asyncio.wait_for(client.call("f", timeout_s=0.05), PATIENCE_S)
            assert not late.value.sent
            assert len(client._pending()) == 1
        peer.socket.transport.resume_reading()

        call = await peer.next_call()
        assert call.function_id == "big"
        await peer.answer(call, b"1")
        assert await blocking == b"1"
        nothing_under_way(client)
