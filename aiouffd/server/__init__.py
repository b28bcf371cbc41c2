"""The face for memory of other processes: what `aiouffd serve` runs.

Layout: `dashboard` (a page for a browser), `control` (HTTP, for who manages sessions) > `server` (the sessions, and the
pager that serves their clients) > `yielding` (another server takes over), `happenings` (what has happened), `session`
(one socket, and its clients) > `entrance` (the socket, and its note) > `successor` (what a server before this one has
left), `snapshots` (of clients that run),
`mapped` (nydus' clients that map files), `services` (the source of each client) > `residence` (ranges that are brought
or dropped) > `clients` (what one client is, and what it asks), `reception` (handoffs) > `rejection` (clients that are
turned away), `prefilled` (memory that was not empty), `metrics` (for Prometheus), `clashes` (what excludes each other),
`jail` (a socket where others can write) > `listener` (the socket's file), `requests` (the log of what is no HTTP).
"""
