"""Where the loop runs by default: a process of its own, which survives its own death.

Layout: `client` (the side of whoever uses a pager), `process` (the pager itself), `loglines` (log records as lines).
"""
