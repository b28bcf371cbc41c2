"""`abandoned`: no process serves any more, and the client's thread lets go who waits."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from pairs import Unwatched
from scenario import eventually

from aiouffd import RegisterMode
from aiouffd.engine.mappings import Mapping
from aiouffd.pager.client.abandoned import poison_what_is_touched
from aiouffd.pager.client.waiting import Waiter
from aiouffd.testing import POISONED, FakeUffd

PAGE = 4096
BASE = 1 << 32


class Tenant:
    """Four pages of memory, by one token."""

    page_size = PAGE
    pack: Any = SimpleNamespace(record={"memory": 0}, fds=[])

    def __init__(self, token: str) -> None:
        self.token = token
        self.pack = SimpleNamespace(record={"options": {}, "memory": 0}, fds=[])
        self.uffd: Any = FakeUffd()
        self.uffd.register(BASE, 4 * PAGE, RegisterMode.MISSING)

    def shown(self, state: object) -> list[Mapping]:
        """Return what it shows."""
        assert state is None
        return [Mapping(BASE, BASE + 4 * PAGE, 0)]


def test_all_that_wait_are_let_go_and_then_that_is_said() -> None:
    """One that waits whose message was read by the dead, and one whose message nobody has read."""
    watch: Any = Unwatched()
    waiter, tenant, lost = Waiter(watch), Tenant("a"), list[bool]()
    tenant.uffd.touch(BASE, 1)
    tenant.uffd.read()
    tenant.uffd.touch(BASE + PAGE, 2)
    tenants: dict[str, Any] = {"a": tenant}
    poison_what_is_touched(tenants, None, waiter, lambda: lost.append(True))
    assert lost == [True]
    assert not tenant.uffd.asleep
    assert tenant.uffd.pages == {BASE: POISONED, BASE + PAGE: POISONED}
    waiter.close()


def test_forked_children_are_let_go_until_the_last_has_ended() -> None:
    """Also when the tenants are settled: nobody else has the children's descriptors."""
    watch: Any = Unwatched()
    waiter, tenant, child = Waiter(watch), Tenant("a"), Tenant("a/1")
    lost = threading.Event()
    arguments: Any = ({"a": tenant}, None, waiter, lost.set, [child])
    thread = threading.Thread(target=poison_what_is_touched, args=arguments)
    thread.start()
    assert lost.wait(60)
    child.uffd.touch(BASE, 1)
    eventually(lambda: child.uffd.pages, {BASE: POISONED})
    tenant.uffd.touch(BASE, 2)
    child.uffd.exit()
    thread.join(60)
    assert not thread.is_alive()
    assert not tenant.uffd.pages
    waiter.close()


def test_it_goes_on_until_it_is_stopped() -> None:
    """A tenant that has left is left alone; who touches later is let go as well."""
    watch: Any = Unwatched()
    waiter = Waiter(watch)
    tenants: Any = {"a": Tenant("a"), "b": Tenant("b")}
    left, stays = tenants["a"], tenants["b"]
    thread = threading.Thread(target=poison_what_is_touched, args=(tenants, None, waiter, None))
    thread.start()
    stays.uffd.touch(BASE, 1)
    eventually(lambda: stays.uffd.pages, {BASE: POISONED})
    del tenants["a"]
    stays.uffd.touch(BASE + PAGE, 2)
    eventually(lambda: len(stays.uffd.pages), 2)
    stays.uffd.touch(BASE + 2 * PAGE, 3)
    eventually(lambda: len(stays.uffd.pages), 3)
    left.uffd.touch(BASE, 4)
    waiter.stop()
    thread.join()
    assert not left.uffd.pages
    waiter.close()
