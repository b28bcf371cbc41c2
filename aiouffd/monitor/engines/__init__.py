"""Where the loop of a Monitor runs: in a pager process, in a thread, on the caller's loop, or in a server.

Layout, the lowest first: `protocol` (what a Monitor asks of an engine); `calls`, `layout`, `local`, `protecting` (what
engines in this process use); `in_process`; `pipe` and `extents`, for `in_thread`; `on_demand`, for `pager`;
`served_by`.
"""
