"""A store in a directory: SQLite, its lock, and how it opens what another version or a crash left."""
