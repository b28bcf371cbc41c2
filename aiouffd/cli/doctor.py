"""What this machine and this user can do with userfaultfd: `aiouffd doctor`."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import attrs
import click

from aiouffd import native
from aiouffd.errors import NativePartError, UffdError
from aiouffd.kernel.abi import FEATURE_SINCE, Feature
from aiouffd.kernel.userfaultfd import NO_FEATURES, Capabilities, Userfaultfd, probe

__all__ = ["Report", "command", "examine"]


@attrs.frozen
class Report:
    """The findings.

    Attributes:
        capabilities: None where no descriptor can be opened at all.
        refusals: way of opening -> why it is refused; empty text where it is allowed.
        ok: whether the main job, a Monitor with its defaults, can run.
        facts: further lines: name -> finding.
        advice: what to change, a sentence each.
    """

    capabilities: Capabilities | None
    refusals: dict[str, str]
    ok: bool
    facts: dict[str, str]
    advice: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the report as text."""
        lines = ["userfaultfd can be opened by"]
        lines += [f"  {way:<16} {reason or 'yes'}" for way, reason in self.refusals.items()]
        if self.capabilities is not None:
            lines += ["", f"  {'feature':<20} {'Linux':<10} here"]
            known = 0
            for feature, since in FEATURE_SINCE.items():
                known |= feature
                here = "yes" if self.capabilities.features & feature else "no"
                lines.append(f"  {feature.name:<20} {since:<10} {here}")
            if unknown := int(self.capabilities.features) & ~known:
                lines.append(f"  {f'unknown {unknown:#x}':<31} yes")
        lines += ["", *(f"  {name:<20} {value}" for name, value in self.facts.items()), ""]
        lines += [f"! {sentence}" for sentence in self.advice]
        lines.append("The main job can run." if self.ok else "The main job cannot run.")
        return lines


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        return f"unknown ({error.strerror})"


def _try(way: str, features: Feature = NO_FEATURES) -> str:
    try:
        if way == "user-mode-only":
            Userfaultfd(features, user_mode_only=True).close()
        else:
            Userfaultfd(features, opened_by=way).close()
    except UffdError as error:
        return str(error)
    except OSError as error:
        return f"no: {error.strerror}"
    return ""


def examine() -> Report:
    """Look at this machine, as this user. Opens and closes a few descriptors; changes nothing."""
    refusals = {way: _try(way) for way in ("syscall", "device", "user-mode-only")}
    advice: list[str] = []
    try:
        capabilities = probe()
    except UffdError as error:
        capabilities = None
        advice.append(str(error))
    full = not refusals["syscall"] or not refusals["device"]
    if capabilities is not None:
        wanted = Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.THREAD_ID | Feature.SIGBUS
        if missing := Feature(int(wanted) & ~int(capabilities.features)):
            advice.append(f"this kernel lacks {missing!r}, which a Monitor needs")
            full = False
        if not capabilities.features & Feature.POISON:
            advice.append("no POISON (Linux 6.6): a page that cannot be had leaves its toucher waiting")
    if capabilities is not None and refusals["syscall"] and refusals["device"]:
        advice.append(
            "only user mode: system calls on missing pages fail with EFAULT."
            " Set `sysctl vm.unprivileged_userfaultfd=1`, open /dev/userfaultfd to this user, or grant CAP_SYS_PTRACE;"
            " then a Monitor runs with its defaults"
        )
    if _try("syscall", Feature.EVENT_FORK) and _try("device", Feature.EVENT_FORK):
        advice.append('fork="serve" needs CAP_SYS_PTRACE')
    if native.reason():
        advice.append(f"no Monitor(engine=InThread()): {NativePartError(native.reason())}")
    free = _read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    facts = {
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "user": f"uid {os.geteuid()}",
        "sysctl": f"vm.unprivileged_userfaultfd = {_read('/proc/sys/vm/unprivileged_userfaultfd')}",
        "huge pages": f"{_read('/proc/sys/vm/nr_hugepages')} of the default size, {free} of 2 MiB free",
        "max_map_count": _read("/proc/sys/vm/max_map_count"),
        "KVM": "usable" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "not usable (/dev/kvm)",
        "part in C": f"not here: {native.reason()}" if native.reason() else "here: engine=InThread() can be used",
        "halt polling": f"guest_halt_poll_ns = {_read('/sys/module/haltpoll/parameters/guest_halt_poll_ns')}",
    }
    return Report(capabilities, refusals, full, facts, tuple(advice))


@click.command("doctor")
def command() -> int:
    """Tell what this kernel and this user can do, and what to change if that is too little."""
    report = examine()
    for line in report.lines():
        click.echo(line)
    return 0 if report.ok else 1
