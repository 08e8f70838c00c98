"""Scopes that live in another engine, over the wire."""
