"""What connects an engine to other libraries: a module for each, imported only by the programs that use it."""
