"""scopestate beside its peers: one run, one machine, results as ratios. `python -m benchmarks --help`."""
