"""The control's interface, asked by curl: each operation of its document, with right and with wrong arguments."""

from __future__ import annotations

import json
import os
import subprocess
from array import array
from pathlib import Path
from typing import Any

import attrs
import jsonschema
from openapi_spec_validator import OpenAPIV31SpecValidator, validate
from scenario import eventually, play
from served import MIB, Serve, hand_over

import aiouffd
from aiouffd.engine.ahead.trace import Trace, fingerprint

_SIZE = MIB


@attrs.frozen
class Answer:
    """What came back."""

    status: int
    kind: str
    body: Any


@attrs.define
class Asker:
    """Asks by curl, and compares what comes with the document.

    Attributes:
        control: the path of the socket.
        document: of the server.
        done: the operations that were done, and those that were refused.
    """

    control: str
    document: dict[str, Any] = attrs.field(factory=dict)
    done: set[str] = attrs.field(factory=set)
    refused: set[str] = attrs.field(factory=set)

    def command(self, method: str, path: str, body: object = None, *more: str) -> list[str]:
        """Return the command."""
        said = body if isinstance(body, str) else json.dumps(body)
        given = [] if body is None else ["--data-binary", said]
        options = ["-sS", "--max-time", "60", "--unix-socket", self.control, "-w", "\n%{http_code} %{content_type}"]
        return ["curl", *options, "-X", method, *given, *more, f"http://localhost{path}"]

    def curl(self, method: str, path: str, body: object = None, *more: str) -> Answer:
        """Ask, whatever the document says."""
        said = subprocess.run(self.command(method, path, body, *more), capture_output=True, text=True, check=False)
        return answer(said.stdout)

    def ask(self, operation: str, name: str = "", body: object = None, *, wrong: int = 0, **more: str) -> Any:
        """Have an operation done, or refused with the status `wrong`; return the body of the answer."""
        method, path, described = next(
            (method.upper(), path, described)
            for path, methods in self.document["paths"].items()
            for method, described in methods.items()
            if described["operationId"] == operation
        )
        if body is not None and not isinstance(body, str):
            schema = described["requestBody"]["content"]["application/json"]["schema"]
            assert self.fits(body, schema) is (wrong != 422), (operation, body)
        headers = [part for key, value in more.items() for part in ("-H", f"{key.replace('_', '-')}: {value}")]
        return self.check(operation, described, self.curl(method, path.format(name=name), body, *headers), wrong)

    def check(self, operation: str, described: dict[str, Any], got: Answer, wrong: int) -> Any:
        """Compare an answer with its description."""
        (status,) = set(described["responses"]) - {"default"}
        said = described["responses"]["default" if wrong else status]
        assert got.status == (wrong or int(status)), (operation, got)
        content = said.get("content", {"": {"schema": True}})
        assert got.kind in content, (operation, got)
        if got.kind:
            assert self.fits(got.body, content[got.kind]["schema"]), (operation, got)
        else:
            assert got.body is None
        if wrong:
            assert got.body["status"] == wrong
            assert got.body["detail"]
        (self.refused if wrong else self.done).add(operation)
        return got.body

    def fits(self, value: Any, schema: Any) -> bool:
        """Tell whether a value is as the document says."""
        whole = {"allOf": [schema], "components": self.document["components"]}
        return bool(jsonschema.Draft202012Validator(whole).is_valid(value))


def answer(text: str) -> Answer:
    """Return what curl has printed, as an answer."""
    body, _, last = text.rpartition("\n")
    status, _, kind = last.partition(" ")
    return Answer(int(status), kind.partition(";")[0], json.loads(body) if "json" in kind else body or None)


def everything(directory: str, image: str) -> None:
    """Scenario: sessions with a client each, whose memory is a file that it hands over; none touches a page."""
    place = Path(directory)
    with Serve(place, "--control", place / "control", socket="") as serve:
        asker = Asker(str(place / "control"))
        asker.document = asker.curl("GET", "/openapi.json").body
        validate(asker.document, cls=OpenAPIV31SpecValidator)
        assert asker.ask("server")["sessions"] == 0
        new = {"socket": f"{directory}/vm.sock", "source": image, "readahead": 0}
        created = asker.ask("create", body={"name": "vm", **new})
        assert (created["name"], created["state"]) == ("vm", "listening")
        other = {"name": "small", **new, "socket": f"{directory}/small.sock", "max_resident": _SIZE}
        assert asker.ask("create", body=other)["settings"]["max_resident"] == _SIZE
        process, leave = forked(directory)
        eventually(lambda: asker.ask("server")["clients"], expected=2)
        works(asker, place)
        snapshots(asker, place)
        is_refused(asker, {"name": "vm", **new})
        events(asker)
        ends(asker)
        operations = {item["operationId"] for methods in asker.document["paths"].values() for item in methods.values()}
        assert operations == asker.done == asker.refused
        os.close(leave)
        assert os.waitpid(process, 0)[1] == 0
        assert serve.end() == 0


def forked(directory: str) -> tuple[int, int]:
    """Be two clients in another process, which ends when the descriptor that is returned is closed."""
    until, leave = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(leave)
        kept = [hand_over(f"{directory}/{name}.sock", _SIZE, shared=True, protected=True) for name in ("vm", "small")]
        os.read(until, len(kept))
        os._exit(0)
    os.close(until)
    return process, leave


