"""The face for memory of other processes: what `aiouffd serve` runs.

Layout: `server` (clients and their spaces), `listener` (the socket's file), `metrics` (counters for Prometheus).
"""
