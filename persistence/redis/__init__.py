"""State in Redis or Valkey, shared by any number of engines (docs/design/0030-redis.md)."""