def works(asker: Asker, place: Path) -> None:
    """Ask for what the sessions do."""
    assert {session["name"] for session in asker.ask("sessions")} == {"vm", "small"}
    assert [client["number"] for client in asker.ask("session", "vm")["clients"]] == [1]
    brought = asker.ask("prefetch", "small", {"offset": 0, "length": _SIZE // 2})
    assert brought["statistics"]["pages_prefetch"] == _SIZE // 2 // 4096
    assert asker.ask("evict", "small", {"length": _SIZE // 4})["bytes"] == _SIZE // 4
    asker.ask("evict", "small")  # a body that may be left out
    recording = {"path": str(place / "trace"), "merge": "union"}
    assert asker.ask("record", "vm", recording)["recording"] == recording["path"]
    asker.ask("record", "vm", recording, wrong=409)
    asker.ask("prefetch", "vm", {"length": 8192})
    asker.ask("stop", "vm")
    asker.ask("stop", "vm", wrong=409)
    asker.ask("attach", "vm", {"path": recording["path"]}, wrong=409)  # it serves no snapshot


def snapshots(asker: Asker, place: Path) -> None:
    """Write one; see how far another one is, and end it."""
    taken = asker.ask("snapshot", "vm", {"destination": str(place / "a.snap")})
    assert taken["destination"] == str(place / "a.snap")
    slow = {"destination": str(place / "b.snap"), "rate": _SIZE / 1000}
    asked = asker.command("POST", "/v1/sessions/vm/snapshot", slow)
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as process:
        eventually(lambda: asker.curl("GET", "/v1/sessions/vm/snapshot").status, expected=200)
        assert asker.ask("snapshotting", "vm")["destination"] == slow["destination"]
        asker.ask("snapshot", "vm", slow, wrong=409)
        asker.ask("cancel", "vm")
        assert "canceled" in answer(process.communicate()[0]).body["detail"]
    for operation in ("snapshotting", "cancel"):
        asker.ask(operation, "vm", wrong=409)
    asker.ask("create", body={"name": "copy", "socket": str(place / "copy.sock"), "source": str(place / "a.snap")})
    source = aiouffd.SnapshotSource(place / "a.snap")
    Trace(4096, source.size, array("Q", [4096, 0]), fingerprint(source)).save(place / "known.trace")
    assert asker.ask("attach", "copy", {"path": str(place / "known.trace")})["snapshot"] == str(place / "a.snap")
    asker.ask("delete", "copy")


def is_refused(asker: Asker, new: dict[str, Any]) -> None:
    """Ask for what is wrong: for sessions that are not there, and with bodies that the document does not allow."""
    for operation in ("session", "complete", "stop", "delete", "snapshotting", "cancel", "drain", "evict", "prefetch"):
        asker.ask(operation, "no-such", wrong=404)
    for operation, body in (
        ("create", {**new, "readahead": "much"}),
        ("create", {**new, "colour": "red"}),
        ("prefetch", {"offset": -1}),
        ("evict", {"length": "all"}),
        ("record", {"path": 5}),
        ("record", {}),
        ("drain", {"wait": "long"}),
        ("snapshot", {"destination": None}),
    ):
        assert asker.ask(operation, "vm", body, wrong=422)["field"], operation
    asker.ask("create", body="{", wrong=400)
    asker.ask("create", body=new, wrong=409)
    asker.ask("create", body={**new, "name": "other", "source": "/no/such"}, wrong=502)
    asker.ask("delete", "vm", wrong=409)
    asker.ask("evict", "vm", wrong=409)
    problem = {"default": asker.document["paths"]["/v1/server"]["get"]["responses"]["default"], "200": {}}
    for operation, path in (("server", "/v1/server"), ("sessions", "/v1/sessions")):  # they take no argument
        asker.check(operation, {"responses": problem}, asker.curl("PATCH", path), 405)
    asker.check("nothing", {"responses": problem}, asker.curl("GET", "/v2"), 404)
    asker.refused.remove("nothing")


def events(asker: Asker) -> None:
    """Hear what has happened; a stream that never ends, of which some lines are read."""
    asker.ask("events", wrong=422, Last_Event_ID="soon")
    (described,) = asker.document["paths"]["/v1/events"].values()
    command = asker.command("GET", "/v1/events", None, "-N", "-i", "-H", "Last-Event-ID: 0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        head = [line.strip().lower() for line in iter(process.stdout.readline, "\n")]
        assert head[0].split()[1] == "200"
        assert "content-type: text/event-stream" in head
        told = [next(line for line in process.stdout if line.startswith("data: ")) for _ in range(4)]
        process.kill()
    schema = described["responses"]["200"]["content"]["text/event-stream"]["schema"]["contentSchema"]
    happened = [json.loads(line.removeprefix("data: ")) for line in told]
    assert all(asker.fits(each, schema) for each in happened)
    assert [each["number"] for each in happened] == [1, 2, 3, 4]
    asker.done.add("events")


def ends(asker: Asker) -> None:
    """Let the clients go."""
    assert asker.ask("complete", "vm")["clients"] == 0
    asker.ask("delete", "vm")
    assert asker.ask("drain", "small", {"wait": 0})["state"] == "draining"


def test_each_operation_is_as_it_is_described(image: Path, tmp_path: Path) -> None:
    """Each is done once at least, and refused once at least; each answer fits the document."""
    play(everything, str(tmp_path), str(image))
