"""Driving a connection to another program, independent of the protocol. Redis and bridges use it."""
