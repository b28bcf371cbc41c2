"""The descriptor: opened in the way that this user may, and one method for each ioctl.

There are two levels. The public methods (`copy`, `zeropage`, ...) return the bytes done, and raise a typed error if
nothing was done. The `try_*` methods below them return an int, bytes done or a negated errno, and raise nothing: the
engine needs no exception on its hot path.

Some facts about these ioctls:

- The kernel writes the result field only sometimes: validation failures and ESRCH leave it. So each call sets it to
  0, and reads it only if the ioctl fails.
- EAGAIN has two meanings. A positive result is a partial copy: go on behind it. Otherwise the layout of the target
  is changing: read the pending events, then retry.
- `fcntl.ioctl` with a bytearray releases the GIL and returns the kernel's answer in it. Since Python 3.14 it does so
  for a call that fails only if the bytearray has more than 1,024 bytes (`abi.padded`). Each call has a bytearray
  of its own, so that several threads (and a signal handler) may use one descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, Self

import attrs

from aiouffd import native
from aiouffd.errors import AccessError, ClosedError, UnsupportedError, operation_error
from aiouffd.kernel import abi, libc
from aiouffd.kernel.abi import FaultFlag, Feature, Ioctl, RegisterMode
from aiouffd.kernel.events import MESSAGES, PageFault, Remap, Remove, UnknownEvent, Unmap
from aiouffd.kernel.limits import limit_error
from aiouffd.kernel.memory import address_of, unreadable
from aiouffd.kernel.owned_descriptor import OwnedDescriptor

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable
    from typing import Any

__all__ = ["Capabilities", "Copied", "Event", "Fork", "Userfaultfd", "copy_missing", "decode", "is_registered", "probe"]

_ioctl = fcntl.ioctl
_pack_copy = abi.COPY_ARGUMENT.pack
_pack_zeropage = abi.ZEROPAGE_ARGUMENT.pack
_pack_range = abi.RANGE_STRUCT.pack
_unpack_result = abi.RESULT.unpack_from

REMEDY = (
    "Without a privilege, Monitor(engine=InThread()) works, and user_mode_only=True, where a system call on a missing"
    " page fails with EFAULT. Full use needs one of: `sysctl vm.unprivileged_userfaultfd=1`; read access to"
    " /dev/userfaultfd (Linux 6.1); CAP_SYS_PTRACE. In a container the seccomp profile must allow userfaultfd(2), too."
)
NO_FEATURES = Feature(0)


@attrs.frozen
class Capabilities:
    """What this kernel has, and how this user may use it.

    Attributes:
        features: all feature bits of the kernel, unknown ones included.
        ioctls: the operations that a descriptor allows before any range is registered.
        opened_by: "syscall", "device" (/dev/userfaultfd) or "user-mode-only".
    """

    features: Feature
    ioctls: Ioctl
    opened_by: str


def _open_by_device(flags: int) -> int:
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def _open(*, user_mode_only: bool, by: str | None = None) -> tuple[int, str]:
    """Open a descriptor, non-blocking and close-on-exec: poll(2) reports EPOLLERR on a blocking one."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    ways = [by] if by else ["user-mode-only"] if user_mode_only else ["syscall", "device"]
    refusals: list[OSError] = []
    for way in ways:
        try:
            if way == "device":
                return _open_by_device(flags), way
            mode = abi.UFFD_USER_MODE_ONLY if way == "user-mode-only" else 0
            return libc.syscall(abi.SYS_USERFAULTFD, flags | mode), way
        except OSError as error:
            refusals.append(error)
    raise _refusal(refusals, user_mode_only=user_mode_only) from refusals[0]


def _refusal(refusals: list[OSError], *, user_mode_only: bool) -> Exception:
    """Return the error for what the kernel answered to each way of opening a descriptor."""
    numbers = [error.errno for error in refusals]
    if any(number in (errno.EPERM, errno.EACCES) for number in numbers):
        return AccessError("opening a userfaultfd", REMEDY)
    # ENOENT, ENODEV: there is no /dev/userfaultfd, as before Linux 6.1 and in most containers.
    if all(number in (errno.ENOSYS, errno.ENOENT, errno.ENODEV, errno.ENXIO) for number in numbers):
        if errno.ENOSYS in numbers:
            return UnsupportedError("userfaultfd(2)", "no CONFIG_USERFAULTFD, or a seccomp filter that hides it")
        return UnsupportedError("/dev/userfaultfd (Linux 6.1)", "the system call userfaultfd(2), perhaps")
    if numbers[0] == errno.EINVAL and user_mode_only:
        return UnsupportedError("UFFD_USER_MODE_ONLY (Linux 5.11)", "full userfaultfd only")
    return limit_error("opening a userfaultfd", numbers[0] or 0) or refusals[0]


