"""The iii worker protocol: messages, a worker's conversation without a socket, and a client."""
