"""Compiles the quantizer kernels where a compiler and the processor allow it.

The package works without them, with ggml's own quantizers: a failure is a warning here, and
`pi-convert doctor` tells which are in use.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "native/kquants.cpp"
FOLDER = "converters/ggml"  # where the package looks for them
# Contraction would change results: with it 0.5 % of q4_K's bytes are others. See native/lanes.hpp.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
         "-fPIC", "-shared")  # fmt: skip
INSTRUCTION_SETS = {"avx2": ("-mavx2", "-mf16c"), "avx512": ("-mavx512f", "-mf16c")}


class CompileKernels(BuildHookInterface):  # type: ignore[type-arg]
    """hatchling's hook; it runs for wheels and for editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the libraries that could be compiled to the wheel, and its platform to its tag."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return
        made = [path for name in INSTRUCTION_SETS if (path := self._compiled(name))]
        if made:
            build_data["artifacts"] += made
            build_data["pure_python"] = False
            system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{system}"

    def _compiled(self, name: str) -> str | None:
        root, out = Path(self.root), f"{FOLDER}/_kquants_{name}.so"
        compiler = os.environ.get("CXX", "c++")
        (root / out).unlink(missing_ok=True)
        if shutil.which(compiler) is None:
            self.app.display_warning(f"no C++ compiler ({compiler}): K-quants will be ggml's own")
            return None
        command = (compiler, *FLAGS, *INSTRUCTION_SETS[name], SOURCE, "-o", out)
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if result.returncode:
            self.app.display_warning(f"{' '.join(command)} failed:\n{result.stderr}")
            return None
        return out
