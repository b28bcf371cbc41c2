"""Benchmarks beside the peers: `python -m benchmarks`. Every figure that the project gives comes from here."""
