"""Where the bytes come from.

Layout: `base` (what a source is, and `ZeroSource`), `buffer` (memory), `file` (a local file, with `attributes` and
`holes`: what is known of it without a system call that waits), `object_store` (http(s), s3, gs, az through obstore),
`concat` (several sources as one), `resolve` (from a path or URL to a source). A source can be pickled, since a pager
in another process serves it.
"""
