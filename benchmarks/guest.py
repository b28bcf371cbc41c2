"""A guest of KVM as the toucher: the microVM of the examples, over memory that comes in different ways."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from typing import TYPE_CHECKING

import aiouffd
from benchmarks.contestants import PAGE, Arena, content, warm
from examples.microvm import MicroVM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KVM_GET_STATS_FD = 0xAECE


def unavailable() -> str | None:
    """Return why there can be no guest here, or None."""
    return None if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm is missing, or not for this user"


@contextlib.contextmanager
def present(size: int) -> Iterator[Arena]:
    """Memory that is there already, and that nobody serves."""
    region = aiouffd.Region(size)
    region[:] = content(size).map or b""
    yield Arena(region.address, os.getpid())


def summing(serve: Callable[[int], contextlib.AbstractContextManager[Arena]], size: int) -> Callable[[], float]:
    """Return a contestant: microseconds a page, a new guest that adds up a byte of each page in order."""
    expected = sum((page + 1) & 255 for page in range(size // PAGE))

    def once() -> float:
        warm(size)
        with serve(size) as arena, MicroVM((arena.address, size)) as vm:
            began = time.perf_counter()
            checksum = vm.run()
            seconds = time.perf_counter() - began
        if checksum != expected:
            raise AssertionError(f"the guest's sum is {checksum}, not {expected}")
        return seconds / (size // PAGE) * 1e6

    return once


def interpreted(size: int) -> str | None:
    """Return a remark where KVM has no hardware to run the guest on, and interprets its instructions one by one."""
    with present(size) as arena, MicroVM((arena.address, size)) as vm:
        vm.run()
        count = statistic(vm.vcpu, "insn_emulation")
    pages = size // PAGE
    if count is None or count < pages:
        return None
    return (
        f"KVM has interpreted {count} instructions of this guest, {count / pages:.1f} a page: present memory is slower"
        " here than where the processor runs the guest, and the ratio to it flatters"
    )


def statistic(fd: int, name: str) -> int | None:
    """Return a counter of a VM or processor of KVM (KVM_GET_STATS_FD, Linux 5.14), None where there is no such one."""
    try:
        stats = fcntl.ioctl(fd, KVM_GET_STATS_FD, 0)
    except OSError:
        return None
    try:
        # struct kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset
        _, name_size, count, _, descriptors, data = struct.unpack("6I", os.pread(stats, 24, 0))
        length = 16 + name_size
        for at in range(descriptors, descriptors + count * length, length):
            # struct kvm_stats_desc: flags, exponent, size, offset, bucket_size, name
            *_, offset, _, found = struct.unpack(f"IhHII{name_size}s", os.pread(stats, length, at))
            if found.rstrip(b"\0") == name.encode():
                (value,) = struct.unpack("Q", os.pread(stats, 8, data + offset))
                return int(value)
        return None
    finally:
        os.close(stats)
