"""Where the loop runs: a process of its own, which survives its own death.

Layout, application's side: `client` (starts the pager, talks to it, starts it again), `tenant` (what it gives it to
serve), `request` (what it has asked), `orphan` (workers without a keeper), `engine` (all that, as a Monitor uses it),
`guard` (of a loop in one's own process). Pager's side: `keeper` (forks the worker, and forks it again), `worker` (the
loop), `tenancy` (what it serves from). Between them: `control` (messages on the socket), `travel` (pickles that take
descriptors along), `journal` (what a worker knows, kept where its successor finds it), `replay` (what that amounts to).
On both sides: `last_resort`, when nobody serves any more.
"""
