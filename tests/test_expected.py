"""`pager.process.answers`: what is made ready before it is asked for. The kernel tests ask all else."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiouffd.pager.process import answers as module
from aiouffd.pager.process.answers import Answers
from aiouffd.pager.process.serialization import Pickles
from aiouffd.pager.process.tenancy import Arrivals

if TYPE_CHECKING:
    import pytest


async def test_what_a_replay_needs_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread, which lets the loop have its turn soon."""
    imported: list[str] = []
    monkeypatch.setattr(module, "import_module", imported.append)
    served: Any = SimpleNamespace(arrivals=Arrivals())
    nothing: Any = None
    usual = sys.getswitchinterval()
    try:
        await Answers(served, nothing, Pickles.NEVER).answer({"op": "expect"}, [])
        assert sys.getswitchinterval() < usual
    finally:
        sys.setswitchinterval(usual)
    assert {"aiouffd.engine.ahead.trace", "aiouffd.sources.object_store"} <= set(imported)
