"""What this machine and this user can do with userfaultfd: `aiouffd doctor`."""

from __future__ import annotations

import importlib.util
import mmap
import os
import platform
import sys
from pathlib import Path
from typing import Final

import attrs
import click

from aiouffd import native
from aiouffd.errors import AccessError, NativePartError, UffdError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.userfaultfd import NO_FEATURES, REMEDY, Capabilities, Userfaultfd, probe

__all__ = ["Report", "command", "examine"]


_NEEDED: Final = abi.LAYOUT_EVENTS | Feature.THREAD_ID | Feature.SIGBUS
"""What a Monitor with its defaults needs of the kernel."""


@attrs.frozen
class Report:
    """The findings.

    Attributes:
        capabilities: None if no descriptor can be opened at all.
        refusals: way of opening -> why it is refused; an empty text if it is allowed.
        monitors: how a Monitor is made -> why it cannot run; an empty text if it can.
        facts: further lines: name -> finding.
        advice: what to change, a sentence each.
    """

    capabilities: Capabilities | None
    refusals: dict[str, str]
    monitors: dict[str, str]
    facts: dict[str, str]
    advice: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether a Monitor with its defaults can run."""
        return not next(iter(self.monitors.values()))

    def lines(self) -> list[str]:
        """Return the report as text."""
        lines = ["userfaultfd can be opened by"]
        lines += [f"  {way:<16} {reason or 'yes'}" for way, reason in self.refusals.items()]
        if self.capabilities is not None:
            lines += ["", f"  {'feature':<20} {'Linux':<10} here"]
            known = 0
            for feature, since in abi.FEATURE_SINCE.items():
                known |= int(feature)  # on ints: Flag's own ~ forgets unknown bits
                here = "yes" if self.capabilities.features & feature else "no"
                lines.append(f"  {feature.name:<20} {since:<10} {here}")
            if unknown := int(self.capabilities.features) & ~known:
                lines.append(f"  {f'unknown {unknown:#x}':<31} yes")
        lines += ["", *(f"  {name:<20} {value}" for name, value in self.facts.items()), ""]
        lines += [f"  {name:<30} {reason or 'can run'}" for name, reason in self.monitors.items()]
        return [*lines, *(f"! {sentence}" for sentence in self.advice)]


def examine() -> Report:
    """Examine this machine, as this user. Opens and closes a few descriptors; changes nothing."""
    refusals = {way: _try(way) for way in ("syscall", "device", "user-mode-only")}
    advice: list[str] = []
    capabilities: Capabilities | None = None
    try:
        capabilities = probe()
    except UffdError as error:
        advice.append(str(error))
    except OSError as error:
        advice.append(f"opening a userfaultfd: {error.strerror}")
    full = not refusals["syscall"] or not refusals["device"]
    if capabilities is not None and not full:
        advice.append(REMEDY)
    if capabilities is not None and not capabilities.features & Feature.POISON:
        advice.append(
            "This kernel has no POISON (Linux 6.6): a page that cannot be had is SIGSEGV; forked children and clients"
            " of a server wait for it"
        )
    if _try("syscall", Feature.EVENT_FORK) and _try("device", Feature.EVENT_FORK):
        advice.append("To serve forked children needs CAP_SYS_PTRACE: without it they do not have the region")
    if native.reason():
        advice.append(f"Monitor(engine=InThread()) needs the native part: {NativePartError(native.reason())}")
    return Report(capabilities, refusals, _monitors(capabilities, full=full), _facts(), tuple(advice))


def _monitors(capabilities: Capabilities | None, *, full: bool) -> dict[str, str]:
    """Return why each kind of Monitor cannot run; an empty text if it can."""
    if capabilities is None:
        lacks = "cannot run: no userfaultfd can be opened"
    elif missing := Feature(int(_NEEDED) & ~int(capabilities.features)):
        lacks = f"cannot run: this kernel lacks {missing!r}"
    else:
        lacks = ""
    refused = "" if full else "cannot run: not permitted"
    no_native = "cannot run: there is no native part" if native.reason() else ""
    user_mode = "cannot run: not permitted, or before Linux 5.11" if _try("user-mode-only") else ""
    return {
        "Monitor(), with its defaults": lacks or refused,
        "Monitor(engine=InThread())": lacks or no_native,
        "Monitor(user_mode_only=True)": lacks or user_mode,
    }


def _facts() -> dict[str, str]:
    free = _read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    uvloop = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio's (uvloop is not installed)"
    return {
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}, pages of {mmap.PAGESIZE} bytes",
        "Python": f"{platform.python_version()}, {'with' if _has_gil() else 'without'} a GIL",
        "user": f"uid {os.geteuid()}",
        "sysctl": f"vm.unprivileged_userfaultfd = {_read('/proc/sys/vm/unprivileged_userfaultfd')}",
        "huge pages": f"{_read('/proc/sys/vm/nr_hugepages')} of the default size, {free} of 2 MiB free",
        "max_map_count": _read("/proc/sys/vm/max_map_count"),
        "KVM": "usable" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "not usable (/dev/kvm)",
        "native part": f"missing: {native.reason()}" if native.reason() else "present",
        "event loop": uvloop,
        "halt polling": f"guest_halt_poll_ns = {_read('/sys/module/haltpoll/parameters/guest_halt_poll_ns')}",
    }


def _has_gil() -> bool:
    return getattr(sys, "_is_gil_enabled", lambda: True)()  # since Python 3.13


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        return f"unknown ({error.strerror})"


def _try(way: str, features: Feature = NO_FEATURES) -> str:
    """Open a descriptor in one way; return why that is refused, without advice, or an empty text."""
    try:
        if way == "user-mode-only":
            Userfaultfd(features, user_mode_only=True).close()
        else:
            Userfaultfd(features, opened_by=way).close()
    except AccessError:
        return "no: not permitted"
    except (UffdError, OSError) as error:
        return f"no: {error}"
    return ""


@click.command("doctor")
def command() -> int:
    """Report what this kernel and this user can do, and what to change if that is too little."""
    report = examine()
    for line in report.lines():
        click.echo(line)
    return 0 if report.ok else 1
