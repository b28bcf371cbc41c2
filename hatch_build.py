"""Has the C part (aiouffd/native) compiled when aiouffd is installed, where there is a C compiler.

Without one the install succeeds all the same: the package is pure then, and `Monitor(in_thread=True)` says what is
missing. The object serves each version of Python, so the wheel is tagged for the platform only.
"""

from __future__ import annotations

import runpy
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface[Any]):
    """Adds `aiouffd/native/libaiouffd.so` to the wheel; for an editable install, to the source tree."""

    PLUGIN_NAME = "custom"
    _directory: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, before the wheel is put together; `version` is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        native = Path(self.root) / "aiouffd" / "native"
        builder = runpy.run_path(str(native / "build.py"))
        name = builder["NAME"]
        if version == "editable":
            output = native / name
            output.unlink(missing_ok=True)  # one that a compiler left which is gone now would be out of date
        else:
            self._directory = tempfile.mkdtemp(prefix="aiouffd-")
            output = Path(self._directory) / name
        try:
            builder["build"](output)
        except builder["BuildError"] as error:
            self.app.display_warning(f"aiouffd is installed without its C part: {error}")
            return
        if version != "editable":
            build_data["force_include"][str(output)] = f"aiouffd/native/{name}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled, now that it is in the wheel."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
