"""The engine: descriptors on an event loop, faults resolved by handlers. It knows of no process but its own.

Layout: `dispatcher` (readable -> read, busy-poll, timers), `space` (one descriptor: its messages, what is deferred),
`flight` (pages on their way; what a server of faults must do), `source_server` and `handler` (the two servers: of a
source, and of an application's coroutines), `prefetch` (how much to bring with a fault), `ahead` and `trace` (before
any fault), `mappings` (which address holds which offset), `zeros` (what need not be copied), `resolver` (ioctls until
a run is settled), `gate` and `deadlines` (bounds on what is under way), `statistics` (counters in an array that may be
shared memory); `local` and `in_thread`: all of it in one's own process.
"""
