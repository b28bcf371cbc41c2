"""`server.dashboard.http`: who may look at a running server, and what is answered."""

from __future__ import annotations

import http.client
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, peek
from scenario import play
from served import MIB, Serve, free_port, hand_over

from aiouffd.server.dashboard.http import Dashboard, is_loopback
from aiouffd.server.server import Server

if TYPE_CHECKING:
    from pathlib import Path

PAGES = 40


def ask(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def followed(port: int, path: str, count: int, **headers: str) -> list[tuple[str, Any]]:
    """Return the first server-sent events."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    assert answer.getheader("Content-Type") == "text/event-stream"
    found: list[tuple[str, Any]] = []
    while len(found) < count:
        kind, data, _ = answer.readline(), answer.readline(), answer.readline()
        found.append((kind.decode().split()[1], json.loads(data.removeprefix(b"data: "))))
    connection.close()
    return found


def looks(path: str, port: int) -> None:
    """Scenario: a client, and a browser that looks at what it does."""
    region, _connection, _uffd = hand_over(path)
    for page in range(PAGES):
        assert peek(region.address + page * PAGE)
    events = followed(port, "/live", 4)
    by_kind = {kind: data for kind, data in events if kind == "look"}
    look = by_kind["look"]
    assert look["statistics"]["faults"] == look["sessions"][0]["statistics"]["faults"] == PAGES
    assert sum(look["latency"]) == PAGES
    assert look["restarts"][0].startswith("This server has 1 client: ")
    assert look["sessions"][0]["source"].startswith("FileSource(")
    assert [(each["name"], each["state"], each["clients"], each["bytes"]) for each in look["sessions"]] == [
        ("", "listening", 1, MIB)
    ]  # fmt: skip
    assert {data["kind"] for kind, data in events if kind == "happening"} >= {"session.created", "client.served"}
    status, _, body = ask(port, "/residency?session=")
    assert status == 200
    cells = json.loads(body)
    assert cells["clients"] == 1
    assert (len(cells["cells"]), cells["cells"][:PAGES], sum(cells["cells"])) == (256, [100] * PAGES, 100 * PAGES)


def test_what_is_told(image: Path, tmp_path: Path) -> None:
    """The page and its parts; what was counted, what has happened, and which memory is there. Only to this machine."""
    port = free_port()
    with Serve(tmp_path, image, "--readahead", "0", "--http", port) as serve:
        play(looks, str(serve.path), port)
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            status, headers, body = ask(port, path)
            assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert body
        assert ask(port, "/residency?session=none")[0] == 404
        assert ask(port, "/nothing")[0] == 404
        for host, status in (("localhost", 200), (f"[::1]:{port}", 200), ("evil.example", 403), ("", 403)):
            assert ask(port, "/", Host=host)[0] == status, host
        assert serve.end() == 0
        with pytest.raises(ConnectionRefusedError):
            ask(port, "/")


def test_who_has_the_token_may_look(image: Path, tmp_path: Path) -> None:
    """By a header, or once by the address and by a cookie from then on, whatever the host is called."""
    port, token = free_port(), tmp_path / "token"
    token.write_text("secret\n")
    with Serve(tmp_path, image, "--http", f"0.0.0.0:{port}", "--http-token-file", token):
        assert ask(port, "/")[0] == ask(port, "/live?token=secret")[0] == 401
        assert ask(port, "/?token=secre")[0] == ask(port, "/", Authorization="Bearer secreu")[0] == 401
        assert ask(port, "/", Authorization="Bearer secret", Host="anything")[0] == 200
        status, headers, _ = ask(port, "/?token=secret")
        assert (status, headers["Location"]) == (303, "/")
        cookie, *attributes = headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Strict"} <= set(attributes)
        assert followed(port, "/live", 1, Cookie=cookie)


def test_an_empty_file_has_no_token(image: Path, tmp_path: Path) -> None:
    """Whoever names one wants nobody else to look, on this machine either."""
    (tmp_path / "token").write_text("\n")
    with Serve(tmp_path, image, "--http", "0", "--http-token-file", tmp_path / "token", wait=False) as serve:
        assert serve.process.wait(60) == 1
    assert "it is empty, and has no token" in serve.said


def test_an_address_that_others_reach_needs_a_token(image: Path, tmp_path: Path) -> None:
    """It is refused before anything begins, and so is one that is in use: each error names the option."""
    assert [is_loopback(host) for host in ("localhost", "127.1.2.3", "::1", "10.0.0.1", "::")] == [True] * 3 + [
        False
    ] * 2
    with pytest.raises(ValueError, match="a token must say"):
        Dashboard(Server(), "10.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for address, said in (("0.0.0.0:0", "--http-token-file"), (port, f"--http 127.0.0.1:{port}")):
            with Serve(tmp_path, image, "--http", address, wait=False) as serve:
                assert serve.process.wait(60) == 1
            assert said in serve.said
