"""`Userfaultfd`: each operation, and each errno that the kernel can be made to show."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
from array import array
from time import perf_counter_ns
from typing import TYPE_CHECKING, NoReturn
from unittest import mock

import pytest
from pattern import PAGE, peek
from scenario import play

import aiouffd
from aiouffd import Feature, Ioctl, RegisterMode, Userfaultfd, native
from aiouffd.kernel import abi, libc, userfaultfd
from aiouffd.kernel.memory import SealedMemory, address_of

if TYPE_CHECKING:
    from collections.abc import Callable

NOTHING = Feature(0)
A = b"A" * PAGE
B = b"B" * PAGE


def registered(
    pages: int = 8, features: Feature = NOTHING, mode: RegisterMode = RegisterMode.MISSING, *, shared: bool = False
) -> tuple[aiouffd.Region, Userfaultfd]:
    """Return a region and the descriptor that it is registered with."""
    region = aiouffd.Region(pages * PAGE, shared=shared)
    uffd = Userfaultfd(features)
    uffd.register(region.address, pages * PAGE, mode)
    return region, uffd


class Reader(threading.Thread):
    """Touches an address without the GIL."""

    def __init__(self, address: int) -> None:
        super().__init__()
        self.address = address
        self.got = b""
        self.start()

    def run(self) -> None:
        """Touch."""
        self.got = peek(self.address)


def next_events(uffd: Userfaultfd) -> list[aiouffd.Event]:
    """Wait until something can be read, and read it."""
    assert select.select([uffd], [], [], 10)[0]
    return uffd.read()


# Opening and the handshake


def test_each_way_of_opening() -> None:
    """The system call, the device, and user mode only: same features, and each says how it was opened."""
    for uffd, way in (
        (Userfaultfd(opened_by="syscall"), "syscall"),
        (Userfaultfd(opened_by="device"), "device"),
        (Userfaultfd(user_mode_only=True), "user-mode-only"),
    ):
        with uffd:
            assert uffd.opened_by == way
            assert uffd.ioctls >= Ioctl.API | Ioctl.REGISTER | Ioctl.UNREGISTER
            assert os.get_blocking(uffd.fileno()) is False
            assert os.get_inheritable(uffd.fileno()) is False
            assert uffd.read() == []
        assert uffd.closed
        with pytest.raises(aiouffd.ClosedError):
            uffd.fileno()


def test_probe_and_enabled_features_are_two_things() -> None:
    """`probe()` tells what exists, `features` what is enabled; WP_ASYNC brings WP_UNPOPULATED along."""
    existing = aiouffd.probe().features
    assert existing >= Feature.EVENT_FORK | Feature.SIGBUS | Feature.THREAD_ID
    with Userfaultfd() as uffd:
        assert uffd.features == Feature(0)
    for feature in Feature:
        if feature & existing:
            with Userfaultfd(feature) as uffd:
                assert uffd.features & feature
    with Userfaultfd(Feature.WP_ASYNC) as uffd:
        assert uffd.features == Feature.WP_ASYNC | Feature.WP_UNPOPULATED


def test_a_feature_that_the_kernel_lacks() -> None:
    """UnsupportedError names what is missing and what is there; the bit is kept."""
    with pytest.raises(aiouffd.UnsupportedError) as caught:
        Userfaultfd(Feature(1 << 50) | Feature.THREAD_ID)
    assert str(1 << 50) in caught.value.missing
    assert "THREAD_ID" not in caught.value.missing
    assert "EVENT_FORK" in caught.value.available


def test_the_handshake_as_the_kernel_does_it() -> None:
    """A wrong version, a second handshake, use before it, a bad pointer: EINVAL, EINVAL, EINVAL, EFAULT."""
    fd = libc.syscall(abi.SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="Invalid"):
            os.read(fd, 32)
        with pytest.raises(OSError, match="Invalid"):
            fcntl.ioctl(fd, abi.UFFDIO_WAKE, bytearray(struct.pack("QQ", 0x10000, PAGE)))
        with pytest.raises(OSError, match="Invalid"):
            fcntl.ioctl(fd, abi.UFFDIO_API, bytearray(abi.API_STRUCT.pack(0xAB, 0, 0)))
        with pytest.raises(OSError, match="Bad address"):
            libc.syscall(16, fd, abi.UFFDIO_API, 8)
        fcntl.ioctl(fd, abi.UFFDIO_API, bytearray(abi.API_STRUCT.pack(abi.UFFD_API, 0, 0)))
        with pytest.raises(OSError, match="Invalid"):
            fcntl.ioctl(fd, abi.UFFDIO_API, bytearray(abi.API_STRUCT.pack(abi.UFFD_API, 0, 0)))
        with pytest.raises(OSError, match="Invalid"):
            os.read(fd, 31)
    finally:
        os.close(fd)


def as_nobody() -> None:
    """Scenario: an unprivileged user."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    with pytest.raises(aiouffd.AccessError) as caught:
        Userfaultfd()
    for knob in ("vm.unprivileged_userfaultfd", "/dev/userfaultfd", "CAP_SYS_PTRACE", "user_mode_only", "seccomp"):
        assert knob in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).remedy == caught.value.remedy
    assert aiouffd.probe().opened_by == "user-mode-only"
    with pytest.raises(aiouffd.AccessError, match="CAP_SYS_PTRACE"):
        Userfaultfd(Feature.EVENT_FORK, user_mode_only=True)
    region = aiouffd.Region(4 * PAGE)
    with Userfaultfd(user_mode_only=True) as uffd:
        uffd.register(region.address, 4 * PAGE, RegisterMode.MISSING)
        reader = Reader(region.address)
        (fault,) = next_events(uffd)
        assert isinstance(fault, aiouffd.PageFault)
        uffd.copy(fault.address, A)
        reader.join()
        assert reader.got == A[:8]
        # A fault of a system call is not reported: EFAULT.
        native = ctypes.CDLL(None, use_errno=True)
        native.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        assert native.write(os.pipe()[1], region.address + PAGE, 1) == -1
        assert ctypes.get_errno() == 14


