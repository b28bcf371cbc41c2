"""Numbers and structs of `<linux/userfaultfd.h>` and of PAGEMAP_SCAN in `<linux/fs.h>`.

A test compiles a C probe and checks each of them against the headers. They hold for 64-bit x86, arm64, riscv and
loongarch. Other architectures have other numbers: of system calls, or of ioctls (powerpc, mips and sparc encode the
direction and the size of an argument differently). There this module raises ImportError.
"""

from __future__ import annotations

import enum
import os
import struct
import sys
from typing import Final

__all__ = ["FaultFlag", "Feature", "Ioctl", "RegisterMode"]

UFFD_API: Final = 0xAA

UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_UNREGISTER: Final = 0x8010AA01
UFFDIO_WAKE: Final = 0x8010AA02
UFFDIO_COPY: Final = 0xC028AA03
UFFDIO_ZEROPAGE: Final = 0xC020AA04
UFFDIO_MOVE: Final = 0xC028AA05
UFFDIO_WRITEPROTECT: Final = 0xC018AA06
UFFDIO_CONTINUE: Final = 0xC020AA07
UFFDIO_POISON: Final = 0xC020AA08
UFFDIO_RWPROTECT: Final = 0xC018AA09
UFFDIO_SET_MODE: Final = 0x4010AA0A
USERFAULTFD_IOC_NEW: Final = 0xAA00
PAGEMAP_SCAN: Final = 0xC0606610


def system_calls(machine: str, *, pointer_bits: int) -> tuple[int, int, int]:
    """Return the numbers of userfaultfd(2), mlock2(2) and sched_setattr(2) on an architecture, as uname(2) names it.

    Raises:
        ImportError: this package does not know its numbers.
    """
    generic = (282, 284, 274)
    numbers = {"x86_64": (323, 325, 314), "aarch64": generic, "riscv64": generic, "loongarch64": generic}
    if machine not in numbers or pointer_bits != 64:
        raise ImportError(
            f"aiouffd does not know the system calls and ioctls of {machine} in a {pointer_bits}-bit process;"
            f" it runs in 64-bit processes on {', '.join(numbers)}"
        )
    return numbers[machine]


SYS_USERFAULTFD, SYS_MLOCK2, SYS_SCHED_SETATTR = system_calls(
    os.uname().machine, pointer_bits=64 if sys.maxsize > 2**32 else 32
)
SYS_OPENAT2: Final = 437  # as all that are newer than Linux 5.1, on each architecture

UFFD_USER_MODE_ONLY: Final = 1

COPY_MODE_DONTWAKE: Final = 1
COPY_MODE_WP: Final = 2
ZEROPAGE_MODE_DONTWAKE: Final = 1
CONTINUE_MODE_DONTWAKE: Final = 1
CONTINUE_MODE_WP: Final = 2
POISON_MODE_DONTWAKE: Final = 1
WRITEPROTECT_MODE_WP: Final = 1
WRITEPROTECT_MODE_DONTWAKE: Final = 2
MOVE_MODE_DONTWAKE: Final = 1
MOVE_MODE_ALLOW_SRC_HOLES: Final = 2
RWPROTECT_MODE_RWP: Final = 1
RWPROTECT_MODE_DONTWAKE: Final = 2

EVENT_PAGEFAULT: Final = 0x12
EVENT_FORK: Final = 0x13
EVENT_REMAP: Final = 0x14
EVENT_REMOVE: Final = 0x15
EVENT_UNMAP: Final = 0x16

API_STRUCT: Final = struct.Struct("=QQQ")  # api, features, ioctls
REGISTER_STRUCT: Final = struct.Struct("=QQQQ")  # start, len, mode, ioctls
RANGE_STRUCT: Final = struct.Struct("=QQ")  # start, len
COPY_STRUCT: Final = struct.Struct("=QQQQq")  # dst, src, len, mode, result; MOVE alike
ZEROPAGE_STRUCT: Final = struct.Struct("=QQQq")  # start, len, mode, result; CONTINUE and POISON alike
WRITEPROTECT_STRUCT: Final = struct.Struct("=QQQ")  # start, len, mode; RWPROTECT alike
SET_MODE_STRUCT: Final = struct.Struct("=QQ")  # enable, disable
RESULT: Final = struct.Struct("=q")

