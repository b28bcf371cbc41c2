"""What brings the pages of a space: a source, or a handler.

Layout, the lowest first: `zeros`, `bounds`, `handler` (what an application overrides), `gate`, `pace`, `deadlines` and
`reads` (timeouts, retries), `extents` (what needs no waiting), `presence` (until each page is present), `bulk` (large
COPYs of what is brought ahead); `source` and `handler_backend`, the two backends.
"""