def test_an_unprivileged_user() -> None:
    """Without a privilege: full use is an AccessError that names every knob; user mode only works, system calls not."""
    if os.geteuid():
        pytest.skip("needs root, to drop it")
    play(as_nobody)


def test_a_kernel_without_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSYS is UnsupportedError, which names the kernel's option and the seccomp filter that may hide it."""
    monkeypatch.setattr(abi, "SYS_USERFAULTFD", 100_000)
    with pytest.raises(aiouffd.UnsupportedError, match=r"CONFIG_USERFAULTFD.*seccomp"):
        Userfaultfd(opened_by="syscall")
    with pytest.raises(aiouffd.UnsupportedError, match="CONFIG_USERFAULTFD"):
        Userfaultfd(user_mode_only=True)


OPENINGS = {
    "neither": (errno.ENOSYS, errno.ENOENT, aiouffd.UnsupportedError, "CONFIG_USERFAULTFD"),
    "no driver behind the device": (errno.ENOSYS, errno.ENXIO, aiouffd.UnsupportedError, "CONFIG_USERFAULTFD"),
    "a system call that is not permitted, and no device": (errno.EPERM, errno.ENOENT, aiouffd.AccessError, "InThread"),
    "a hidden system call, and a device of root's": (errno.ENOSYS, errno.EACCES, aiouffd.AccessError, "dev/userfault"),
    "neither is permitted": (errno.EPERM, errno.EACCES, aiouffd.AccessError, "user_mode_only=True"),
    "no descriptor is left": (errno.EMFILE, errno.EMFILE, aiouffd.LimitError, "RLIMIT_NOFILE"),
    "none on the machine": (errno.ENFILE, errno.ENFILE, aiouffd.LimitError, "fs.file-max"),
    "anything else": (errno.EIO, errno.ENOENT, OSError, "Input/output"),
}


