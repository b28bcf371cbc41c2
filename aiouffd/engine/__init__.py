"""The engine: descriptors on an event loop, and what resolves their faults. It knows no process but its own.

Layout: `dispatcher` (descriptors on a loop: readable, read, serve, look again), `space` (one descriptor: its messages,
what is under way and what is deferred), `plain` (faults that need one COPY of bytes that are in memory), `flight`
(pages on their way), `resolver` (ioctls until a run of pages is resolved), `mappings` (which address shows which
offset), `readahead` (how much to bring with a fault), `statistics` (counters in an array that may be shared memory).
Above them `serve` (a source or a handler brings the pages), `ahead` (pages are brought before they are touched) and
`assembly`, which puts an engine together.
"""
