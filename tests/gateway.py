"""A real S3 gateway on the loopback interface, with one bucket: that of JuiceFS, over a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.sources.storage_options import StorageOptions

__all__ = ["BUCKET", "environment", "options", "s3"]

BUCKET = "vol"
USER, PASSWORD = "tester", "not-a-secret"


def _program() -> str:
    """Return where juicefs is: beside the interpreter of these tests."""
    found = shutil.which("juicefs", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    assert found is not None, "the extra `test` installs juicefs"
    return found


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[str]:
    """Run a gateway whose files are in a folder; yield its address."""
    database = f"sqlite3://{folder}/meta.db"
    juicefs, quiet = _program(), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    bucket = ["--storage", "file", "--bucket", f"{folder}/data/"]
    subprocess.run([juicefs, "format", *bucket, database, BUCKET], check=True, timeout=60, **quiet)  # type: ignore[call-overload]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "{}:{}".format(*free.getsockname())
    command = [juicefs, "gateway", database, address, "--no-usage-report", "--no-banner", "--metrics", "127.0.0.1:0"]
    secrets = {"MINIO_ROOT_USER": USER, "MINIO_ROOT_PASSWORD": PASSWORD, "HOME": str(folder)}
    gateway = subprocess.Popen(
        [*command, "--cache-dir", f"{folder}/cache"],
        env={**os.environ, **secrets},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(gateway, address)
        yield f"http://{address}"
    finally:
        gateway.kill()
        gateway.wait()


def _wait(gateway: subprocess.Popen[bytes], address: str) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert gateway.poll() is None, f"the gateway has ended with {gateway.returncode}"
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port))):
            return
        time.sleep(0.02)
    raise AssertionError("the gateway does not listen")


def options(url: str) -> StorageOptions:
    """Return what `storage_options=` takes to reach it."""
    return {
        "access_key_id": USER,
        "secret_access_key": PASSWORD,
        "endpoint": url,
        "region": "us-east-1",
        "client_options": {"allow_http": True},
    }


def environment(url: str) -> dict[str, str]:
    """Return the environment variables by which AWS's tools reach it."""
    return {
        "AWS_ACCESS_KEY_ID": USER,
        "AWS_SECRET_ACCESS_KEY": PASSWORD,
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
