"""Members of zip files, found without copying them."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

import numpy as np
import pytest
from array_files import npy, region_of

import aiouffd
from aiouffd.formats import Npz


def archive(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytearray:
    """Return a zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as target:
        for name, data in members.items():
            target.writestr(name, data)
    return bytearray(file.getvalue())


A, B = npy(np.arange(5)), npy(np.arange(9.0))
BOTH = {"a.npy": A, "b.npy": B}


def test_where_members_are() -> None:
    """Behind whatever their headers have; also in a file that has something before its archive."""
    data = bytes(archive(BOTH))
    for before in (b"", b"#!/bin/sh\n"):
        region = region_of(before + data)
        file = Npz(region)
        for name, array in (("a", np.arange(5)), ("b", np.arange(9.0))):
            assert np.array_equal(file[name], array)
            assert region[file.info(name).start :][: array.nbytes] == array.tobytes()


def refused(data: Any, reason: str, name: str = "a") -> aiouffd.FormatError:
    """A member is refused when it is asked for, or the file before."""
    with pytest.raises(aiouffd.FormatError, match=reason) as caught:
        Npz(region_of(bytes(data))).info(name)
    return caught.value


def test_what_is_not_stored() -> None:
    """Compressed in some way, or encrypted: the error says so, and other members can be used."""
    refused(
        archive(BOTH, zipfile.ZIP_DEFLATED),
        r"'b.npy' is compressed: only members that are stored .* `region\.as_file\(\)`",
        "b",
    )
    data = archive(BOTH)
    data[6] |= 1  # the flag of encryption, in the header of `a`
    refused(data, "encrypted")
    assert np.array_equal(Npz(region_of(bytes(data)))["b"], np.arange(9.0))


def test_what_is_no_zip_file() -> None:
    """Nothing, a piece, a directory without members' places, one twice."""
    refused(b"", "no zip file")
    refused(b"PK\3\4" * 99, "no zip file")
    refused(archive(BOTH)[:-9], "no zip file")
    refused(archive(BOTH).replace(b"b.npy", b"a.npy"), "occurs twice")


def test_lying_headers() -> None:
    """Sizes that reach into the next member, in both headers or in one; offsets that are no member's."""
    data = archive(BOTH)
    directory = data.index(b"PK\1\2")
    for at, value, reason in (
        (directory + 24, len(A) + 200, "sizes differ"),  # the size in the directory
        (directory + 42, 1, "does not begin here"),  # the place
        (26, 65535, "in what comes behind"),  # the length of the name, before the member
        (28, 900, "in what comes behind"),  # of what is behind the name
        (0, 0, "does not begin here"),
    ):
        changed = bytearray(data)
        changed[at : at + 2] = struct.pack("<H", value)
        refused(changed, reason)
    both = bytearray(data)
    for at in (directory + 20, directory + 24):
        both[at : at + 4] = struct.pack("<I", len(A) + 200)
    refused(both, "in what comes behind")


def test_a_directory_that_cannot_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not read: it would be all of a large file."""
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, 65 << 20, 0, 0)
    region = aiouffd.Region((65 << 20) + len(end))
    region[-len(end) :] = end
    brought = []
    monkeypatch.setattr(aiouffd.Region, "bring", lambda _, start, length: brought.append((start, length)))
    with pytest.raises(aiouffd.FormatError, match="a directory of 68157440 bytes"):
        Npz(region)
    assert sum(length for _, length in brought) < 1 << 20
