"""What the client's thread does when no process of ours serves any more: SIGBUS for whoever waits or touches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiouffd.pager.process.last_resort import Forsaken, LastResort, on_error_of
from aiouffd.pager.process.serialization import words_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiouffd.pager.client.tenant import Tenant
    from aiouffd.pager.client.waiting import Waiter
    from aiouffd.pager.process.state import State

__all__ = ["poison_what_is_touched"]

_CALM = 50  # milliseconds without a fault, until all that waited are taken to have been let go


def poison_what_is_touched(
    tenants: dict[str, Tenant],
    state: State | None,
    waiter: Waiter,
    on_lost: Callable[[], None] | None,
    children: Sequence[Tenant] = (),
) -> None:
    """Let all go that wait for a page, and all that touch a missing one, with SIGBUS: no hang, no zeros.

    Args:
        tenants: by token; one that is removed from it is left alone from then on.
        state: says what they show now.
        waiter: ends this when it is stopped.
        on_lost: called once all that waited have been let go; the tenants are left alone then. None: this goes on.
        children: that were forked from the tenants: nobody else has their descriptors.
    """
    resort = LastResort(
        Forsaken(
            tenant.uffd,
            tenant.page_size,
            [(mapping.start, mapping.end) for mapping in tenant.shown(state)],
            tenant.token,
            is_child=tenant in children,
            words=words_of(tenant.pack.record, tenant.pack.fds),
            on_error=on_error_of(tenant.pack.record),
        )
        for tenant in (*tenants.values(), *children)
        if tenant.uffd.intact
    )
    settled = False
    while not waiter.stopped and not (settled and not resort.spaces):
        ready = resort.wait(1 if resort.pending else _CALM, *(() if waiter.lost else (waiter,)))
        if waiter.fileno() in ready:
            waiter.drain()
        if not resort.attend() and not ready and on_lost is not None and not settled:
            on_lost()
            settled = True
        for token in {space.token for space in resort.spaces.values()} - (set() if settled else tenants.keys()):
            resort.forget(token)
        if settled:
            resort.look()
    resort.close()
