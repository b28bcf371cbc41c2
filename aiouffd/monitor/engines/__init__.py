"""Where the loop of a Monitor runs: in a pager process, in a thread, on the caller's loop, or in a server."""
