"""The parts of the temperatures example; `run.py` puts them together."""