@pytest.mark.parametrize("case", OPENINGS)
def test_what_each_way_of_opening_answers(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The error tells what is missing, not permitted or used up; never that a file does not exist."""
    by_syscall, by_device, kind, text = OPENINGS[case]

    def refuse(number: int) -> Callable[..., NoReturn]:
        def call(*_: object) -> NoReturn:
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(libc, "syscall", refuse(by_syscall))
    monkeypatch.setattr(userfaultfd, "_open_by_device", refuse(by_device))
    with pytest.raises(kind, match=text):
        Userfaultfd()


def test_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever insists on it is told that it is the device that is missing."""

    def missing(_: int) -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(userfaultfd, "_open_by_device", missing)
    with pytest.raises(aiouffd.UnsupportedError, match=r"/dev/userfaultfd \(Linux 6.1\)"):
        Userfaultfd(opened_by="device")


def test_rwp_async_brings_rwp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses it alone (EINVAL); a kernel that has neither lacks both, by name."""
    asked: list[int] = []
    real = userfaultfd._handshake

    def handshake(fd: int, features: int) -> object:
        asked.append(features)
        return real(fd, features & ~int(Feature.RWP | Feature.RWP_ASYNC))

    monkeypatch.setattr(userfaultfd, "_handshake", handshake)
    with Userfaultfd(Feature.RWP_ASYNC) as uffd:
        assert uffd.features == Feature.RWP | Feature.RWP_ASYNC
    assert asked == [Feature.RWP | Feature.RWP_ASYNC]
    monkeypatch.undo()
    if Feature.RWP not in aiouffd.probe().features:
        with pytest.raises(aiouffd.UnsupportedError, match=r"RWP\|RWP_ASYNC|RWP_ASYNC\|RWP"):
            Userfaultfd(Feature.RWP_ASYNC)


def test_features_that_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has each of them: it is not said to lack nothing."""
    real = userfaultfd._handshake

    def handshake(fd: int, features: int) -> object:
        if features:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, features)

    monkeypatch.setattr(userfaultfd, "_handshake", handshake)
    with pytest.raises(aiouffd.OperationError, match=r"UFFDIO_API: EINVAL .* does not allow these features together"):
        Userfaultfd(Feature.SIGBUS | Feature.THREAD_ID)


@pytest.mark.parametrize("protect", [True, False])
def test_rwprotect_as_the_kernel_is_asked(monkeypatch: pytest.MonkeyPatch, protect: bool) -> None:
    """UFFDIO_RWPROTECT and UFFDIO_SET_MODE (Linux 7.3): request, range and modes."""
    calls: list[tuple[int, bytes]] = []
    with Userfaultfd() as uffd:
        monkeypatch.setattr(fcntl, "ioctl", lambda _, request, argument: calls.append((request, bytes(argument))))
        uffd.rwprotect(0x10000, 0x2000, protect=protect, wake=False)
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        assert Feature.RWP_ASYNC in uffd.features
        uffd.set_mode(disable=Feature.RWP_ASYNC)
        assert uffd.features == NOTHING
    mode = abi.RWPROTECT_MODE_RWP if protect else abi.RWPROTECT_MODE_DONTWAKE
    assert calls == [
        (0xC018AA09, struct.pack("=QQQ", 0x10000, 0x2000, mode)),
        (0x4010AA0A, struct.pack("=QQ", 1 << 18, 0)),
        (0x4010AA0A, struct.pack("=QQ", 0, 1 << 18)),
    ]


# Operations


def each_resolving_operation() -> None:
    """Scenario."""
    region, uffd = registered()
    base = region.address
    with uffd:
        reader = Reader(base + PAGE)
        (fault,) = next_events(uffd)
        assert fault == aiouffd.PageFault(base + PAGE, aiouffd.FaultFlag(0), 0)
        assert uffd.copy(base + PAGE, A, wake=False) == PAGE
        reader.join(0.05)
        assert reader.is_alive()  # the page is there, the sleeper has not been woken
        uffd.wake(base + PAGE, PAGE)
        reader.join()
        assert reader.got == A[:8]

        with pytest.raises(aiouffd.PagePresentError):
            uffd.copy(base + PAGE, B)
        assert uffd.copy(base, A + B) == PAGE  # partial: the second page is there
        assert uffd.zeropage(base + 2 * PAGE, 2 * PAGE) == 2 * PAGE
        assert region[: 4 * PAGE] == A + A + bytes(2 * PAGE)
        with pytest.raises(aiouffd.PagePresentError):
            uffd.zeropage(base, PAGE)

        assert uffd.poison(base + 4 * PAGE, PAGE) == PAGE
        native = ctypes.CDLL(None, use_errno=True)
        native.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        assert native.write(os.pipe()[1], base + 4 * PAGE, 1) == -1
        assert uffd.copy(base + 4 * PAGE, B) == PAGE  # heals it
        assert region[4 * PAGE] == B[0]

        # A wake-up without a page is a fault once more.
        reader = Reader(base + 5 * PAGE)
        next_events(uffd)
        uffd.wake(base + 5 * PAGE, PAGE)
        (again,) = next_events(uffd)
        assert isinstance(again, aiouffd.PageFault)
        assert again.address == base + 5 * PAGE
        uffd.copy(base + 5 * PAGE, bytearray(B))
        reader.join()


