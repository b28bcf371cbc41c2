"""`cli.doctor`: what it says on machines of each kind."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from typing import NoReturn

import pytest
from scenario import play

from aiouffd import Feature, Ioctl, native
from aiouffd.cli import doctor
from aiouffd.kernel import abi, userfaultfd
from aiouffd.kernel.userfaultfd import REMEDY, Capabilities

MONITORS = ["Monitor(), with its defaults", "Monitor(engine=InThread())", "Monitor(user_mode_only=True)"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to drop it")


def nobody(dumpable: bool) -> None:
    """Scenario."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    assert ctypes.CDLL(None).prctl(4, int(dumpable), 0, 0, 0) == 0
    report = doctor.examine()
    assert not report.ok
    assert [report.monitors[name] for name in MONITORS] == ["cannot run: not permitted", "", ""]
    text = "\n".join(report.lines())
    assert text.count("vm.unprivileged_userfaultfd=1") == 1
    for words in ("CAP_SYS_PTRACE", "/dev/userfaultfd", "InThread", "user_mode_only=True", "seccomp"):
        assert words in REMEDY
    assert REMEDY in text
    assert "Monitor(user_mode_only=True)   can run" in text


@needs_root
@pytest.mark.parametrize("dumpable", [True, False])
def test_an_unprivileged_user_learns_what_works(dumpable: bool) -> None:
    """InThread and user mode only can run; the remedy for the rest stands there once."""
    play(nobody, dumpable)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without /dev/userfaultfd, as before Linux 6.1 and in containers."""

    def missing(_: int) -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/dev/userfaultfd")

    monkeypatch.setattr(userfaultfd, "_open_by_device", missing)


@pytest.mark.usefixtures("no_device")
def test_a_kernel_without_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and what may be the reason."""
    monkeypatch.setattr(abi, "SYS_USERFAULTFD", 100_000)
    report = doctor.examine()
    assert not report.ok
    assert report.capabilities is None
    assert set(report.monitors.values()) == {"cannot run: no userfaultfd can be opened"}
    text = "\n".join(report.lines())
    assert "CONFIG_USERFAULTFD, or a seccomp filter" in text
    assert "/dev/userfaultfd (Linux 6.1)" in text


def test_any_other_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening fails with an error of no type of ours: it is reported like the others."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(userfaultfd, "_open", refuse)
    report = doctor.examine()
    assert "Input/output error" in report.refusals["syscall"]
    assert "opening a userfaultfd: Input/output error" in report.advice


def test_an_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it lacks is named: what a Monitor needs, and POISON; unknown features are listed."""
    features = abi.LAYOUT_EVENTS | Feature.THREAD_ID | Feature(1 << 50)
    monkeypatch.setattr(doctor, "probe", lambda: Capabilities(features, Ioctl.API, "syscall"))
    report = doctor.examine()
    assert "SIGBUS" in report.monitors[MONITORS[0]]
    text = "\n".join(report.lines())
    assert "no POISON (Linux 6.6)" in text
    assert f"unknown {1 << 50:#x}" in text


def test_no_native_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """InThread cannot run, and a compiler is the remedy."""
    monkeypatch.setattr(native, "reason", lambda: "none was built: install a C compiler")
    report = doctor.examine()
    assert report.monitors[MONITORS[1]] == "cannot run: there is no native part"
    assert any("install a C compiler" in sentence for sentence in report.advice)
    assert report.facts["native part"] == "missing: none was built: install a C compiler"


def test_python_and_its_loop_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without uvloop it is asyncio's; whether there is a GIL counts at run time."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert doctor.examine().facts["event loop"] == "asyncio's (uvloop is not installed)"
    for gil, said in ((True, "with a GIL"), (False, "without a GIL")):
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda gil=gil: gil, raising=False)
        assert doctor.examine().facts["Python"] == f"{platform.python_version()}, {said}"
