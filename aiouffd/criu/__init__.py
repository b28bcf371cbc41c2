"""Lazy restores with CRIU.

Layout: `lazy_pages` (the daemon), `socket` (how `criu restore --lazy-pages` hands its processes over), `images` (CRIU's
image files), `page_server` (the pages of a running `criu dump --lazy-pages`, as a source), `relay` (a source of one
process, read from another).
"""
