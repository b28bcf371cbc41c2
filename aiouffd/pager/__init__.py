"""Where the loop runs: a process of its own, which survives its own death.

Layout, application's side: `client` (starts the pager, talks to it, starts it again), `tenant` (what it gives it to
serve). Pager's side: `keeper` (forks the worker, and forks it again), `worker` (the loop). Between them: `control`
(messages on the socket), `travel` (pickles that take descriptors along), `journal` (what a worker knows, kept where its
successor finds it), `replay` (what that amounts to). On both sides: `last_resort`, when nobody serves any more.
"""
