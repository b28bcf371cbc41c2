"""`store.codecs`: compression and hashes."""

from __future__ import annotations

import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import aiouffd
from aiouffd.store import codecs
from aiouffd.store.codecs import CODECS, compressor, digest, digest_of, expand

if TYPE_CHECKING:
    from pathlib import Path

FRAME = compressor("zstd")(bytes(1000))[1]


@given(st.binary(min_size=1, max_size=5000), st.integers(1, 300), st.sampled_from(sorted(CODECS)))
def test_what_is_compressed_comes_back(data: bytes, times: int, codec: str) -> None:
    """With each codec, and never in more bytes than it has."""
    data *= times
    number, frame = compressor(codec)(data)
    assert number in (0, CODECS[codec])
    assert len(frame) <= len(data)
    assert expand(number, frame, len(data)) == data


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_what_does_not_become_shorter_is_not_compressed(codec: str) -> None:
    """It is stored as it is."""
    assert compressor(codec)(b"abc") == (0, b"abc")


@given(st.sampled_from(["zstd", "lz4"]), st.data())
def test_a_damaged_frame_is_an_error_or_other_bytes(codec: str, data: st.DataObject) -> None:
    """Whatever is damaged: a ValueError, or bytes of the right length, which their hash tells from others."""
    whole = bytes(range(256)) * 40
    number, frame = compressor(codec)(whole)
    damaged = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    cut = bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    try:
        found = expand(number, cut, len(whole))
    except ValueError:
        return
    assert len(found) == len(whole)
    assert digest(found) != digest(whole) or found == whole


def test_memory_is_not_taken_for_what_a_frame_announces() -> None:
    """A frame of a few bytes may announce terabytes."""
    bomb = b"\x28\xb5\x2f\xfd\xe0" + (1 << 42).to_bytes(8, "little") + bytes(16)
    assert zstandard.frame_content_size(bomb) == 1 << 42
    with pytest.raises(ValueError, match="announces 4398046511104 bytes, not 65536"):
        expand(CODECS["zstd"], bomb, 65536)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_frame_of_another_length(number: int) -> None:
    """It holds fewer bytes than its chunk has."""
    name = {number: name for name, number in CODECS.items()}[number]
    with pytest.raises(ValueError, match=r"not 1001|cannot decompress"):
        expand(number, compressor(name)(bytes(1000))[1], 1001)


def test_hashes() -> None:
    """BLAKE3, cut; of one buffer or of its parts."""
    assert digest(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9"
    assert digest_of([b"ab", b"", b"c"], 32).hex() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_what_cannot_be_chosen() -> None:
    """A codec or level that does not exist is a ValueError at once, not in a thread."""
    with pytest.raises(ValueError, match="there is no codec 'gzip': choose from none, zstd, lz4"):
        compressor("gzip")
    with pytest.raises(ValueError, match="level"):
        compressor("zstd", 100)


@pytest.mark.parametrize(("name", "library"), [("zstd", "zstandard"), ("lz4", "lz4.block")])
def test_a_missing_library_is_named(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that has it."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(aiouffd.StoreError, match=rf"needs the library {library[:3]}.*'aiouffd\[store\]'"):
        compressor(name)
    with pytest.raises(aiouffd.StoreError, match="needs the library"):
        expand(CODECS[name], FRAME, 1000)


def test_a_library_that_another_thread_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it is in sys.modules: it is waited for."""
    begun, go = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "its_gate", types.SimpleNamespace(begun=begun, go=go))
    (tmp_path / "slow_library.py").write_text("import its_gate\nits_gate.begun.set()\nits_gate.go.wait()\nvalue = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(codecs._library, "slow_library")
        begun.wait()
        second = pool.submit(lambda: codecs._library("slow_library").value)
        while not (second.running() or second.done()):
            pass
        threading.Timer(0.05, go.set).start()
        assert (first.result().value, second.result()) == (5, 5)
    del sys.modules["slow_library"]
