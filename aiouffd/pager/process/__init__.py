"""The pager itself: a keeper, which only forks workers, and a worker, which runs the event loop.

Layout: `keeper`, `worker`, `tenancy` (what a worker serves from), `control` (messages on the socket), `travel` (pickles
that take descriptors along), `journal` (what a worker knows, kept where its successor finds it), `replay` (what a
journal amounts to), `last_resort` (SIGBUS for whoever touches what nobody serves any more).
"""
