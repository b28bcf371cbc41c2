"""`loops`: uvloop runs the loops where it is installed, and asyncio elsewhere."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
import uvloop

from aiouffd import loops


@pytest.mark.parametrize(("module", "kind"), [(uvloop, "uvloop"), (None, "asyncio")])
def test_which_loop(module: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is uvloop's, or asyncio's where uvloop is missing; it runs."""
    monkeypatch.setattr(loops, "_uvloop", module)
    assert loops.kind() == kind
    with asyncio.Runner(loop_factory=loops.new_event_loop) as runner:
        assert type(runner.get_loop()).__module__.startswith("uvloop") == (kind == "uvloop")
        runner.run(asyncio.sleep(0))


def test_everything_is_imported_without_uvloop() -> None:
    """Free-threaded Pythons have no wheel of it."""
    code = """
import sys
sys.modules["uvloop"] = None
from aiouffd import loops
from aiouffd.pager.process import worker
print(loops.kind())
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "asyncio\n"


FEW_DESCRIPTORS = """
import asyncio, os, resource
from aiouffd.loops import new_event_loop
new_event_loop().close()  # libuv keeps a pipe
free, most = os.eventfd(0), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
os.close(free)
refused = []
for spare in range(16):
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, most))
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(asyncio.sleep(0))
    except OSError:
        refused.append(spare)
assert refused == [*range(len(refused))]
print(len(refused))
"""


def test_a_loop_that_finds_no_room_for_its_descriptors() -> None:
    """An error, whatever their number: libuv would end the process."""
    result = subprocess.run([sys.executable, "-c", FEW_DESCRIPTORS], check=True, capture_output=True, text=True)
    assert 9 <= int(result.stdout) < 16
    assert result.stderr == ""


@pytest.mark.parametrize("failing", ["nothing", "main", "another task"])
@pytest.mark.parametrize("module", [uvloop, None])
def test_run_leaves_nothing_behind(module: Any, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks and async generators are ended, main has ended, and the loop is closed, whatever was raised."""
    monkeypatch.setattr(loops, "_uvloop", module)
    loop = loops.new_event_loop()
    ended: list[str] = []

    async def numbers() -> Any:
        try:
            yield 1
        finally:
            ended.append("generator")

    async def other() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("task")

    async def fail() -> None:
        raise SystemExit  # it stops a loop, whoever raises it

    generator = numbers()
    tasks = []

    async def main() -> None:
        tasks.append(loop.create_task(other()))
        await anext(generator)
        await loop.run_in_executor(None, int)
        try:
            if failing == "another task":
                tasks.append(loop.create_task(fail()))
                await asyncio.sleep(3600)
            if failing == "main":
                raise SystemExit
        finally:
            ended.append("main")

    if failing == "nothing":
        loops.run(loop, main())
    else:
        with pytest.raises(SystemExit):
            loops.run(loop, main())
    assert sorted(ended) == ["generator", "main", "task"]
    assert loop.is_closed()
    # What is not retrieved is logged with the collection of garbage, in another test.
    assert [type(task.exception()) for task in tasks if not task.cancelled()] == [SystemExit] * (len(tasks) - 1)
