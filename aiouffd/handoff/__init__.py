"""How other processes hand over their memory: bytes of a wire format in, values out.

Layout: `arrival` (a handoff as it comes: bytes, descriptors, checks) > `memory_file` (the file behind a client's
memory), `nydus` (its format: objects, and answers to faults) > `firecracker` (its format: a JSON array of regions),
`receive` (bytes and descriptors from a socket, and who
sent them) > `own_threads` (calls that may block for ever), `json_lines` (what our own clients and the server say on
that connection afterwards).

Nothing that arrives is trusted: lengths, alignment, overlaps, the kind of each descriptor and the peer's user are
checked, and a client that sends nonsense costs the others nothing.
"""
