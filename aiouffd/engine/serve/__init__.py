"""What brings the pages of a space: a source, or a handler.

Layout, the lowest first: `zeros`, `gate`, `pace`, `deadlines` and `reads` (bounds, timeouts, retries), `extents` (what
needs no waiting), `presence` (until each page is present); `source` and `handler`, the two backends.
"""
