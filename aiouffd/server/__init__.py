"""The face for memory of other processes: what `aiouffd serve` runs.

Layout: `server` (the sessions, and the pager that serves their clients) > `session` (one socket, and its clients) >
`clients` (what one client is, and what it asks), `services` (the source of each client), `reception` (handoffs) >
`rejection` (clients that are turned away), `prefilled` (memory that was not empty), `metrics` (for Prometheus),
`listener` (the socket's file), `jail` (the same, in a directory that others can write).
"""
