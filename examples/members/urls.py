"""The pages: members log in and are counted, a report is computed once, and one page may be asked for ten times."""

from __future__ import annotations

import os
from collections.abc import Callable

from django.core.cache import cache
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from django.views.decorators.cache import cache_page

ALLOWED = 10
"""How often each member may search in an hour."""

View = Callable[[HttpRequest], HttpResponse]


def log_in(request: HttpRequest) -> HttpResponse:
    request.session["member"] = request.GET["name"]
    request.session["visits"] = 0
    return JsonResponse({"member": request.session["member"]})


def me(request: HttpRequest) -> HttpResponse:
    """Count a visit of the member that is logged in."""
    if "member" not in request.session:
        return JsonResponse({"error": "log in first"}, status=401)
    request.session["visits"] += 1
    return JsonResponse({name: request.session[name] for name in ("member", "visits")} | {"worker": os.getpid()})


@cache_page(3600)  # type: ignore[untyped-decorator]  # Django has no types
def report(request: HttpRequest) -> HttpResponse:
    """What takes long to compute: the middleware keeps the whole page."""
    cache.add("reports", 0, None)
    return JsonResponse({"computed": cache.incr("reports")})


def search(request: HttpRequest) -> HttpResponse:
    """A page with a limit: `add` and `incr` are one step each, over all workers."""
    name = f"searches:{request.session.get('member')}"
    cache.add(name, 0, 3600)
    if cache.incr(name) > ALLOWED:
        return JsonResponse({"error": "too many"}, status=429)
    return JsonResponse({"found": []})


urlpatterns = [path("log-in", log_in), path("me", me), path("report", report), path("search", search)]

application = get_wsgi_application()
