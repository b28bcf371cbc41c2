"""`packing`: a service is packed so that nobody can change it."""

from __future__ import annotations

import os

import pytest

import aiouffd
from aiouffd.engine.options import Options, Service
from aiouffd.pager.client.packing import Pack

PAGE = 4096


def test_what_is_packed_cannot_be_changed(pack: Pack) -> None:
    """A forked child has the descriptor, too: it is sealed against writing, growing and shrinking."""
    assert os.fstat(pack.config.fileno()).st_size > 0
    with pytest.raises(PermissionError):
        os.pwrite(pack.config.fileno(), b"x", 0)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(pack.config.fileno(), size)
    assert pack.fds[0] == pack.config.fileno()


def test_a_source_of_ours_brings_no_path_to_import_from(pack: Pack) -> None:
    """Only what is pickled needs one. Tokens are unique."""
    assert pack.record["path"] == []
    other = Pack(Service(aiouffd.ZeroSource(PAGE)), Options())
    assert other.token != pack.token
    other.close()


def test_the_memory_file_of_an_older_pack_is_a_strangers(pack: Pack) -> None:
    """The version before did not say so. A file that all clients map is the server's own."""
    for memory, one_copy, foreign in ((1, 0, True), (2, PAGE, False), (0, 0, False)):
        options = {name: value for name, value in pack.options.items() if name != "foreign"} | {"one_copy": one_copy}
        record = {
            **pack.record,
            "options": options,
            "memory": memory,
            "config": os.dup(pack.config.fileno()),
            "fds": [],
        }
        arrived = Pack.arrived(record)
        assert arrived.record["options"]["foreign"] is foreign
        arrived.close()
