"""How other processes hand over their memory: a wire protocol in, descriptor, mappings and peer out.

Layout: `firecracker` (one message: a JSON array of regions, with the userfaultfd beside it), `link` (what our own
clients say on that connection afterwards). Nothing that arrives is trusted: lengths, alignment, overlaps, the kind
of each descriptor and the peer's user are checked, and who sends nonsense costs the others nothing.
"""
