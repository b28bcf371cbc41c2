"""`cli.parameters`: what a user may write for a size, a rate, a time, a mode, an address."""

from __future__ import annotations

import math
from typing import Any

import click
import pytest

from aiouffd.cli import parameters


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (parameters.Size(), "65536", 65536),
        (parameters.Size(), "64K", 64 << 10),
        (parameters.Size(), "64 kib", 64 << 10),
        (parameters.Size(), "1G", 1 << 30),
        (parameters.Size(), "2TB", 2 << 40),
        (parameters.Size(), 7, 7),
        (parameters.Rate(), "max", math.inf),
        (parameters.Rate(), "1M", float(1 << 20)),
        (parameters.Seconds(0, min_open=True), "0.5", 0.5),
        (parameters.FileMode(), "600", 0o600),
        (parameters.FileMode(), "0660", 0o660),
        (parameters.FileMode(), 0o640, 0o640),
        (parameters.Address(), "9100", ("127.0.0.1", 9100)),
        (parameters.Address(), ":9100", ("127.0.0.1", 9100)),
        (parameters.Address(), "host:9100", ("host", 9100)),
        (parameters.Address(), "[::1]:9100", ("::1", 9100)),
        (parameters.Address(), ("host", 1), ("host", 1)),
    ],
)
def test_what_is_understood(kind: click.ParamType, text: Any, value: object) -> None:  # type: ignore[type-arg,unused-ignore]
    """Units, brackets, and values that are converted already."""
    assert kind.convert(text, None, None) == value


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (parameters.Size(), "many", "is not a size; write for example"),
        (parameters.Size(), "-1", "is not a size"),
        (parameters.Size(), "1.5G", "is not a size"),
        (parameters.Size(1 << 20), "1000K", "is too little; the least is 1048576"),
        (parameters.Rate(), "fast", "is not a size"),
        (parameters.Seconds(0, min_open=True), "0", "not in the range"),
        (parameters.Seconds(0, min_open=True), "nan", "is not a number of seconds"),
        (parameters.FileMode(), "888", "is not a file mode"),
        (parameters.FileMode(), "1600", "is not a file mode"),
        (parameters.Address(), "host", "is not an address"),
        (parameters.Address(), "host:65536", "is not an address"),
        (parameters.Address(), "host:-1", "is not an address"),
    ],
)
def test_what_is_refused(kind: click.ParamType, text: str, words: str) -> None:  # type: ignore[type-arg,unused-ignore]
    """With a sentence that says what to write."""
    with pytest.raises(click.BadParameter, match=words):
        kind.convert(text, None, None)
