"""`store.bucket`: objects behind URLs."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gateway
import pytest
from scenario import play
from snapshots import CHUNK, an_image, damage, packs_of, read_all

import aiouffd
from aiouffd.sources.http_answer import Answer, Validator
from aiouffd.sources.store_client import StoreClient
from aiouffd.sources.store_errors import Failure, RequestError
from aiouffd.store import bucket as module
from aiouffd.store import copy_sync, create_sync, extract_sync, gc_sync, verify_sync
from aiouffd.store.bucket import Bucket
from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = an_image(9, 40, 500)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a snapshot of two layers."""
    place = tmp_path_factory.mktemp("made")
    create_sync(DATA[: 7 * CHUNK] + DATA[8 * CHUNK :], place / "base.snap")
    create_sync(DATA, place / "a b.snap", base=place / "base.snap")
    return place


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(made, tmp_path / "store")


@pytest.fixture
def url(store: Path) -> Iterator[str]:
    """Where an HTTP server serves the store."""
    with serving(store) as url:
        yield url


@pytest.mark.parametrize("step", [10_000, CHUNK, 4 << 20])
def test_a_snapshot_behind_http(url: str, step: int) -> None:
    """All of it; its name may be quoted."""
    assert read_all(f"{url}/a%20b.snap", step=step) == DATA


def test_objects_that_are_missing(url: str, store: Path) -> None:
    """The error names the object, and the chunk."""
    with pytest.raises(aiouffd.StoreError, match=f"^{url}/c.snap: there is no such snapshot"):
        read_all(f"{url}/c.snap")
    packs_of(store)[0].unlink()
    with pytest.raises(aiouffd.StoreError, match=rf"^{url}/packs/[0-9a-f/]*, chunk \d+ .*: there is no such object"):
        read_all(f"{url}/a%20b.snap")


def test_objects_that_are_damaged(url: str, store: Path) -> None:
    """Not a byte of them is shown."""
    for pack in packs_of(store):
        damage(pack, pack.stat().st_size - 10)
    with pytest.raises(aiouffd.StoreError, match=r"chunk \d+ .*: it is damaged"):
        read_all(f"{url}/a%20b.snap")
    for pack in packs_of(store):
        pack.write_bytes(pack.read_bytes()[:-10])
    with pytest.raises(aiouffd.StoreError, match=r"chunk \d+ "):
        read_all(f"{url}/a%20b.snap")


def test_http_is_read_only(url: str) -> None:
    """The error says what can be written to."""
    with pytest.raises(aiouffd.StoreError, match="behind http can be read only: write to a bucket or a folder"):
        create_sync(DATA, f"{url}/new.snap")
    for call in (lambda store: list(store.list("packs")), lambda store: store.delete("x")):
        with pytest.raises(aiouffd.StoreError, match="can be read only"):
            call(Bucket(url, {}))


def test_a_server_that_is_gone() -> None:
    """It is not said to be without the snapshot."""
    with pytest.raises(aiouffd.SourceError, match="refuses connections"):
        Bucket("http://127.0.0.1:1", {}).size("x.snap")


def test_connections_are_shared(url: str) -> None:
    """All objects are asked for by one client of obstore; what it is called shows no password."""
    bucket = Bucket(url, {})
    one, other = bucket.part("a"), bucket.part("b")
    assert one._client._store is other._client._store  # type: ignore[union-attr]
    assert bucket.is_same(Bucket(url + "/", {}))
    assert not bucket.is_same(Bucket(url + "/x", {}))
    secret = Bucket("http://me:secret@host", {})
    assert (repr(secret), secret.name("x")) == ("Bucket('http://host')", "http://host/x")
    bucket.close()
    assert bucket.part("a")._client._store is not one._client._store  # type: ignore[union-attr]


async def test_plain_http_is_asked_on_the_loop(made: Path) -> None:
    """For all packs by the same connections, which end with the source."""
    with serving(made) as url:
        source = aiouffd.SnapshotSource(f"{url}/a%20b.snap")
        await source.prepare()
        source.begin(30, None, lambda: None)
        for at in range(0, source.size, 5 * CHUNK):
            assert bytes(await source.read(at, 4096)) == DATA[at : at + 4096]
        bucket = source.snapshot.store
        assert isinstance(bucket, Bucket)
        direct = bucket._direct[30]
        assert (len(direct._idle), len(direct._busy)) == (1, 0)
        await source.aclose()
        assert not direct._idle


