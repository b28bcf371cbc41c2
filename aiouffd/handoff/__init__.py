"""How other processes hand over their memory: a wire protocol in, descriptor, mappings and peer out.

Layout: `listen` (the socket's file), `receive` (bytes and descriptors from a socket; what is a userfaultfd and what is
not), `firecracker` (one message: a JSON array of regions, with the userfaultfd beside it), `link` (what our own clients
say on that connection afterwards), `criu` (the socket of `criu restore --lazy-pages`), `images` (CRIU's image files).
Nothing that arrives is trusted: lengths, alignment, overlaps, the kind of each descriptor and the peer's user are
checked, and who sends nonsense costs the others nothing.
"""
