"""Every constant and struct of `kernel.abi`, proven by a C program against the kernel's headers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from aiouffd.kernel import abi, libc
from aiouffd.kernel.abi import FaultFlag, Feature, RegisterMode

if TYPE_CHECKING:
    from pathlib import Path

NUMBERS = {
    "UFFD_API": abi.UFFD_API,
    "UFFDIO_API": abi.UFFDIO_API,
    "UFFDIO_REGISTER": abi.UFFDIO_REGISTER,
    "UFFDIO_UNREGISTER": abi.UFFDIO_UNREGISTER,
    "UFFDIO_WAKE": abi.UFFDIO_WAKE,
    "UFFDIO_COPY": abi.UFFDIO_COPY,
    "UFFDIO_ZEROPAGE": abi.UFFDIO_ZEROPAGE,
    "UFFDIO_MOVE": abi.UFFDIO_MOVE,
    "UFFDIO_WRITEPROTECT": abi.UFFDIO_WRITEPROTECT,
    "UFFDIO_CONTINUE": abi.UFFDIO_CONTINUE,
    "UFFDIO_POISON": abi.UFFDIO_POISON,
    "UFFDIO_RWPROTECT": abi.UFFDIO_RWPROTECT,
    "UFFDIO_SET_MODE": abi.UFFDIO_SET_MODE,
    "UFFDIO_RWPROTECT_MODE_RWP": abi.RWPROTECT_MODE_RWP,
    "UFFDIO_RWPROTECT_MODE_DONTWAKE": abi.RWPROTECT_MODE_DONTWAKE,
    "SYS_mlock2": abi.SYS_MLOCK2,
    "SYS_sched_setattr": abi.SYS_SCHED_SETATTR,
    "MADV_DONTNEED_LOCKED": libc.MADV_DONTNEED_LOCKED,
    "USERFAULTFD_IOC_NEW": abi.USERFAULTFD_IOC_NEW,
    "PAGEMAP_SCAN": abi.PAGEMAP_SCAN,
    "SYS_userfaultfd": abi.SYS_USERFAULTFD,
    "UFFD_USER_MODE_ONLY": abi.UFFD_USER_MODE_ONLY,
    "UFFDIO_COPY_MODE_DONTWAKE": abi.COPY_MODE_DONTWAKE,
    "UFFDIO_COPY_MODE_WP": abi.COPY_MODE_WP,
    "UFFDIO_ZEROPAGE_MODE_DONTWAKE": abi.ZEROPAGE_MODE_DONTWAKE,
    "UFFDIO_CONTINUE_MODE_DONTWAKE": abi.CONTINUE_MODE_DONTWAKE,
    "UFFDIO_CONTINUE_MODE_WP": abi.CONTINUE_MODE_WP,
    "UFFDIO_POISON_MODE_DONTWAKE": abi.POISON_MODE_DONTWAKE,
    "UFFDIO_WRITEPROTECT_MODE_WP": abi.WRITEPROTECT_MODE_WP,
    "UFFDIO_WRITEPROTECT_MODE_DONTWAKE": abi.WRITEPROTECT_MODE_DONTWAKE,
    "UFFDIO_MOVE_MODE_DONTWAKE": abi.MOVE_MODE_DONTWAKE,
    "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES": abi.MOVE_MODE_ALLOW_SRC_HOLES,
    "UFFD_EVENT_PAGEFAULT": abi.EVENT_PAGEFAULT,
    "UFFD_EVENT_FORK": abi.EVENT_FORK,
    "UFFD_EVENT_REMAP": abi.EVENT_REMAP,
    "UFFD_EVENT_REMOVE": abi.EVENT_REMOVE,
    "UFFD_EVENT_UNMAP": abi.EVENT_UNMAP,
    "UFFD_FEATURE_PAGEFAULT_FLAG_WP": Feature.PAGEFAULT_FLAG_WP,
    **{f"UFFD_FEATURE_{item.name}": item for item in Feature},
    **{f"UFFDIO_REGISTER_MODE_{item.name}": item for item in RegisterMode},
    **{f"UFFD_PAGEFAULT_FLAG_{item.name}": item for item in FaultFlag},
    "PM_SCAN_WP_MATCHING": abi.PM_SCAN_WP_MATCHING,
    "PM_SCAN_CHECK_WPASYNC": abi.PM_SCAN_CHECK_WPASYNC,
    "PAGE_IS_WPALLOWED": abi.PAGE_IS_WPALLOWED,
    "PAGE_IS_WRITTEN": abi.PAGE_IS_WRITTEN,
    "PAGE_IS_FILE": abi.PAGE_IS_FILE,
    "PAGE_IS_PRESENT": abi.PAGE_IS_PRESENT,
    "PAGE_IS_SWAPPED": abi.PAGE_IS_SWAPPED,
    "PAGE_IS_PFNZERO": abi.PAGE_IS_PFNZERO,
    "PAGE_IS_HUGE": abi.PAGE_IS_HUGE,
    "PAGE_IS_SOFT_DIRTY": abi.PAGE_IS_SOFT_DIRTY,
    "PAGE_IS_GUARD": abi.PAGE_IS_GUARD,
    "PAGE_IS_ACCESSED": abi.PAGE_IS_ACCESSED,
}
IOCTL_BITS = [
    "REGISTER",
    "UNREGISTER",
    "WAKE",
    "COPY",
    "ZEROPAGE",
    "MOVE",
    "WRITEPROTECT",
    "CONTINUE",
    "POISON",
    "RWPROTECT",
]
IOCTL_BITS += ["SET_MODE", "API"]
SIZES = {
    "struct uffdio_api": abi.API_STRUCT.size,
    "struct uffdio_register": abi.REGISTER_STRUCT.size,
    "struct uffdio_range": abi.RANGE_STRUCT.size,
    "struct uffdio_copy": abi.COPY_STRUCT.size,
    "struct uffdio_zeropage": abi.ZEROPAGE_STRUCT.size,
    "struct uffdio_writeprotect": abi.WRITEPROTECT_STRUCT.size,
    "struct uffd_msg": abi.MESSAGE_SIZE,
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the headers of this machine say; names that they are too old for are missing."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    lines = [
        "#include <stdio.h>",
        "#include <sys/mman.h>",
        "#include <sys/syscall.h>",
        "#include <linux/userfaultfd.h>",
        "#include <linux/fs.h>",
    ]
    lines.append("int main(void) {")
    for name in [*NUMBERS, *(f"_UFFDIO_{bit}" for bit in IOCTL_BITS)]:
        # Enumerators of PAGEMAP_SCAN and modes are macros as well; a header that lacks one leaves it out.
        lines += [f"#ifdef {name}", f'printf("{name} %llu\\n", (unsigned long long)({name}));', "#endif"]
    lines += [f'printf("{name} %zu\\n", sizeof({name}));' for name in SIZES]
    lines += ["return 0;", "}"]
    directory: Path = tmp_path_factory.mktemp("abi")
    source = directory / "probe.c"
    source.write_text("\n".join(lines))
    subprocess.run(["cc", "-o", directory / "probe", source], check=True)
    output = subprocess.run([directory / "probe"], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, _, value in (line.rpartition(" ") for line in output.splitlines())}


def test_numbers_are_the_headers(header: dict[str, int]) -> None:
    """Each constant that the header has is ours; the core of the interface is among them."""
    proven = {name for name in NUMBERS if name in header}
    assert {name: header[name] for name in proven} == {name: int(NUMBERS[name]) for name in proven}
    assert {"UFFDIO_API", "UFFDIO_COPY", "UFFDIO_CONTINUE", "UFFD_FEATURE_EVENT_FORK", "SYS_userfaultfd"} <= proven
    print(f"{len(proven)} of {len(NUMBERS)} proven; the header lacks {sorted(set(NUMBERS) - proven)}")


def test_ioctl_bits_are_the_headers(header: dict[str, int]) -> None:
    """Bit n of the ioctls mask is ioctl number n."""
    for bit in IOCTL_BITS:
        if (number := header.get(f"_UFFDIO_{bit}")) is not None:
            assert abi.Ioctl[bit] == 1 << number


def test_structs_have_the_headers_sizes(header: dict[str, int]) -> None:
    """A struct of another size would have another ioctl number."""
    assert {name: header[name] for name in SIZES} == SIZES
    for request, size in ((abi.UFFDIO_MOVE, 40), (abi.UFFDIO_POISON, 32), (abi.PAGEMAP_SCAN, abi.PM_SCAN_ARG.size)):
        assert request >> 16 & 0x3FFF == size  # _IOWR keeps the size of its argument in the number


_GENERIC = (282, 284, 274)
NUMBERS_OF = {"x86_64": (323, 325, 314), "aarch64": _GENERIC, "riscv64": _GENERIC, "loongarch64": _GENERIC}


@pytest.mark.parametrize("machine", NUMBERS_OF)
def test_system_calls_of_each_architecture(machine: str) -> None:
    """The numbers of userfaultfd(2), mlock2(2) and sched_setattr(2), as in the kernel's tables."""
    assert abi.system_calls(machine, pointer_bits=64) == NUMBERS_OF[machine]


@pytest.mark.parametrize(
    ("machine", "bits"), [("ppc64le", 64), ("s390x", 64), ("mips64", 64), ("armv7l", 32), ("x86_64", 32), ("", 64)]
)
def test_other_architectures_are_refused(machine: str, bits: int) -> None:
    """Their numbers are not known, or their ioctls are numbered otherwise: a guess would call something else."""
    with pytest.raises(ImportError, match=f"{machine} in a {bits}-bit process.*aarch64"):
        abi.system_calls(machine, pointer_bits=bits)


def test_the_import_is_refused() -> None:
    """`import aiouffd` says so."""
    code = "import os, types; os.uname = lambda: types.SimpleNamespace(machine='sparc64'); import aiouffd"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "ImportError: aiouffd does not know the system calls and ioctls of sparc64" in result.stderr
