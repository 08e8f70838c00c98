"""The command `scopestate`: one module for each group of its commands. Needs the extra `cli`."""
