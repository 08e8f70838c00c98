"""The settings of a small Django project whose sessions and cache are in one directory, for all workers."""

from __future__ import annotations

import os

SECRET_KEY = "only for this example"  # noqa: S105 - it protects nothing
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "urls"
WSGI_APPLICATION = "urls.application"
MIDDLEWARE = ["django.contrib.sessions.middleware.SessionMiddleware"]
INSTALLED_APPS: list[str] = []
USE_TZ = True

DIRECTORY = os.environ.get("MEMBERS_DIRECTORY", "state")

CACHES = {
    # Sessions are saved before the answer is sent: members stay logged in when a worker is killed.
    "sessions": {
        "BACKEND": "scopestate.integrations.django.StateCache",
        "LOCATION": DIRECTORY,
        "OPTIONS": {"scope": "sessions", "durability": "commit", "size_limit": None},
    },
    "default": {
        "BACKEND": "scopestate.integrations.django.StateCache",
        "LOCATION": DIRECTORY,
        "OPTIONS": {"scope": "pages", "durability": "commit", "MAX_ENTRIES": 10_000},
    },
}
SESSION_ENGINE = "django.contrib.sessions.backends.cache"
SESSION_CACHE_ALIAS = "sessions"
