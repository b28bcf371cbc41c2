"""The pager itself: a keeper, which only forks workers, and a worker, which runs the event loop.

Layout, the lowest first: `handles` (descriptors, and errors that say why there are none), `inherited` (signals, streams
and limits), `deaths` (when a pager is given up), `cloning` (processes with one table of descriptors), `control`
(messages on the socket), `serialization` (how sources come here), `child_descriptors` (those of forked children),
`tenancy` (what a worker serves from), `state` (what must not be lost, as records), `journal` (where a successor finds
it), `notes` (what the owner has kept in it), `replay` (what a journal amounts to), `rewriting` (keeps it short),
`last_resort` (SIGBUS for what nobody serves any more), `inaccessible` (pages that cannot be had, before Linux 6.6),
`common_files` (memory that several spaces map), `served` (spaces and their sources), `blocked` (what blocks the loop),
`handover` (to a worker of another keeper), `answers` (what can be asked for), `worker`, `holder` (what outlives all
others), `keeper`.
"""
