"""A lazy-loading page server: any HTTP server with Range will do; this one is asyncio alone.

    python examples/page_server.py --directory /data --port 8080

Clients map its files and fetch only what they touch: see lazy_array.py and safetensors_lazy.py. The server itself is
`aiouffd.page_server`, some 200 lines to start your own from.
"""

import sys

from aiouffd.page_server import main

if __name__ == "__main__":
    sys.exit(main())