def test_copy_zeropage_wake_and_poison() -> None:
    """What each does to memory and to sleepers; partial results are return values."""
    play(each_resolving_operation)


REFUSALS: list[tuple[str, type[aiouffd.OperationError], Callable[[Userfaultfd, int], object]]] = [
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.copy(base + 1, A)),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.copy(base, b"short")),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.zeropage(base, 100)),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.zeropage(base, 0)),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.wake(base, 0)),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.wake(base + 1, PAGE)),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.register(base, 0, RegisterMode.MISSING)),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.register(base + 1, PAGE, RegisterMode.MISSING)),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.register(base, PAGE, RegisterMode(0))),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.register(base, PAGE, RegisterMode(1 << 20))),
    ("EINVAL", aiouffd.OperationError, lambda u, _: u.register(0x10000, PAGE, RegisterMode.MISSING)),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.unregister(base, 1)),
    ("EINVAL", aiouffd.OperationError, lambda u, _: u.unregister(0x10000, PAGE)),
    ("ENOENT", aiouffd.RangeGoneError, lambda u, _: u.copy(0x10000, A)),
    ("ENOENT", aiouffd.RangeGoneError, lambda u, _: u.zeropage(0x10000, PAGE)),
    ("ENOENT", aiouffd.RangeGoneError, lambda u, base: u.copy(base + 7 * PAGE, A + B)),
    ("EINVAL", aiouffd.OperationError, lambda u, base: u.continue_(base, PAGE)),
    ("EINVAL", aiouffd.OperationError, lambda u, _: u.copy(2**64 - PAGE, A)),
]


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_what_the_kernel_refuses(case: int) -> None:
    """A typed error with operation, range and errno, whose text says what to do."""
    name, kind, call = REFUSALS[case]
    region, uffd = registered()
    with uffd, pytest.raises(kind) as caught:
        call(uffd, region.address)
    assert type(caught.value) is kind
    assert name in str(caught.value)
    assert caught.value.operation.startswith("UFFDIO_")
    assert "; " in str(caught.value) or caught.value.operation in (
        "UFFDIO_WAKE",
        "UFFDIO_UNREGISTER",
        "UFFDIO_CONTINUE",
    )


def test_a_range_has_one_owner() -> None:
    """EBUSY: registered with another descriptor; after unregistering it may be taken."""
    region, uffd = registered()
    with uffd, Userfaultfd() as other:
        with pytest.raises(aiouffd.BusyError):
            other.register(region.address, PAGE, RegisterMode.MISSING)
        uffd.unregister(region.address, 8 * PAGE)
        assert other.register(region.address, PAGE, RegisterMode.MISSING) >= Ioctl.COPY | Ioctl.ZEROPAGE | Ioctl.WAKE


def test_a_copy_from_memory_that_cannot_be_read() -> None:
    """EFAULT: the source buffer's file has been cut, for example."""
    region, uffd = registered()
    with uffd:
        assert uffd.try_copy(region.address, 8, PAGE, 0) == -14


