"""A client that does what nydus' own does: it asks for the size, hands its memory over, and maps what it is given."""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from pattern import PAGE

import aiouffd
from aiouffd.kernel.userfaultfd import NO_FEATURES

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["COPY", "ZEROCOPY", "NydusClient"]

ZEROCOPY, COPY = 0, 1
_MAP_FIXED = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


class NydusClient:
    """One that connects again, whenever its connection ends.

    Args:
        path: of the socket.
        size: of its memory; 0: what the server says.
        policy: of the handshake.
        window: how much it wants at once.
        prefault: whether it wants all that there is at once.
        bare: no answer has its length before it.
        features: of its userfaultfd.

    Attributes:
        region: the memory.
        stated: what the server has said of its size.
        size: as it has said first.
        mapped: (offset, length) of what it has mapped, in order.
        connections: how often it has connected.
        problem: why its thread has ended before its time.
    """

    def __init__(
        self,
        path: str | Path,
        size: int = 0,
        policy: int = ZEROCOPY,
        *,
        window: int = 16 * PAGE,
        prefault: bool = False,
        bare: bool = False,
        features: aiouffd.Feature = NO_FEATURES,
    ) -> None:
        self._path, self._bare = os.fspath(path), bare
        self.mapped: list[tuple[int, int]] = []
        self.connections = 0
        self.problem: BaseException | None = None
        self._connection = self._connect()
        self.ask()
        self.stated = [self._answer()[0]]
        self.size = self.stated[0]["size"]
        self.region = aiouffd.Region(size or self.size)
        self.uffd = aiouffd.Userfaultfd(features)
        self.uffd.register(self.region.address, self.region.mapped_length, aiouffd.RegisterMode.MISSING)
        where = {"base_host_virt_addr": self.region.address, "size": self.region.mapped_length, "offset": 0}
        how = {"page_size": window, "prot": mmap.PROT_READ | mmap.PROT_WRITE, "flags": mmap.MAP_PRIVATE | _MAP_FIXED}
        handshake = {"type": 0, "regions": [where | how], "policy": policy, "enable_prefault": prefault}
        self._handshake = json.dumps(handshake).encode()
        socket.send_fds(self._connection, [self._handshake], [self.uffd.fileno()])
        threading.Thread(target=self._main, daemon=True).start()

    def ask(self) -> None:
        """Ask what there is."""
        self._connection.sendall(b'{"type": 2}')

    def hang_up(self) -> None:
        """End the connection; it makes another one."""
        self._connection.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> socket.socket:
        self.connections += 1
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self._path)
            except (FileNotFoundError, ConnectionRefusedError):  # the next server is not there yet
                connection.close()
                time.sleep(0.01)
            else:
                return connection

    def _main(self) -> None:
        try:
            while True:
                try:
                    answer, fds = self._answer()
                except ConnectionError:
                    self._connection.close()
                    self._connection = self._connect()
                    socket.send_fds(self._connection, [self._handshake], [self.uffd.fileno()])
                    continue
                if answer["type"] == 3:
                    self.stated.append(answer)
                else:
                    self._map(answer, fds)
        except BaseException as error:  # noqa: BLE001 - for the thread that looks
            self.problem = error

    def _answer(self) -> tuple[dict[str, Any], list[int]]:
        """Return the next answer, and its descriptors."""
        data, ancillary, _, _ = self._connection.recvmsg(4 if not self._bare else 4096, socket.CMSG_SPACE(64))
        if not data:
            raise ConnectionError
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload)
        if not self._bare:
            (length,) = struct.unpack("<I", data)
            assert length <= 4096
            data = self._connection.recv(length, socket.MSG_WAITALL)
        return json.loads(data), list(fds)

    def _map(self, answer: dict[str, Any], fds: list[int]) -> None:
        assert answer["type"] == 1
        assert len(answer["ranges"]) == len(fds) <= 16
        for each, fd in zip(answer["ranges"], fds, strict=True):
            assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK  # as the source has opened it: for all clients
            address, length = self.region.address + each["block_offset"], each["len"]
            prot, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
            assert _libc.mmap(address, length, prot, flags, fd, each["blob_offset"]) == address, ctypes.get_errno()
            os.close(fd)
            self.mapped.append((each["block_offset"], length))
            self.uffd.wake(address, length)
