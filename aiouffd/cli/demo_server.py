"""The HTTP server of `aiouffd demo`: one file, with Range, and a latency that plays a distant server.

It is a process of its own: a thread that waits for a page can hold the GIL of the demo's process. It ends at the end
of its standard input, and so with the demo, however the demo ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["serving"]


@contextlib.asynccontextmanager
async def serving(path: Path, latency: float) -> AsyncIterator[str]:
    """Serve a file on a free port of 127.0.0.1; yield its URL. `latency` is the seconds before each answer."""

    async def answer(_: web.Request) -> web.FileResponse:
        await asyncio.sleep(latency)
        return web.FileResponse(path)

    application = web.Application()
    application.router.add_get(f"/{path.name}", answer)  # and HEAD
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/{path.name}"
    finally:
        await runner.cleanup()


async def _main(path: Path, latency: float) -> None:
    async with serving(path, latency) as url:
        print(url, flush=True)  # noqa: T201 - the demo reads it
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), float(sys.argv[2])))