_PASSED_ITSELF = 1025 if sys.version_info >= (3, 14) else 0
"""From 1,025 bytes on, `fcntl.ioctl` gives the kernel the buffer of the caller; a smaller one it copies. Since Python
3.14 it does not copy it back if the call fails: the result of a partial COPY would be lost. Before, it keeps the GIL
while the kernel works on a buffer that it has not copied."""


def padded(layout: struct.Struct, size: int = _PASSED_ITSELF) -> struct.Struct:
    """Return a struct that ends with as many bytes more as make it so large."""
    return struct.Struct(f"{layout.format}{max(0, size - layout.size)}x")


COPY_ARGUMENT: Final = padded(COPY_STRUCT)
ZEROPAGE_ARGUMENT: Final = padded(ZEROPAGE_STRUCT)

MESSAGE_SIZE: Final = 32
PAGEFAULT_MESSAGE: Final = struct.Struct("=B7xQQI4x")  # event, flags, address, thread id
FORK_MESSAGE: Final = struct.Struct("=8xI20x")  # descriptor
REMAP_MESSAGE: Final = struct.Struct("=8xQQQ")  # from, to, len
RANGE_MESSAGE: Final = struct.Struct("=8xQQ8x")  # start, end; REMOVE and UNMAP

PM_SCAN_ARG: Final = struct.Struct("=12Q")
PAGE_REGION: Final = struct.Struct("=QQQ")  # start, end, categories
PM_SCAN_WP_MATCHING: Final = 1
PM_SCAN_CHECK_WPASYNC: Final = 2
PAGE_IS_WPALLOWED: Final = 1
PAGE_IS_WRITTEN: Final = 2
PAGE_IS_FILE: Final = 4
PAGE_IS_PRESENT: Final = 8
PAGE_IS_SWAPPED: Final = 16
PAGE_IS_PFNZERO: Final = 32
PAGE_IS_HUGE: Final = 64
PAGE_IS_SOFT_DIRTY: Final = 128
PAGE_IS_GUARD: Final = 256
PAGE_IS_ACCESSED: Final = 512


class Feature(enum.IntFlag, boundary=enum.KEEP):
    """UFFD_FEATURE_*: what a descriptor can be asked for in the handshake. Unknown bits are kept."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16
    RWP = 1 << 17
    RWP_ASYNC = 1 << 18


FEATURE_SINCE: Final[dict[Feature, str]] = {
    Feature.PAGEFAULT_FLAG_WP: "5.7",
    Feature.EVENT_FORK: "4.11",
    Feature.EVENT_REMAP: "4.11",
    Feature.EVENT_REMOVE: "4.11",
    Feature.MISSING_HUGETLBFS: "4.11",
    Feature.MISSING_SHMEM: "4.11",
    Feature.EVENT_UNMAP: "4.11",
    Feature.SIGBUS: "4.14",
    Feature.THREAD_ID: "4.14",
    Feature.MINOR_HUGETLBFS: "5.13",
    Feature.MINOR_SHMEM: "5.14",
    Feature.EXACT_ADDRESS: "5.18",
    Feature.WP_HUGETLBFS_SHMEM: "5.19",
    Feature.WP_UNPOPULATED: "6.4",
    Feature.POISON: "6.6",
    Feature.WP_ASYNC: "6.7",
    Feature.MOVE: "6.8",
    Feature.RWP: "7.3",
    Feature.RWP_ASYNC: "7.3",
}
"""The Linux release that brought each feature."""

FEATURE_NEEDS: Final[dict[Feature, Feature]] = {Feature.RWP_ASYNC: Feature.RWP}
"""Features that the kernel refuses (EINVAL) without another."""

LAYOUT_EVENTS: Final = Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP


class Ioctl(enum.IntFlag, boundary=enum.KEEP):
    """Which operations a descriptor or a registered range allows (bit n: ioctl number n). Unknown bits are kept."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    RWPROTECT = 1 << 0x09
    SET_MODE = 1 << 0x0A
    API = 1 << 0x3F


class RegisterMode(enum.IntFlag, boundary=enum.KEEP):
    """UFFDIO_REGISTER_MODE_*: which faults of a range are reported."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


class FaultFlag(enum.IntFlag, boundary=enum.KEEP):
    """UFFD_PAGEFAULT_FLAG_*: what kind of access faulted."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3
