"""A fork() waits, with the GIL released, until a pager reads what the kernel tells of it.

A fork() of a process with a userfaultfd that has Feature.EVENT_FORK waits in the kernel until somebody has read its
event. os.fork holds the GIL meanwhile. If keeper and worker are dead at that moment, nobody can start others.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from aiouffd.errors import UffdError
from aiouffd.kernel.abi import Feature

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.pager.client.client import PagerClient
    from aiouffd.pager.client.tenant import Tenant

__all__ = ["await_readers"]

_LONGEST: Final = 60.0
"""Seconds until a fork is made all the same: as many as a pager may take to start."""

_PATIENCE: Final = 1.0
"""Seconds until a pager that lives is waited for no longer. Whoever hears its answer may need a lock of this thread."""


def await_readers(clients: Iterable[PagerClient]) -> None:
    """Wait until each pager with memory whose forks are told has answered: a process that was killed does not.

    Where this thread can get no answer, it does not wait: finalizers and signal handlers, which may fork, run anywhere.
    Where the pager was given up, the memory is settled: nobody answers for its keeper, which may die at any moment.
    """
    until = time.monotonic() + _LONGEST
    for client in clients:
        if not client.may_wait or not any(map(_tells, client.tenants)):
            continue
        try:
            _await_answer(client, until)
        except UffdError:
            client.lose()


def _await_answer(client: PagerClient, until: float) -> None:
    answer = client.ping()
    while (left := until - time.monotonic()) > 0:
        try:
            answer.result(min(left, _PATIENCE))
        except TimeoutError:
            if not client.lives():
                continue
        return


def _tells(tenant: Tenant) -> bool:
    return Feature.EVENT_FORK in tenant.uffd.features
