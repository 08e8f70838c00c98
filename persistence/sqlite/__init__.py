"""A store in a directory: the SQLite database, its lock, and opening it after a crash or another version."""
