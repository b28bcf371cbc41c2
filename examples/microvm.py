"""A microVM in plain Python over /dev/kvm, whose memory is served while the guest runs. x86-64 only.

    python examples/microvm.py                                # makes a memory file and starts `aiouffd serve` for it
    python examples/microvm.py /run/pager.sock --memory 64

It does what a VM manager does when it restores a snapshot lazily: it maps the guest's memory, registers it with a
userfaultfd, and hands it over in Firecracker's way to the pager that listens on a Unix socket. That is one message with
a JSON array of the regions and the descriptor. The connection and the descriptor stay open as long as the VM lives.

The guest adds up the first byte of each page of its memory, writes the sum to an I/O port and halts. The kernel raises
its faults, so the userfaultfd must not be "user mode only". KVM_RUN and madvise wait for the pager, so they are called
through ctypes, which releases the GIL. A page that the pager has poisoned ends in an error.
"""

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import aiouffd

KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU = 0xAE01, 0xAE04, 0xAE41
KVM_SET_TSS_ADDR, KVM_SET_USER_MEMORY_REGION, KVM_RUN = 0xAE47, 0x4020AE46, 0xAE80
KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE has it from Python 3.13 on
EXIT_IO, EXIT_HLT, EXIT_MMIO = 2, 5, 6

PAGE, HUGE, GIB = 4096, 2 << 20, 1 << 30
MEMORY = 4 * GIB  # where the guest sees its memory: above what KVM keeps for itself below 4 GiB
# next: movzx ebx, byte [rsi]; add rax, rbx; add rsi, rdi; dec rcx; jnz next; out 0x10, eax; hlt
CODE = bytes.fromhex("0fb61e 4801d8 4801fe 48ffc9 75f2 e710 f4")

libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]  # a number, bytes, or a buffer
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class GuestError(Exception):
    """The guest stopped where it should not have. Its VM is destroyed, since it is in the middle of an instruction."""


def check(result: int) -> int:
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def ioctl(fd: int, request: int, argument: object = 0) -> int:
    return check(libc.ioctl(fd, request, argument))