def test_a_partial_result_is_seen_in_each_version_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fcntl.ioctl` of Python 3.14 copies an argument of up to 1,024 bytes, and copies it back only if it succeeds."""

    def as_python_3_14(fd: int, request: int, argument: bytearray) -> int:
        given = bytearray(argument) if len(argument) <= 1024 else argument
        result: int = fcntl.ioctl(fd, request, given)
        argument[:] = given
        return result

    monkeypatch.setattr(userfaultfd, "_ioctl", as_python_3_14)
    monkeypatch.setattr(userfaultfd, "_pack_copy", abi.padded(abi.COPY_STRUCT, 1025).pack)
    monkeypatch.setattr(userfaultfd, "_pack_zeropage", abi.padded(abi.ZEROPAGE_STRUCT, 1025).pack)
    # Before 3.14 it keeps the GIL during a call with a larger argument: other threads would wait for each COPY.
    assert (abi.COPY_ARGUMENT.size > 1024) == (sys.version_info >= (3, 14))
    for operation in ("copy", "zeropage", "poison"):
        if operation == "poison" and Feature.POISON not in aiouffd.probe().features:
            continue
        region = aiouffd.Region(4 * PAGE)
        with Userfaultfd() as uffd:
            uffd.register(region.address, 4 * PAGE, RegisterMode.MISSING)
            uffd.zeropage(region.address + 2 * PAGE, PAGE)
            content = [bytes(4 * PAGE)] if operation == "copy" else [4 * PAGE]
            assert getattr(uffd, operation)(region.address, *content) == 2 * PAGE


@pytest.mark.parametrize("size", [4096, 16 << 10, 64 << 10])
def test_gone_asks_for_a_page_of_the_machine(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A length that is not a multiple of its pages would be EINVAL: the process would never be gone."""
    asked: list[tuple[int, int, int]] = []

    def try_zeropage(start: int, length: int, mode: int) -> int:
        asked.append((start % size, length, mode))
        return -errno.ESRCH

    monkeypatch.setattr(mmap, "PAGESIZE", size)
    with Userfaultfd() as uffd:
        monkeypatch.setattr(uffd, "try_zeropage", try_zeropage)
        assert uffd.gone()
    assert asked == [(0, size, abi.ZEROPAGE_MODE_DONTWAKE)]


def test_a_target_that_has_exited() -> None:
    """ESRCH for COPY and ZEROPAGE, ENOMEM for REGISTER, nothing for WAKE: `gone()` tells."""
    left, right = os.pipe()
    region = aiouffd.Region(8 * PAGE)
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        uffd = Userfaultfd()
        uffd.register(region.address, 8 * PAGE, RegisterMode.MISSING)
        socket.send_fds(theirs, [b"x"], [uffd.fileno()])
        os.read(left, 1)
        os._exit(0)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    with Userfaultfd.from_fd(fds[0]) as uffd:
        assert not uffd.gone()
        assert uffd.copy(region.address, A) == PAGE
        os.write(right, b"x")
        os.waitpid(child, 0)
        assert uffd.gone()
        with pytest.raises(aiouffd.TargetExitedError):
            uffd.copy(region.address + PAGE, A)
        with pytest.raises(aiouffd.TargetExitedError):
            uffd.zeropage(region.address + PAGE, PAGE)
        with pytest.raises(aiouffd.OperationError, match="ENOMEM"):
            uffd.register(region.address, PAGE, RegisterMode.MISSING)
        uffd.wake(region.address, PAGE)
    for end in (left, right):
        os.close(end)
    ours.close()
    theirs.close()


def events_change_the_layout() -> None:
    """Scenario."""
    features = Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP
    region, uffd = registered(16, features)
    base = region.address
    with uffd:
        uffd.copy(base, A)
        thread = threading.Thread(target=lambda: libc.madvise(base, 2 * PAGE, mmap.MADV_DONTNEED))
        thread.start()
        assert select.select([uffd], [], [], 10)[0]
        with pytest.raises(aiouffd.LayoutChangingError):  # while the event is unread
            uffd.copy(base + 8 * PAGE, A)
        uffd.wake(base, PAGE)  # this one does not look
        assert uffd.read() == [aiouffd.Remove(base, base + 2 * PAGE)]
        thread.join()
        assert uffd.copy(base, B) == PAGE

        target = mmap.mmap(-1, 64 * PAGE)
        place = address_of(target)
        moved: list[int] = []
        flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED
        thread = threading.Thread(
            target=lambda: moved.append(libc.mremap(base + 8 * PAGE, 4 * PAGE, 4 * PAGE, flags, place))
        )
        thread.start()
        seen: list[aiouffd.Event] = []
        while thread.is_alive():
            if select.select([uffd], [], [], 0.01)[0]:
                seen += uffd.read()
        seen += uffd.read()
        assert moved == [place]
        assert seen[0] == aiouffd.Remap(base + 8 * PAGE, place, 4 * PAGE)
        assert uffd.copy(place, A) == PAGE  # it is registered where it is now
        os._exit(0)  # Python's objects know nothing of where the memory has gone


def test_layout_events() -> None:
    """REMOVE, REMAP (and UNMAP of what it left): EAGAIN while one is unread, served at the new place afterwards."""
    play(events_change_the_layout)


def fork_event() -> None:
    """Scenario."""
    region, uffd = registered(features=Feature.EVENT_FORK)
    base = region.address
    children: list[Userfaultfd] = []

    def read() -> None:
        (event,) = next_events(uffd)
        assert isinstance(event, aiouffd.Fork)
        children.append(event.uffd)

    native = ctypes.CDLL(None)
    thread = threading.Thread(target=read)
    thread.start()
    # vfork-free and malloc-free: glibc's fork holds malloc's locks while it waits, and the reader would need them.
    child = native.syscall(56 if os.uname().machine == "x86_64" else 220, signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        native.memcpy(ctypes.c_void_p(base + PAGE), ctypes.c_void_p(base), 8)
        native._exit(int(ctypes.string_at(base + PAGE, 1) == b"A"))
    thread.join()
    (served,) = children
    assert served.features == uffd.features
    for _ in range(2):
        for event in next_events(served):
            assert isinstance(event, aiouffd.PageFault)
            served.copy(event.address, A)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert served.gone()


def test_fork_event() -> None:
    """The child's descriptor arrives with the event, has the parent's features, and serves the child."""
    play(fork_event)


def write_protection() -> None:
    """Scenario."""
    region, uffd = registered(features=Feature.PAGEFAULT_FLAG_WP, mode=RegisterMode.MISSING | RegisterMode.WP)
    base = region.address
    with uffd:
        uffd.copy(base, A + A, write_protect=True)
        assert region[0] == A[0]  # reading is free

        def write() -> None:
            native = ctypes.CDLL(None)
            native.memcpy(ctypes.c_void_p(base), ctypes.c_char_p(B), ctypes.c_size_t(8))

        writer = threading.Thread(target=write)
        writer.start()
        (fault,) = next_events(uffd)
        assert isinstance(fault, aiouffd.PageFault)
        assert (fault.kind, fault.write) == (aiouffd.FaultKind.WP, True)
        uffd.writeprotect(base, PAGE, protect=False)
        writer.join()
        assert region[:8] == B[:8]
        uffd.writeprotect(base, 2 * PAGE, protect=True)
        writer = threading.Thread(target=write)
        writer.start()
        assert next_events(uffd)
        uffd.writeprotect(base, PAGE, protect=False, wake=False)
        uffd.wake(base, PAGE)
        writer.join()
        # Several by one call end before the first that is in no mapping.
        ranges = array("Q", [base, PAGE, base + PAGE, PAGE, base + 8 * PAGE, PAGE, base, PAGE])
        for missing in ("", "left out"):
            with mock.patch.object(native, "reason", lambda why=missing: why):
                uffd.writeprotect(base, 2 * PAGE, protect=False)
                assert uffd.try_writeprotects(ranges) == 2
            assert uffd.try_writeprotects(ranges[4:]) == uffd.try_writeprotects(ranges[:0]) == 0
            writer = threading.Thread(target=write)
            writer.start()
            assert next_events(uffd)
            uffd.writeprotect(base, 2 * PAGE, protect=False)
            writer.join()


def test_write_protection() -> None:
    """COPY with protection, protecting and lifting it: a writer waits, is reported as such, and goes on."""
    play(write_protection)


def minor_faults() -> None:
    """Scenario."""
    region = aiouffd.Region(8 * PAGE, shared=True)
    with Userfaultfd(Feature.MINOR_SHMEM) as uffd:
        assert uffd.register(region.address, 8 * PAGE, RegisterMode.MISSING | RegisterMode.MINOR) & Ioctl.CONTINUE
        os.pwrite(region.fd, A, PAGE)
        reader = Reader(region.address + PAGE)
        (fault,) = next_events(uffd)
        assert isinstance(fault, aiouffd.PageFault)
        assert fault.kind is aiouffd.FaultKind.MINOR
        assert uffd.continue_(region.address + PAGE, PAGE) == PAGE
        reader.join()
        assert reader.got == A[:8]
        with pytest.raises(aiouffd.OperationError, match="EFAULT"):
            uffd.continue_(region.address + 2 * PAGE, PAGE)  # the file has no such page
        with pytest.raises(aiouffd.PagePresentError):
            uffd.continue_(region.address + PAGE, PAGE)


def test_minor_faults() -> None:
    """A page that the file has and the mapping lacks: CONTINUE maps it; EFAULT where the file has none."""
    play(minor_faults)


def moving() -> None:
    """Scenario."""
    region, uffd = registered()
    source = aiouffd.Region(4 * PAGE)
    source[: 2 * PAGE] = A + B
    with uffd:
        assert uffd.move(region.address, source.address, 2 * PAGE) == 2 * PAGE
        assert region[: 2 * PAGE] == A + B
        assert source[0] == 0
        source[0] = 1
        with pytest.raises(aiouffd.PagePresentError):
            uffd.move(region.address, source.address, PAGE)
        with pytest.raises(aiouffd.RangeGoneError):
            uffd.move(region.address + 4 * PAGE, source.address + 3 * PAGE, PAGE)
        assert uffd.move(region.address + 4 * PAGE, source.address + 3 * PAGE, PAGE, allow_src_holes=True) == PAGE
        source[2 * PAGE] = 1
        child = os.fork()
        if child == 0:
            signal.pause()
        with pytest.raises(aiouffd.BusyError):
            uffd.move(region.address + 5 * PAGE, source.address + 2 * PAGE, PAGE)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_move() -> None:
    """Pages change their place without a copy; holes, pages that are there, and shared ones are refused."""
    play(moving)


def sigbus() -> None:
    """Scenario."""
    region, uffd = registered(features=Feature.SIGBUS)
    assert uffd.read() == []
    print(region[0])


def test_sigbus_in_place_of_a_message() -> None:
    """With Feature.SIGBUS nobody waits: the toucher gets the signal."""
    play(sigbus, status=-signal.SIGBUS)


def thread_and_exact_address() -> None:
    """Scenario."""
    region, uffd = registered(features=Feature.THREAD_ID | Feature.EXACT_ADDRESS)
    with uffd:
        reader = Reader(region.address + PAGE + 123)
        (fault,) = next_events(uffd)
        assert isinstance(fault, aiouffd.PageFault)
        assert fault.address == region.address + PAGE + 123
        assert fault.thread_id == reader.native_id
        uffd.zeropage(region.address + PAGE, PAGE)
        reader.join()


def test_thread_id_and_exact_address() -> None:
    """The faulting thread's id, and the address to the byte."""
    play(thread_and_exact_address)


def last_descriptor_closes() -> None:
    """Scenario."""
    region, uffd = registered()
    reader = Reader(region.address)
    next_events(uffd)
    duplicate = os.dup(uffd.fileno())
    uffd.close()
    reader.join(0.05)
    assert reader.is_alive()
    os.close(duplicate)
    reader.join()
    assert reader.got == bytes(8)


def test_the_last_descriptor_lets_go_with_zeros() -> None:
    """Why somebody must always hold a duplicate: with the last one, whoever waits reads zeros."""
    play(last_descriptor_closes)


def test_sealed_memory_cannot_change() -> None:
    """What travels as a sealed memfd can be neither written, cut nor grown, by anybody."""
    memory = SealedMemory.from_buffer(A + b"x")
    assert memory.map is not None
    assert memory.map[:] == A + b"x"
    for change in (lambda: os.write(memory.fd, b"y"), lambda: os.ftruncate(memory.fd, 1)):
        with pytest.raises(PermissionError):
            change()


class TwoPages(threading.Thread):
    """Touches two pages, one right after the other."""

    def __init__(self, address: int) -> None:
        super().__init__()
        self.address = address
        self.start()

    def run(self) -> None:
        """Touch."""
        peek(self.address + PAGE - 1, 2)


def unregistered_under_touches() -> None:
    """Scenario."""
    region, uffd = registered(2)
    for number in range(400):
        toucher = TwoPages(region.address)
        next_events(uffd)
        end = perf_counter_ns() + 100 * number
        uffd.zeropage(region.address, PAGE)
        while perf_counter_ns() < end:  # until it is about to come to the second page
            pass
        uffd.unregister(region.address, 2 * PAGE)
        toucher.join(60)
        assert not toucher.is_alive(), f"it sleeps on in round {number}"
        libc.madvise(region.address, 2 * PAGE, mmap.MADV_DONTNEED)
        uffd.read()
        uffd.register(region.address, 2 * PAGE, RegisterMode.MISSING)
    uffd.close()


def test_whoever_touches_is_let_go_by_unregister() -> None:
    """Also who comes, or comes again, between the kernel's WAKE and the end of the registration."""
    play(unregistered_under_touches)
