"""How other processes hand over their memory: bytes of a wire format in, values out.

Layout: `receive` (bytes and descriptors from a socket; whether a descriptor is a userfaultfd), `firecracker` (one
message: a JSON array of regions, with the userfaultfd beside it), `lines` (what our own clients say on that connection
afterwards). Nothing that arrives is trusted: lengths, alignment, overlaps, the kind of each descriptor and the peer's
user are checked, and a client that sends nonsense costs the others nothing.
"""
