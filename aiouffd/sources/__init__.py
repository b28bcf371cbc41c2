"""Where the bytes come from.

Layout: `base` (the protocol, and `ZeroSource`), `buffer` (memory), `file` (a local file), `criu_page_server` (the
pages of a running `criu dump --lazy-pages`), `object_store` (http(s), s3, gs, az through obstore). A source is
picklable, since it is served in another process.
"""
