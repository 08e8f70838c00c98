"""How the engines of several processes meet in one directory: the socket of its owner."""
