"""The engine that the console shows in these tests and in the screenshots: a small shop, behind a real web server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

from served import Served
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from windows import leave_all

from scopestate import Delivery, Engine, Retry, StateEvent
from scopestate.console import allow_everyone, console

PEOPLE = ("ada", "alan", "barbara", "donald", "edsger", "frances", "grace", "john", "katherine", "radia")
NAMES = {
    "ada": "Ada Lovelace",
    "alan": "Alan Turing",
    "barbara": "Barbara Liskov",
    "donald": "Donald Knuth",
    "edsger": "Edsger Dijkstra",
    "frances": "Frances Allen",
    "grace": "Grace Hopper",
    "john": "John McCarthy",
    "katherine": "Katherine Johnson",
    "radia": "Radia Perlman",
}


def config(folder: Path, **options: Any) -> dict[str, Any]:
    """Return the configuration: in files, with the history of users and carts."""
    kv = {"store_method": "file_based", "file_path": str(folder), **options}
    return {
        "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}],
        "scopes": [
            {"name": "users", "history": {}},
            {"prefix": "cart:", "history": {}},
            {"prefix": "session:", "ttl_ms": 1_800_000},
            {"name": "orders", "durability": "commit"},
        ],
    }


def fill(engine: Engine) -> None:
    """Write what a shop has: users, sessions that expire, carts with a history, orders that could not be shipped."""
    add_triggers(engine)
    for number, person in enumerate(PEOPLE):
        contact = {"email": f"{person}@example.org", "languages": ["en", "fr"][: 1 + number % 2]}
        engine.set("users", person, {"name": NAMES[person], "visits": number, "contact": contact, "active": True})
        engine.set("session:web", f"s-{number:04}", {"user": person, "page": "/cart"})
    for quantity in (1, 2, 3):
        engine.set("cart:ada", "book", {"title": "Notes on the Analytical Engine", "quantity": quantity, "price": 12.5})
    engine.set("cart:ada", "pen", {"title": "Pen", "quantity": 1, "price": 2.25})
    for number in range(1, 5):
        engine.set("orders", f"o-{number}", {"user": PEOPLE[number], "total": 14.75 * number, "paid": number != 3})
    engine.drain(timeout=30)


def add_triggers(engine: Engine) -> None:
    """Register a trigger in memory and two durable ones, of which one cannot handle some orders."""

    @engine.on_change(scope="orders", durable="ship-orders", retry=Retry(attempts=1), function_id="shop::ship")
    def ship(event: StateEvent, delivery: Delivery) -> None:
        if event.key in ("o-2", "o-4"):
            raise ConnectionError(f"the carrier does not answer for {event.key}")

    @engine.on_change(scope="users", durable="search-index", function_id="shop::index")
    def index(event: StateEvent) -> None:
        del event

    @engine.on_change(scope_prefix="cart:", fields=["quantity"], function_id="shop::count_cart")
    def count_cart(event: StateEvent) -> None:
        del event


class Shop:
    """A context manager: an engine in a folder or in memory, and its console under `/state` of a web application.

    `write` and `options` are parameters of `console`.
    """

    def __init__(
        self, folder: Path, *, filled: bool = True, memory: bool = False, write: bool = True, **options: Any
    ) -> None:
        self._config = None if memory else config(folder)
        self._filled = filled
        self._options = {"auth": allow_everyone, "write": write, **options}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            opened = Engine() if self._config is None else Engine.from_config(self._config)
            self.engine: Engine = stack.enter_context(opened)
            if self._filled:
                fill(self.engine)
            home = Route("/", lambda _: PlainTextResponse("the shop"))
            mount = Mount("/state", console(self.engine, **self._options))
            self._app = Starlette(routes=[home, mount])
            self._served = stack.enter_context(Served(self._app))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        leave_all()
        self._served.stop()
        self._stack.close()

    @property
    def port(self) -> int:
        """Where the server listens."""
        return self._served.port

    def url(self, page: str = "", **query: str) -> str:
        """Return the address of a page of the console."""
        return f"http://127.0.0.1:{self.port}/state/{page}" + (f"?{urlencode(query)}" if query else "")

    def restart(self, meanwhile: Callable[[], object]) -> None:
        """End the web server, do something, and start it again on the same port. The engine stays open."""
        port = self.port
        self._served.stop()
        meanwhile()
        self._served = Served(self._app, port=port)
        self._served.__enter__()
