"""A page that cannot be had, where the kernel has no UFFDIO_POISON (before Linux 6.6), in memory of this process."""

from __future__ import annotations

import errno

from aiouffd.errors import OperationError
from aiouffd.kernel import abi, libc
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.userfaultfd import Userfaultfd

__all__ = ["ProtectingUserfaultfd"]


class ProtectingUserfaultfd(Userfaultfd):
    """Makes a page inaccessible in place of poisoning it: a touch is SIGSEGV, and no thread waits for ever."""

    def try_poison(self, start: int, length: int, mode: int) -> int:
        """As UFFDIO_POISON."""
        with Pagemap.open_if_possible() as pagemap:
            if not pagemap.missing(start, length):
                return -errno.EEXIST
        try:
            libc.mprotect(start, length, libc.PROT_NONE)
            if not mode & abi.POISON_MODE_DONTWAKE:
                import logging  # noqa: PLC0415 - as `registration`

                logging.getLogger("aiouffd").critical(
                    "the page at %#x cannot be had, and this kernel has no UFFDIO_POISON (Linux 6.6): it is made"
                    " inaccessible, and a touch is SIGSEGV",
                    start,
                )
                self.unregister(start, length)
                self.try_wake(start, length)  # UNREGISTER can leave a thread asleep that has just faulted again
        except (OSError, OperationError) as error:  # ENOMEM: too many mappings
            return -(error.errno or errno.EINVAL)
        return length
