"""Files of text that are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

__all__ = ["check", "write"]

_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def check(path: str | os.PathLike[str]) -> Path:
    """Return where a link leads to, after a look whether a file can be made there.

    Raises:
        OSError: it cannot; `filename` is the path. EINVAL: there is something that is not a regular file.
    """
    final = Path(os.path.realpath(path))
    try:
        if final.exists() and not final.is_file():
            raise OSError(errno.EINVAL, "is not a regular file")  # noqa: TRY301 - named below
        part = _part(final)
        os.close(os.open(part, _FLAGS, 0o600))
        part.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return final


def write(path: Path, text: str) -> None:
    """Replace a file by one with this text. Where that fails, the old one stays.

    Raises:
        OSError: it cannot be written; `filename` is the path.
    """
    part = _part(path)
    try:
        with os.fdopen(os.open(part, _FLAGS, 0o666), "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        part.rename(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}")
