"""A real web server on the loopback interface: nginx, whose locations name versions in different ways."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

from scenario import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["nginx"]

_LOCATIONS = {
    "strong": "",
    "dated": "etag off;",
    "weak": """etag off; add_header ETag 'W/"1"';""",
    "packed": "gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any;",
    "silent": "etag off; add_header Last-Modified '';",
    "whole": "max_ranges 0;",
    "brief": "keepalive_requests 2;",
    "closing": "keepalive_timeout 0;",
}
"""What is served under which name: with a strong ETag, by its date only, and so on."""


@contextlib.contextmanager
def nginx(folder: Path, work: Path) -> Iterator[str]:
    """Serve the files of a folder; yield the URL below which the locations are.

    Args:
        folder: its files are in each location.
        work: for the server's own files; requests are in `access.log`.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    locations = "".join(f"location /{name}/ {{ alias {folder}/; {rules} }}\n" for name, rules in _LOCATIONS.items())
    (work / "nginx.conf").write_text(f"""
        daemon off; master_process off; pid {work}/pid; error_log {work}/error.log;
        events {{ worker_connections 256; }}
        http {{
            access_log {work}/access.log; default_type application/octet-stream;
            client_body_temp_path {work}/a; proxy_temp_path {work}/b; fastcgi_temp_path {work}/c;
            uwsgi_temp_path {work}/d; scgi_temp_path {work}/e;
            server {{ listen 127.0.0.1:{port}; {locations} }}
        }}
    """)
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert program is not None, "the tests need nginx"
    server = subprocess.Popen([program, "-c", f"{work}/nginx.conf", "-p", str(work), "-e", f"{work}/error.log"])
    try:
        eventually(lambda: _listens(server, port), expected=True)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _listens(server: subprocess.Popen[bytes], port: int) -> bool:
    assert server.poll() is None, f"nginx has ended with {server.returncode}"
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
