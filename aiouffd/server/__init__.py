"""The face for memory of other processes: what `aiouffd serve` runs.

Layout: `server` (the clients, and the pager that serves them) > `clients` (what one client is, and what it asks),
`services` (the source of each client), `reception` (handoffs) > `rejection` (clients that are turned away), `prefilled`
(memory that was not empty), `metrics` (for Prometheus), `listener` (the socket's file).
"""