class MicroVM:
    """A guest over memory (address, length) of this process. The memory stays the caller's, who has it served."""

    def __init__(self, memory: tuple[int, int], page_size: int = PAGE) -> None:
        self.memory, self.page_size = memory, page_size
        # Code, PML4, PDPT, and page directories of 2 MiB pages: the guest's addresses are its physical ones.
        count = -(-memory[1] // GIB)
        self._boot = mmap.mmap(-1, (4 + count) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._boot[: len(CODE)] = CODE
        for place, entry in (PAGE, 2 * PAGE | 3), (2 * PAGE, 3 * PAGE | 3), (3 * PAGE, 0x83):  # the first 2 MiB
            struct.pack_into("Q", self._boot, place, entry)  # 3: present, writable; 0x80: no further table
        for gib in range(count):
            struct.pack_into("Q", self._boot, 2 * PAGE + 8 * (MEMORY // GIB + gib), (4 + gib) * PAGE | 3)
            pages = range(MEMORY + gib * GIB | 0x83, MEMORY + (gib + 1) * GIB, HUGE)
            struct.pack_into("512Q", self._boot, (4 + gib) * PAGE, *pages)

        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm = ioctl(kvm, KVM_CREATE_VM)
        ioctl(self.vm, KVM_SET_TSS_ADDR, 0xFFFBD000)
        boot = ctypes.addressof(ctypes.c_char.from_buffer(self._boot))
        for slot, start, length, address in ((0, 0, len(self._boot), boot), (1, MEMORY, memory[1], memory[0])):
            ioctl(self.vm, KVM_SET_USER_MEMORY_REGION, struct.pack("IIQQQ", slot, 0, start, length, address))
        self.vcpu = ioctl(self.vm, KVM_CREATE_VCPU)
        self._state = mmap.mmap(self.vcpu, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE))  # struct kvm_run
        os.close(kvm)

        sregs = ctypes.create_string_buffer(312)
        ioctl(self.vcpu, KVM_GET_SREGS, sregs)
        # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding: 64-bit code, then data
        struct.pack_into("<QIH10B", sregs, 0, 0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
        for n in range(1, 6):
            struct.pack_into("<QIH10B", sregs, 24 * n, 0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        # cr0 (paging, protection), cr2, cr3 (the PML4), cr4 (PAE), cr8, efer (long mode)
        struct.pack_into("6Q", sregs, 224, 0x80000011, 0, PAGE, 0x20, 0, 0x500)
        ioctl(self.vcpu, KVM_SET_SREGS, sregs)

    def run(self, start: int = 0, length: int | None = None) -> int:
        """Let the guest run until it halts; return its sum of a part of the memory (32 bits), or raise GuestError."""
        pages = ((self.memory[1] - start) if length is None else length) // self.page_size
        # rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags
        registers = (0, 0, pages, 0, MEMORY + start, self.page_size, *[0] * 10, 0, 2)
        ioctl(self.vcpu, KVM_SET_REGS, struct.pack("18Q", *registers))
        checksum = 0
        while True:
            try:
                ioctl(self.vcpu, KVM_RUN)
            except InterruptedError:
                continue  # a signal; its Python handler runs here
            except OSError as error:
                self.close()
                raise GuestError(f"KVM_RUN failed: {error.strerror}") from error
            reason, where = struct.unpack_from("<I20xQ", self._state, 8)
            if reason == EXIT_HLT:
                return checksum
            if reason != EXIT_IO:
                self.close()
                if reason == EXIT_MMIO:
                    where -= MEMORY
                    raise GuestError(f"offset {where:#x} of the guest's memory cannot be had: the server says why")
                raise GuestError(f"the guest stopped, KVM exit reason {reason}")
            (where,) = struct.unpack_from("<Q", self._state, 40)
            (checksum,) = struct.unpack_from("<I", self._state, where)

    def close(self) -> None:
        """Destroy the VM."""
        for fd in (self.vcpu, self.vm):
            if fd >= 0:
                os.close(fd)
        self.vcpu = self.vm = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(path: str) -> socket.socket:
    """Return a connection to the pager at `path`."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError as error:
        sys.exit(f"microvm: {path}: {error.strerror}; is `aiouffd serve` running there?")
    return connection


def map_one_copy(connection: socket.socket) -> tuple[mmap.mmap, int]:
    """Map the memory that a pager with --one-copy sends first: privately, so that writes are the guest's own."""
    line, (fd,), *_ = socket.recv_fds(connection, 4096, 1)
    sent = json.loads(line)["memory"]
    # Else the kernel sets huge pages aside for all that the guest may write.
    flags = mmap.MAP_PRIVATE | MAP_NORESERVE
    memory = mmap.mmap(fd, sent["size"], flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)
    return memory, sent["page_size"]


def hand_over(
    connection: socket.socket, memory: tuple[int, int], page_size: int, *, one_copy: bool = False
) -> aiouffd.Userfaultfd:
    """Have the pager serve memory (address, length) from the start of its file. Keep both while it is used."""
    features, modes = aiouffd.Feature.EVENT_REMOVE, aiouffd.RegisterMode.MISSING
    if one_copy:  # what another guest has touched is there, but not mapped here
        features |= aiouffd.Feature.MINOR_SHMEM if page_size == PAGE else aiouffd.Feature.MINOR_HUGETLBFS
        modes |= aiouffd.RegisterMode.MINOR
    uffd = aiouffd.Userfaultfd(features)
    uffd.register(*memory, modes)
    mapping = {"base_host_virt_addr": memory[0], "size": memory[1], "offset": 0, "page_size": page_size}
    socket.send_fds(connection, [json.dumps([mapping]).encode()], [uffd.fileno()])
    return uffd


@contextlib.contextmanager
def sample_server(length: int) -> Iterator[str]:
    """Write a file of `length` bytes and serve it with `aiouffd serve`; yield the path of the socket."""
    with tempfile.TemporaryDirectory() as directory:
        memory, path = Path(directory, "memory"), Path(directory, "pager.sock")
        memory.write_bytes(b"".join(bytes([page % 251]) * PAGE for page in range(length // PAGE)))
        command = [sys.executable, "-m", "aiouffd", "serve", str(memory), "--socket", str(path)]
        with subprocess.Popen(command) as server:
            try:
                while not path.exists():
                    if server.poll() is not None:
                        sys.exit("microvm: `aiouffd serve` did not start")
                    time.sleep(0.01)
                yield str(path)
            finally:
                server.kill()  # its pager goes on until this process, its client, has ended


def run(path: str, length: int, page_size: int, balloon: int, rounds: int, *, one_copy: bool) -> None:
    """Run a guest with `length` bytes of memory, which the pager at `path` serves."""
    connection = connect(path)
    if one_copy:
        shared, page_size = map_one_copy(connection)
        memory = ctypes.addressof(ctypes.c_char.from_buffer(shared)), length
    else:
        region = aiouffd.Region(length, page_size=page_size)
        memory = region.address, region.mapped_length
    uffd = hand_over(connection, memory, page_size, one_copy=one_copy)
    with connection, uffd, MicroVM(memory, page_size) as vm:
        if balloon:  # memory that is given back is zeros from now on
            check(libc.madvise(memory[0], balloon, mmap.MADV_DONTNEED))  # returns when the pager has read the event
        for _ in range(rounds):
            began = time.perf_counter()
            print(f"checksum {vm.run()}, {memory[1] // page_size} pages,", end=" ")
            print(f"{time.perf_counter() - began:.4f} seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a guest whose memory a pager serves.")
    parser.add_argument("socket", nargs="?", help="where the pager listens (default: one that this program starts)")
    parser.add_argument("--memory", type=int, default=64, metavar="MIB", help="the guest's memory (%(default)s)")
    parser.add_argument("--page-size", type=int, default=PAGE, choices=(PAGE, HUGE), help="of the host's memory")
    parser.add_argument("--balloon", type=int, default=0, metavar="MIB", help="first give back this much of its start")
    parser.add_argument("--one-copy", action="store_true", help="map what a pager with --one-copy sends")
    parser.add_argument("--rounds", type=int, default=1, help="how often the guest runs (%(default)s)")
    arguments = parser.parse_args()
    length, balloon = arguments.memory << 20, arguments.balloon << 20
    if arguments.memory < 1 or not 0 <= balloon <= length or balloon % arguments.page_size:
        parser.error("--memory must be positive, and --balloon at most as large and a multiple of the page size")
    with contextlib.ExitStack() as stack:
        path = arguments.socket or stack.enter_context(sample_server(length))
        run(path, length, arguments.page_size, balloon, arguments.rounds, one_copy=arguments.one_copy)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GuestError as error:
        sys.exit(f"microvm: {error}")
