"""Integrations with other libraries: one module for each, imported only by programs that use it."""
