"""The command `scopestate`. Needs the extra `cli`."""
