"""Small web applications that the real servers run: each request adds one, and says which process has answered."""

from __future__ import annotations

OPENED = """
import os
from scopestate import Engine, ops

def opened():
    kv = {"store_method": "file_based", "file_path": "./state"}
    return Engine.from_config({"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]})

def counted(engine):
    found = engine.update("hits", "all", [ops.Increment("", 1)]).new_value
    return f"{found} {os.getpid()}"
"""

ASGI = (
    OPENED
    + """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from scopestate.integrations.asgi import lifespan

async def count(request):
    answer = await request.state.engine.aio.update("hits", "all", [ops.Increment("", 1)])
    return PlainTextResponse(f"{answer.new_value} {os.getpid()}")

kv = {"store_method": "file_based", "file_path": "./state"}
config = {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}
app = Starlette(routes=[Route("/", count)], lifespan=lifespan(config))
"""
)
"""Opens its engine in the lifespan."""

WSGI = (
    OPENED
    + """
engine = opened()

def app(environ, start_response):
    try:
        status, body = "200 OK", counted(engine)
    except Exception as error:
        status, body = "500 Internal Server Error", f"{type(error).__name__}: {error}"
    start_response(status, [("Content-Type", "text/plain"), ("Connection", "close")])
    return [body.encode()]
"""
)
"""Opens its engine when it is imported."""

HOOKED = WSGI.replace("engine = opened()", "engine = None")
"""Has its engine opened by `HOOKS`."""

HOOKS = """
def post_worker_init(worker):
    import app
    app.engine = app.opened()

def worker_exit(server, worker):
    import app
    app.engine.close()
"""
"""gunicorn.conf.py"""
