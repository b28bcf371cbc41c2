"""The face for memory of this process: `Monitor` serves a region, `open` makes one, `map` makes one without a block.

Layout, the lowest first: `engines` (where the loop runs), `held` (who keeps a region: its Monitor, or its users),
`memfd_lock` (who may serve a memfd), `registration` (the userfaultfd of a region), `beginnings` (forks wait while a
Monitor is entered), `error_queue` (errors that nobody has raised yet), `deciding` (the application's choice about an
error), `crashes` (what standard error says of fatal touches), `lookout` (mappings of shared memory without a Monitor),
`recording` (the order of first touches), `reporting` (what a run was like), `progress` and `watching` (how much has
come), `entered` (what a Monitor can be asked inside its block), `saving` (what is kept when a program ends),
`monitor` (how it is entered and left), `early` (a replay that begins before a server has told the size), `map`, `open`.
"""
