"""The face for memory of this process: `Monitor` serves a region, `open` makes one for a source and serves it.

Layout, the lowest first: `engines` (where the loop runs), `registration` (the userfaultfd of a region), `beginnings`
(forks wait while a Monitor is entered), `error_queue` (errors that nobody has raised yet), `crashes` (what standard
error says of fatal touches), `lookout` (mappings of shared memory without a Monitor), `recording` (the order of first
touches), `monitor`, `open`.
"""
