"""What drives a connection to another program, whatever is spoken over it: Redis and bridges use it."""
