"""The engine: descriptors on an event loop, and what resolves their faults. It knows no process but its own.

Layout, the lowest first: `loops` (which library runs the loop), `statistics` (counters, in an array that may be shared
memory), `allowance` (what a client may have in a second), `mappings` (which address shows which offset), `common_file`
(what several spaces map), `present` and `readahead` (what has been brought, and how much to bring with a fault),
`runs`, `flight` (pages to fill, and pages on their way), `two_threads` (large steps), `moving` (huge pages that are
moved in place of a COPY), `resolver` (ioctls until a run is resolved), `retrying` (pages that could not be had, and are
waited for), `apart` (calls that may never return), `protect` (which pages were written), `clock`, `dropping`, `owner`
and `bound` (what came longest ago is dropped, and missing again), `places` (which address has which offset of an
image), `kept` (the bytes of pages that were written before a snapshot has read them), `arming` (write protection of an
image, in each space that shows it), `capture` (the memory of one moment, while its threads write on) and `moment` (how
threads read it), `deferred` and `remainders` (runs that come later), `plain` (faults that need one COPY of bytes in
memory), `space` (one descriptor, and what is under way for it), `forsaking` (one that cannot be read any more),
`messages` (what a space does with its messages), `reading` (reads descriptors and serves plain faults, in the native
part or in Python), `dispatcher` (descriptors on a loop).

Above them `serve` (a source or a handler brings the pages), `ahead` (pages are brought before they are touched),
`options` (what serves, and how: what an application needs of an engine that runs elsewhere) and `assembly`, which puts
an engine together.
"""