def _handshake(fd: int, features: int) -> tuple[Feature, Ioctl]:
    argument = bytearray(abi.API_STRUCT.pack(abi.UFFD_API, features, 0))
    fcntl.ioctl(fd, abi.UFFDIO_API, argument)
    _, available, ioctls = abi.API_STRUCT.unpack(argument)
    return Feature(available), Ioctl(ioctls)


def probe() -> Capabilities:
    """Ask the kernel what it has, on a descriptor that is closed again: each can do the handshake only once.

    Raises:
        UnsupportedError: the kernel has no userfaultfd.
        AccessError: this user may not open one, not even in user mode only.
    """
    try:
        fd, way = _open(user_mode_only=False)
    except AccessError:
        fd, way = _open(user_mode_only=True)
    try:
        features, ioctls = _handshake(fd, 0)
    finally:
        os.close(fd)
    return Capabilities(features, ioctls, way)


@cache
def kernel_features() -> Feature:
    """Return the features of the kernel, as `probe` does, which is asked once. Raises as `probe`."""
    return probe().features


class Userfaultfd(OwnedDescriptor):
    """A userfaultfd(2) descriptor after its handshake. A context manager that closes it.

    Addresses are those of the process that opened it (of the forked child, for one that a fork event brought),
    whichever process calls. `start` and `len` are in bytes, and multiples of the page size of the mapping.

    A debugger, /proc/PID/mem and ptrace get EIO for a missing page, and a core dump leaves it out: they do not wait.
    process_vm_readv(2) is served like a touch. Writes by a device (DMA) into pinned memory fault on no protection.

    Args:
        features: what to enable; a bit that the kernel lacks is an `UnsupportedError`. Feature.RWP_ASYNC brings
            Feature.RWP with it, without which the kernel refuses it.
        user_mode_only: allowed to every user since Linux 5.11, but faults raised inside the kernel (read(2) into
            the memory, KVM) are not served: the system call fails with EFAULT.
        opened_by: "syscall" or "device" to insist on one way; by default the first that is allowed.

    Raises:
        UnsupportedError: the kernel lacks userfaultfd, or a feature; the error names what it lacks and what it has.
        AccessError: not permitted; the error names the sysctl, the device and the capability.
        LimitError: too many open files.
    """

    def __init__(
        self, features: Feature = NO_FEATURES, *, user_mode_only: bool = False, opened_by: str | None = None
    ) -> None:
        self.opened_by: str
        fd, self.opened_by = _open(user_mode_only=user_mode_only, by=opened_by)
        super().__init__(fd)
        for feature, needed in abi.FEATURE_NEEDS.items():
            if feature & features:
                features |= needed
        try:
            _, self._ioctls = _handshake(fd, features)
        except OSError as error:
            self.close()
            if error.errno == errno.EPERM:
                raise AccessError(
                    "Feature.EVENT_FORK",
                    "It needs CAP_SYS_PTRACE: run as root, or grant it with `setcap cap_sys_ptrace+ep`.",
                ) from error
            if error.errno != errno.EINVAL:
                raise
            available = kernel_features()
            missing = Feature(int(features) & ~int(available))  # on ints: Flag's own ~ forgets unknown bits
            if not missing:  # the kernel has each of them, and refuses them together
                raise operation_error("UFFDIO_API", 0, 0, errno.EINVAL) from error
            raise UnsupportedError(repr(missing), repr(available)) from error
        implied = Feature.WP_UNPOPULATED if features & Feature.WP_ASYNC else Feature(0)
        self._features = Feature(features) | implied

    @classmethod
    def from_fd(cls, fd: int, features: Feature = NO_FEATURES) -> Self:
        """Adopt a descriptor after its handshake; it belongs to the new object.

        The kernel does not tell which features are enabled on it: `features` says what the caller knows.
        """
        self = cls.__new__(cls)
        self._own(fd)
        self._features = Feature(features)
        self._ioctls = Ioctl.API | Ioctl.REGISTER | Ioctl.UNREGISTER
        self.opened_by = "adopted"
        return self

    @property
    def features(self) -> Feature:
        """The features that are enabled on this descriptor; `probe()` tells which exist."""
        return self._features

    @property
    def ioctls(self) -> Ioctl:
        """The operations allowed before a range is registered; `register` returns those of a range."""
        return self._ioctls

    def fileno(self) -> int:
        """Return the descriptor; it stays this object's."""
        if self._fd < 0:
            raise ClosedError("this Userfaultfd is closed")
        return self._fd

    def close(self) -> None:
        """Close the descriptor. When the last duplicate closes, blocked threads go on and read **zeros**."""
        super().close()

    def detach(self) -> int:
        """Return the descriptor, which is the caller's now; this object is closed."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def __repr__(self) -> str:
        return f"<Userfaultfd {'closed' if self._fd < 0 else f'fd={self._fd}'} {self._features!r}>"

    # Ranges

    def register(self, start: int, len: int, mode: RegisterMode) -> Ioctl:  # noqa: A002 - the kernel's word
        """UFFDIO_REGISTER (Linux 4.3): report the faults of a range; return the operations that are allowed on it.

        Raises:
            BusyError: registered with another userfaultfd.
            OperationError: EINVAL: not mapped, not aligned, not a supported kind or mode.
        """
        argument = bytearray(abi.REGISTER_STRUCT.pack(start, len, mode, 0))
        self._call("UFFDIO_REGISTER", abi.UFFDIO_REGISTER, argument, start, len)
        return Ioctl(abi.REGISTER_STRUCT.unpack(argument)[3])

    def unregister(self, start: int, len: int) -> None:  # noqa: A002
        """UFFDIO_UNREGISTER (Linux 4.3): report no more faults of a range, and wake its sleepers.

        The kernel fills a missing page with zeros (or from the file) when it is touched next.
        """
        self._call("UFFDIO_UNREGISTER", abi.UFFDIO_UNREGISTER, bytearray(_pack_range(start, len)), start, len)
        # The kernel wakes the sleepers before it takes the locks of the mappings (Linux 6.18). A quick thread faults
        # again while they are still registered, and would sleep for ever. From here on none can.
        self.wake(start, len)

    # Resolving

    def copy(self, dst: int, src: Any, *, wake: bool = True, write_protect: bool = False) -> int:
        """UFFDIO_COPY (Linux 4.3): copy the bytes of the buffer `src` to missing pages at `dst`, each page atomically.

        Args:
            dst: page-aligned address in a registered range; the whole copy lies within one mapping.
            src: any contiguous buffer of a multiple of the page size; it is not kept.
            wake: wake the sleepers of these pages.
            write_protect: the new pages are write-protected from the start (Linux 5.7, registered with WP).

        Returns:
            Bytes done. Fewer than asked are a partial copy, and the caller goes on behind it.

        Raises:
            OperationError: nothing was done: a LayoutChangingError, PagePresentError, RangeGoneError,
                TargetExitedError, or another errno.
        """
        length = memoryview(src).nbytes
        mode = (0 if wake else abi.COPY_MODE_DONTWAKE) | (abi.COPY_MODE_WP if write_protect else 0)
        return self._done("UFFDIO_COPY", dst, length, self.try_copy(dst, address_of(src), length, mode))

    def zeropage(self, start: int, len: int, *, wake: bool = True) -> int:  # noqa: A002
        """UFFDIO_ZEROPAGE (Linux 4.3): map the zero page over a range. Not for hugetlb; otherwise as `copy`."""
        return self._done("UFFDIO_ZEROPAGE", start, len, self.try_zeropage(start, len, 0 if wake else 1))

    def wake(self, start: int, len: int) -> None:  # noqa: A002
        """UFFDIO_WAKE (Linux 4.3): wake the sleepers of a range.

        A thread whose page is still missing faults again, which queues a new message.
        """
        self._call("UFFDIO_WAKE", abi.UFFDIO_WAKE, bytearray(_pack_range(start, len)), start, len)

    def writeprotect(self, start: int, len: int, *, protect: bool, wake: bool = True) -> None:  # noqa: A002
        """UFFDIO_WRITEPROTECT (Linux 5.7): protect a range against writing, or lift that and wake the writers.

        `wake` matters only where the protection is lifted: protecting wakes nobody.
        """
        self._protect("UFFDIO_WRITEPROTECT", abi.UFFDIO_WRITEPROTECT, start, len, protect=protect, wake=wake)

    def rwprotect(self, start: int, len: int, *, protect: bool, wake: bool = True) -> None:  # noqa: A002
        """UFFDIO_RWPROTECT (Linux 7.3): protect a range against any access, or lift that and wake the threads.

        For a range that is registered with RegisterMode.RWP. With Feature.RWP_ASYNC the kernel itself lifts the
        protection of a page at its first access, and PAGEMAP_SCAN tells which pages were accessed (PAGE_IS_ACCESSED).
        """
        self._protect("UFFDIO_RWPROTECT", abi.UFFDIO_RWPROTECT, start, len, protect=protect, wake=wake)

    def set_mode(self, *, enable: Feature = NO_FEATURES, disable: Feature = NO_FEATURES) -> None:
        """UFFDIO_SET_MODE (Linux 7.3): switch Feature.RWP_ASYNC on or off after the handshake.

        Raises:
            OperationError: EINVAL: another feature, or the same one in both.
        """
        argument = bytearray(abi.SET_MODE_STRUCT.pack(enable, disable))
        self._call("UFFDIO_SET_MODE", abi.UFFDIO_SET_MODE, argument, 0, 0)
        self._features = Feature((int(self._features) | int(enable)) & ~int(disable))

    def _protect(self, operation: str, request: int, start: int, length: int, *, protect: bool, wake: bool) -> None:
        # The modes of RWPROTECT are those of WRITEPROTECT.
        mode = abi.WRITEPROTECT_MODE_WP if protect else 0 if wake else abi.WRITEPROTECT_MODE_DONTWAKE
        self._call(operation, request, bytearray(abi.WRITEPROTECT_STRUCT.pack(start, length, mode)), start, length)

    def continue_(self, start: int, len: int, *, wake: bool = True, write_protect: bool = False) -> int:  # noqa: A002
        """UFFDIO_CONTINUE (Linux 5.13 hugetlb, 5.14 shmem): map the pages that the file already has."""
        mode = (0 if wake else abi.CONTINUE_MODE_DONTWAKE) | (abi.CONTINUE_MODE_WP if write_protect else 0)
        return self._done("UFFDIO_CONTINUE", start, len, self.try_continue(start, len, mode))

    def poison(self, start: int, len: int, *, wake: bool = True) -> int:  # noqa: A002
        """UFFDIO_POISON (Linux 6.6): make a touch of these missing pages SIGBUS (a system call: EFAULT)."""
        return self._done("UFFDIO_POISON", start, len, self.try_poison(start, len, 0 if wake else 1))

    def move(self, dst: int, src: int, len: int, *, wake: bool = True, allow_src_holes: bool = False) -> int:  # noqa: A002
        """UFFDIO_MOVE (Linux 6.8): move anonymous pages of the same process from `src` to `dst`, without a copy.

        Raises:
            BusyError: a page is shared with a forked child, or pinned.
            RangeGoneError: a hole in the source, unless `allow_src_holes`.
        """
        mode = (0 if wake else abi.MOVE_MODE_DONTWAKE) | (abi.MOVE_MODE_ALLOW_SRC_HOLES if allow_src_holes else 0)
        return self._done("UFFDIO_MOVE", dst, len, self.try_move(dst, src, len, mode))

    # The same for the engine: bytes done, or a negated errno if nothing was done.

    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int:
        """UFFDIO_COPY from the address `src` of the calling process."""
        argument = bytearray(_pack_copy(dst, src, length, mode, 0))
        try:
            _ioctl(self._fd, 0xC028AA03, argument)
        except OSError as error:
            return _partial(argument, 32, error)
        return length

    def try_move(self, dst: int, src: int, length: int, mode: int) -> int:
        """UFFDIO_MOVE."""
        return self._attempt(abi.UFFDIO_MOVE, bytearray(_pack_copy(dst, src, length, mode, 0)), length, 32)

    def try_copies(self, copies: array[int], mode: int) -> int:
        """Several UFFDIO_COPY that wake nobody; return how many were done, before the first that was not or not all.

        Args:
            copies: target, source and length of each.
            mode: of all of them.
        """
        if native.reason():
            each = zip(copies[::3], copies[1::3], copies[2::3], strict=True)
            done = (self.try_copy(*copy, mode | abi.COPY_MODE_DONTWAKE) == copy[2] for copy in each)
            return sum(itertools.takewhile(bool, done))
        address, _ = copies.buffer_info()
        return int(native.library().aiouffd_copies(self._fd, ctypes.c_void_p(address), len(copies) // 3, mode))

    def try_copy_missing(self, dst: int, src: int, length: int, mode: int, page: int) -> Copied:
        """UFFDIO_COPY of what is missing of a range, past pages that are there, for which the kernel wakes nobody.

        Args:
            dst: where to.
            src: where from.
            length: bytes, whole pages.
            mode: of each COPY.
            page: bytes of a page.
        """
        if native.reason() or type(self).try_copy is not Userfaultfd.try_copy:
            return copy_missing(self.try_copy, dst, src, length, mode, page)
        came = _Came()
        result = _copying_missing()(self._fd, _Part(dst, src, length), mode, page, came)
        passed, present, first, last, copies, partial = came
        return Copied(passed, present, first, last, copies, partial, result)

    def try_zeropage(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_ZEROPAGE."""
        return self._attempt(abi.UFFDIO_ZEROPAGE, bytearray(_pack_zeropage(start, length, mode, 0)), length, 24)

    def try_continue(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_CONTINUE."""
        return self._attempt(abi.UFFDIO_CONTINUE, bytearray(_pack_zeropage(start, length, mode, 0)), length, 24)

    def try_poison(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_POISON."""
        return self._attempt(abi.UFFDIO_POISON, bytearray(_pack_zeropage(start, length, mode, 0)), length, 24)

    def try_writeprotect(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_WRITEPROTECT."""
        return self._attempt(
            abi.UFFDIO_WRITEPROTECT, bytearray(abi.WRITEPROTECT_STRUCT.pack(start, length, mode)), length, None
        )

    def try_writeprotects(self, ranges: array[int]) -> int:
        """Protect several ranges; return how many were done, before the first that was not.

        Args:
            ranges: start and length of each.
        """
        if native.reason():
            each = zip(ranges[::2], ranges[1::2], strict=True)
            done = (self.try_writeprotect(*item, abi.WRITEPROTECT_MODE_WP) == item[1] for item in each)
            return sum(itertools.takewhile(bool, done))
        address, _ = ranges.buffer_info()
        return int(native.library().aiouffd_protects(self._fd, ctypes.c_void_p(address), len(ranges) // 2))

    def try_wake(self, start: int, length: int) -> int:
        """UFFDIO_WAKE."""
        return self._attempt(abi.UFFDIO_WAKE, bytearray(_pack_range(start, length)), length, None)

    def _attempt(self, request: int, argument: bytearray, length: int, result_at: int | None) -> int:
        try:
            _ioctl(self._fd, request, argument)
        except OSError as error:
            return _partial(argument, result_at, error)
        return length

    def _done(self, operation: str, start: int, length: int, result: int) -> int:
        if result < 0:
            self.fileno()  # raises ClosedError where the kernel says EBADF
            raise operation_error(operation, start, length, -result)
        return result

    def _call(self, operation: str, request: int, argument: bytearray, start: int, length: int) -> None:
        if self._fd < 0:
            raise ClosedError("this Userfaultfd is closed")
        try:
            fcntl.ioctl(self._fd, request, argument)
        except OSError as error:
            raise operation_error(operation, start, length, error.errno or 0) from None

    # Reading

    def read(self) -> list[Event]:
        """Return the pending messages, up to 64; an empty list if there are none.

        The kernel delivers page faults before layout events, also before older ones.
        """
        try:
            data = os.read(self.fileno(), abi.MESSAGE_SIZE * MESSAGES)
        except BlockingIOError:
            return []
        size = abi.MESSAGE_SIZE
        return [decode(data[at : at + size], self._adopt) for at in range(0, len(data), size)]

    def _adopt(self, fd: int) -> Userfaultfd:
        """Wrap the descriptor of a forked child. It has the features of its parent's."""
        return Userfaultfd.from_fd(fd, self._features)

    def gone(self) -> bool:
        """Tell whether the process that owned the memory has exited, or replaced it by execve.

        There is no EPOLLHUP, but a resolving operation answers ESRCH. This one asks for the lowest page that a process
        may map, which nobody registers: on a living process it is ENOENT, and changes nothing.
        """
        return self.try_zeropage(0x10000, mmap.PAGESIZE, abi.ZEROPAGE_MODE_DONTWAKE) in (-errno.ESRCH, -errno.ENOSPC)


class Copied(NamedTuple):
    """What came of `Userfaultfd.try_copy_missing`.

    Attributes:
        passed: bytes that were copied or are there.
        present: pages that were there already; the kernel has woken nobody who waits for them.
        first: address of the first of these.
        last: of the last of them. All between the two is there now.
        copies: calls.
        partial: how many of them did a part.
        result: 0: all of the range was passed. A negated errno: what was refused behind that.
    """

    passed: int
    present: int
    first: int
    last: int
    copies: int
    partial: int
    result: int


def copy_missing(
    copy: Callable[[int, int, int, int], int], dst: int, src: int, length: int, mode: int, page: int
) -> Copied:
    """COPY what is missing of a range, past pages that are there.

    Where every other page is there, that is a call a page: in Python each takes twice as long.

    Args:
        copy: as `Userfaultfd.try_copy`.
        dst: where to.
        src: where from.
        length: bytes, whole pages.
        mode: of each COPY.
        page: bytes of a page.
    """
    present, passed, copies, partial, result = list[int](), 0, 0, 0, 0
    while passed < length:
        copies += 1
        result = copy(dst + passed, src + passed, length - passed, mode)
        if result == -errno.EEXIST:
            present.append(dst + passed)
            passed += page
        elif result > 0:
            partial += result < length - passed
            passed += result
        else:
            break
    first, last = (present[0], present[-1]) if present else (0, 0)
    refused = 0 if passed == length else result or -errno.EAGAIN
    return Copied(passed, len(present), first, last, copies, partial, refused)


class _Part(ctypes.Structure):
    _fields_ = (("dst", ctypes.c_uint64), ("src", ctypes.c_uint64), ("len", ctypes.c_uint64))


_Came = ctypes.c_uint64 * (len(Copied._fields) - 1)


@cache
def _copying_missing() -> Callable[..., int]:
    function: Any = native.library().aiouffd_copy_missing
    function.argtypes = [ctypes.c_int, _Part, ctypes.c_uint64, ctypes.c_uint64, ctypes.POINTER(_Came)]
    function.restype = ctypes.c_int32
    return function  # type: ignore[no-any-return]


def _partial(argument: bytearray, result_at: int | None, error: OSError) -> int:
    """Return the bytes done, if the kernel wrote some into the result field, else the negated errno."""
    if result_at is not None and error.errno == errno.EAGAIN:
        result: int = _unpack_result(argument, result_at)[0]
        if result != 0:
            return result
    return -(error.errno or errno.EIO)


def is_registered(uffd: Userfaultfd, address: int, page: int) -> bool:
    """Tell whether a page is registered: COPY looks for that first, and then finds that its source cannot be read."""
    return uffd.try_copy(address, address_of(unreadable()), page, 0) != -errno.ENOENT


@attrs.frozen
class Fork:
    """UFFD_EVENT_FORK: the target forked; `uffd` serves the child and belongs to the receiver."""

    uffd: Userfaultfd


Event = PageFault | Fork | Remap | Remove | Unmap | UnknownEvent


def decode(message: bytes | memoryview, adopt: Callable[[int], Userfaultfd]) -> Event:
    """Decode one message of 32 bytes; `adopt` wraps the descriptor that a fork event brings."""
    code = message[0]
    if code == abi.EVENT_PAGEFAULT:
        _, flags, address, thread_id = abi.PAGEFAULT_MESSAGE.unpack(message)
        return PageFault(address, FaultFlag(flags), thread_id)
    if code == abi.EVENT_FORK:
        return Fork(adopt(*abi.FORK_MESSAGE.unpack(message)))
    if code == abi.EVENT_REMAP:
        return Remap(*abi.REMAP_MESSAGE.unpack(message))
    if code == abi.EVENT_REMOVE:
        return Remove(*abi.RANGE_MESSAGE.unpack(message))
    if code == abi.EVENT_UNMAP:
        return Unmap(*abi.RANGE_MESSAGE.unpack(message))
    return UnknownEvent(code, bytes(message))
