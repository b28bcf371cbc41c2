"""`store.place`: what names a snapshot."""

from __future__ import annotations

from pathlib import Path

import pytest

import aiouffd
from aiouffd.store.place import is_snapshot, split


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("vm.snap", (".", "vm.snap")),
        ("/vm.snap", ("/", "vm.snap")),
        ("a/b/vm.snap", ("a/b", "vm.snap")),
        (Path("/x/vm.snap"), ("/x", "vm.snap")),
        ("file:///x%20y/v%25m.snap", ("/x y", "v%m.snap")),
        ("s3://bucket/vm.snap", ("s3://bucket", "vm.snap")),
        ("https://host/a%20b/v%20m.snap", ("https://host/a%20b", "v m.snap")),
    ],
)
def test_where_a_snapshot_is(place: str | Path, expected: tuple[str, str]) -> None:
    """Its store, and its name in it."""
    assert is_snapshot(place)
    assert split(place) == expected


@pytest.mark.parametrize("place", ["vm.mem", "/x/.snap", "s3://bucket/vm.mem", "snap", ""])
def test_what_names_no_snapshot(place: str) -> None:
    """The name has an end of its own."""
    with pytest.raises(aiouffd.StoreError, match=r"the name of a snapshot ends with \.snap"):
        split(place)


@pytest.mark.parametrize("thing", ["vm.mem", b"vm.snap", None, 5, "http://host/vm.mem?x=.snap"])
def test_other_things(thing: object) -> None:
    """They are no snapshots."""
    assert not is_snapshot(thing)


def test_a_signed_url_is_of_one_object() -> None:
    """The error does not show the signature."""
    with pytest.raises(aiouffd.StoreError, match="a URL with a query") as caught:
        split("https://me:secret@host/vm.snap?signature=secret")
    assert "secret" not in str(caught.value)
