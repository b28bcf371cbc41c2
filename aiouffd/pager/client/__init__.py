"""The side of the application that uses a pager.

Layout: `interpreter` (which Python a pager runs in), `launch` (starts it), `waiting` (how the client's thread waits),
`pair` (a keeper and its worker, as their parent sees them), `asking` (requests to whichever pair serves), `packing`
(what brings the pages, made ready to travel), `tenant` (memory that a pager is given to serve), `takeover` (from a
worker whose keeper has died), `abandoned` (when nothing of ours serves any more), `fd_store` (systemd's store of
descriptors), `holding` (what outlives a pager), `succession` (what another server has left), `client` (starts, asks and
replaces a pager), `forks` (which wait for a pager that is being replaced), `shared` (which Monitors use the same one,
and when it ends).
"""