# In a bucket


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway."""
    with gateway.s3(tmp_path_factory.mktemp("gateway")) as url:
        yield url


def test_objects_in_a_bucket(s3: str) -> None:
    """They are written, read, listed and removed, below a prefix."""
    bucket = Bucket("s3://vol/some/place", gateway.options(s3))
    assert bucket.put("packs/ab/cd", [b"12", b"345"])
    assert (bucket.size("packs/ab/cd"), bytes(bucket.read("packs/ab/cd", 1, 4))) == (5, b"234")
    assert [(entry.path, entry.size) for entry in bucket.list("packs")] == [("packs/ab/cd", 5)]
    assert [entry.path for entry in bucket.list("")] == ["packs/ab/cd"]
    assert list(bucket.list("packs/ab/c")) == []
    assert not bucket.put("packs/ab/cd", [b"6"], replace=False)
    assert bucket.put("packs/ab/cd", [b"6"])
    assert bytes(bucket.read("packs/ab/cd", 0, 1)) == b"6"
    assert not bucket.put("packs/ab/cd", [b"7"], instead_of=b"5")
    assert bucket.put("packs/ab/cd", [b"7"], instead_of=b"6")
    assert not bucket.put("packs/ab/cd", [b"8"], instead_of=b"6")
    assert bytes(bucket.read("packs/ab/cd", 0, 9)) == b"7"
    bucket.delete("packs/ab/cd")
    bucket.delete("packs/ab/cd")
    assert not bucket.put("packs/ab/cd", [b"8"], instead_of=b"7")
    assert bucket.size("packs/ab/cd") is None
    with pytest.raises(aiouffd.SourceError, match=r"no such object \(404\)"):
        bucket.read("packs/ab/cd", 0, 1)


def test_an_answer_that_was_lost(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written by a first try is no other writer's."""
    bucket, put, tries = Bucket("s3://vol/lost", gateway.options(s3)), StoreClient.put, list[bool]()

    def lossy(self: StoreClient, data: bytes, **options: Any) -> bool:
        tries.append(not tries and put(self, data, **options))
        if len(tries) == 1:
            raise RequestError(Failure("the connection broke", may_pass=True))
        return tries[-1]  # the store has the condition; this gateway does not know it

    monkeypatch.setattr(StoreClient, "put", lossy)
    assert bucket.put("x.snap", [b"1"], replace=False)
    assert tries == [True, False]
    assert not bucket.put("x.snap", [b"1"], replace=False)


def test_a_large_object_is_read_in_pieces(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its timeout; a write has a longer one."""
    monkeypatch.setattr(module, "_PIECE", 1000)
    bucket = Bucket("s3://vol/large", gateway.options(s3))
    data = bytes(range(256)) * 20
    bucket.put("x", [data])
    assert bytes(bucket.read("x", 5, 5000)) == data[5:5000]
    assert bytes(bucket.read("x", 4000, 9000)) == data[4000:]
    assert sorted(bucket._clients) == [30.0, 600.0]


def test_snapshots_in_a_bucket(s3: str, made: Path, tmp_path: Path) -> None:
    """Written there, and copied there and back; what is not needed is collected."""
    options: dict[str, Any] = {"storage_options": gateway.options(s3)}
    place = "s3://vol/snapshots"
    create_sync(DATA[: 20 * CHUNK], f"{place}/one.snap", **options)
    create_sync(DATA, f"{place}/two.snap", base=f"{place}/one.snap", **options)
    copy_sync(made / "a b.snap", f"{place}/a%20b.snap", **options)
    assert read_all(f"{place}/two.snap", **gateway.options(s3)) == DATA
    assert verify_sync(f"{place}/a%20b.snap", **options) == []
    extract_sync(f"{place}/a%20b.snap", tmp_path / "out", **options)
    assert (tmp_path / "out").read_bytes() == DATA
    with pytest.raises(aiouffd.StoreError, match="there is a snapshot of that name already"):
        create_sync(DATA, f"{place}/one.snap", **options)
    Bucket(place, gateway.options(s3)).delete("one.snap")
    removed = gc_sync(place, grace=0, **options)
    assert [entry.path.partition("/")[0] for entry in removed] == ["indexes"]
    assert read_all(f"{place}/two.snap", **gateway.options(s3)) == DATA


def test_a_bucket_through_the_pager(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials and endpoint come from the environment, as for other tools."""
    for name, value in gateway.environment(s3).items():
        monkeypatch.setenv(name, value)
    create_sync(DATA, "s3://vol/mapped/x.snap")
    play(look, "s3://vol/mapped/x.snap")


def look(place: str) -> None:
    """Map it and compare."""
    with aiouffd.open(place) as region:
        assert bytes(region) == DATA


def test_without_credentials(s3: str) -> None:
    """The error says what to set."""
    with pytest.raises(aiouffd.StoreError, match="there are no credentials: set AWS_ACCESS_KEY_ID"):
        read_all("s3://vol/x.snap")
    wrong: Any = {**gateway.options(s3), "secret_access_key": "wrong"}
    with pytest.raises(aiouffd.SourceError, match=r"access was refused \(403\)"):
        read_all("s3://vol/x.snap", **wrong)


def test_an_answer_without_a_byte_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not asked for again, for ever."""
    answers = [Answer(b"first", 0, Validator(None)), Answer(b"", 5, Validator(None))]
    part = SimpleNamespace(ask=lambda _: answers.pop(0))
    monkeypatch.setattr(Bucket, "part", lambda *_: part)
    assert Bucket("http://host", {}).read("x", 0, 100) == b"first"
