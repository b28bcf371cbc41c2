"""The build hook: compiles the native part (aiouffd/native) into the wheel, or into the tree for an editable install.

The shared object links with libc alone and has no Python.h, so that one wheel serves every version of Python; its tag
names the platform only. Without a C compiler the build succeeds and the wheel is pure Python: aiouffd then raises
`NativePartError` where the native part is needed.

`AIOUFFD_WHEEL_PLATFORM` overrides the platform of the tag, for a compiler (`CC`) with another target: see
tools/wheels.py. The build then fails where the native part cannot be compiled.
"""

from __future__ import annotations

import os
import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface[Any]):
    """Adds `aiouffd/native/libaiouffd.so` to the wheel."""

    PLUGIN_NAME = "custom"
    _directory: tempfile.TemporaryDirectory[str] | None = None  # goes with the hook, also where the build fails

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the native part before the wheel is written; `version` is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        native = Path(self.root) / "aiouffd" / "native"
        builder = runpy.run_path(str(native / "build.py"))
        name = builder["NAME"]
        if version == "editable":
            output = native / name
            output.unlink(missing_ok=True)  # if the compiler has gone, an earlier build may be out of date
        else:
            self._directory = tempfile.TemporaryDirectory(prefix="aiouffd-")
            output = Path(self._directory.name) / name
        platform = os.environ.get("AIOUFFD_WHEEL_PLATFORM", "")
        try:
            builder["build"](output)
        except builder["BuildError"] as error:
            if platform:
                raise
            self.app.display_warning(f"aiouffd is installed without its native part: {error}")
            return
        if version != "editable":
            build_data["force_include"][str(output)] = f"aiouffd/native/{name}"
        build_data["pure_python"] = False
        platform = platform or sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the compiled file, which is in the wheel now."""
        if self._directory is not None:
            self._directory.cleanup()
