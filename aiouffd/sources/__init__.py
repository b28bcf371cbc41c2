"""Where the bytes come from.

Layout:

- `base`: what a source is, and `ZeroSource`.
- `buffer`: memory. `concat`: several sources as one.
- `file`: a local file. `file_attributes` and `holes` are what is known of it without a system call that may wait.
- `layered`: files that hide parts of each other; `overlay` is the table of which shows what.
- `object_store`: an object behind a URL. It asks `store_client` (obstore), or `plain_http` where obstore refuses valid
  answers. While it is served, http without options goes by `loop_http`, as far as that understands the answers.
  `http_answer`, `store_errors` and `store_settings` are what these share. `rooms`: memory for large answers.
- `fsspec_source`: a file of any fsspec filesystem.
- `daemon_threads`: for calls that may never return.
- `resolve`: from a path or URL to a source.

A source can be pickled, or travels as plain values, since a pager in another process serves it.
"""
