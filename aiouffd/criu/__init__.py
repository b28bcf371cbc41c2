"""Lazy restores with CRIU.

Layout: `lazy_pages` (the daemon), `socket` (how `criu restore --lazy-pages` hands over its processes), `images` (what
CRIU's image files say, in the encoding of `image_file`), `page_server` (a client of the page server of
`criu dump --lazy-pages`), `relay` (a source of one process, read from another).
"""
