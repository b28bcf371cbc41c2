"""The engine: descriptors on an event loop, faults resolved by handlers. It knows of no process but its own.

Layout: `dispatcher` (readable -> read, busy-poll, timers), `space` (one descriptor: its messages, what is in
flight, what is deferred), `handler` (the coroutines, and the handler that serves a source), `prefetch` (how much
to bring with a fault), `mappings` (which address holds which offset), `resolver` (ioctls until a run is settled),
`statistics` (counters in an array that may be shared memory).
"""
