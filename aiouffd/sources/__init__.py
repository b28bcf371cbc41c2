"""Where the bytes come from.

Layout: `base` (the protocol, and `ZeroSource`), `buffer` (memory), `file` (a local file), `object_store` (http(s), s3,
gs, az through obstore), `concat` (several sources as one), `resolve` (from a path or URL to a source). A source is
picklable, since it is served in another process.
"""
