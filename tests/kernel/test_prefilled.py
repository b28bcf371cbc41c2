"""`server.prefilled`: memory that was filled before it was handed over."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from typing import TYPE_CHECKING

import pytest
from pattern import PAGE
from scenario import play
from served import MIB, Serve, hand_over

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from aiouffd.handoff.firecracker import Regions
from aiouffd.server.prefilled import zeros_before_handoff

if TYPE_CHECKING:
    from pathlib import Path

POPULATE = 0x8000


def regions_of(memory: mmap.mmap) -> tuple[int, Regions]:
    """Return the address of a mapping, and it as the only region."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return start, Regions((Mapping(start, start + len(memory), 0),), PAGE, None)


def test_pages_that_are_zeros_already() -> None:
    """They are counted; content, which a client that comes again has, is none of them."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, MIB, flags=private) as missing:
        assert zeros_before_handoff(os.getpid(), regions_of(missing)[1]) == 0
        missing[0] = 0  # one page, or a transparent huge one
        assert zeros_before_handoff(os.getpid(), regions_of(missing)[1]) >= PAGE
    with mmap.mmap(-1, MIB, flags=private | POPULATE) as filled:
        regions = regions_of(filled)[1]
        assert zeros_before_handoff(os.getpid(), regions) == MIB
        for page in range(MIB // PAGE):
            filled[page * PAGE + 7] = 1
        assert zeros_before_handoff(os.getpid(), regions) == 0


def test_a_process_that_has_ended() -> None:
    """It cannot be looked at."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with mmap.mmap(-1, MIB) as memory, pytest.raises(FileNotFoundError):
        zeros_before_handoff(pid, regions_of(memory)[1])


def filled(path: str) -> None:
    """Scenario: a client whose memory the kernel has filled."""
    memory = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | POPULATE)
    start, regions = regions_of(memory)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE)
    uffd.register(start, MIB, aiouffd.RegisterMode.MISSING)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [firecracker.encode(list(regions.mappings), PAGE)], [uffd.fileno()])
    good, _connection, _uffd = hand_over(path)
    assert good[5 * PAGE] == 6


def test_a_server_says_it(image: Path, tmp_path: Path) -> None:
    """In its log, once, about that client."""
    with Serve(tmp_path, image) as serve:
        play(filled, str(serve.path))
        assert serve.said.count(f"{MIB} bytes of its memory are zeros already") == 1
        assert serve.said.count("zeros already") == 1
