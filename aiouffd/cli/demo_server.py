"""The HTTP server of `aiouffd demo`: files, with Range, and a latency that plays a distant server.

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

__all__ = ["SENT", "serving"]

SENT = "-sent"
"""What the number of bytes that were sent is called."""


@contextlib.asynccontextmanager
async def serving(path: Path, latency: float) -> AsyncIterator[str]:
    """Serve a file, or all files of a folder, on a free port of 127.0.0.1; yield its URL.

    Args:
        path: of it.
        latency: seconds before each answer.
    """
    files = {path.name: path} if path.is_file() else {}  # noqa: ASYNC240 - before it serves
    sent = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name == SENT:
            return web.Response(text=str(sent))
        await asyncio.sleep(latency)
        found = files.get(name, path / name).resolve()
        if found not in files.values() and not (found.is_relative_to(path) and found.is_file()):
            raise web.HTTPNotFound
        return web.FileResponse(found)

    async def count(request: web.Request, response: web.StreamResponse) -> None:
        nonlocal sent
        if request.match_info.get("name") != SENT and request.method == "GET":
            sent += response.content_length or 0

    application = web.Application()
    application.router.add_get("/{name:.+}", answer)  # and HEAD
    application.on_response_prepare.append(count)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield f"{url}/{path.name}" if files else url
    finally:
        await runner.cleanup()


async def _main(path: Path, latency: float) -> None:
    async with serving(path, latency) as url:
        print(url, flush=True)  # noqa: T201 - the demo reads it
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), float(sys.argv[2])))
