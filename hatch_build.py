"""Compiles what is in native/ where a compiler and the processor allow it.

The package works without: with ggml's own quantizers, and its arrays where malloc puts them. A
failure is a warning here, and `pi-convert doctor` tells which quantizers are in use.
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
# Library, its source, flags of its own, and what is missing without it.
LIBRARIES = (
    *((f"_kquants_{name}", SOURCE, flags, "K-quants will be ggml's own")
      for name, flags in INSTRUCTION_SETS.items()),
    ("_aligned_new", "native/aligned_new.cpp", (), "llama.cpp will run slower"),
)  # fmt: skip


class CompileKernels(BuildHookInterface):  # type: ignore[type-arg]
    """hatchling's hook; it runs for wheels and for editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the libraries that could be compiled to the wheel, and its platform to its tag."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return
        made = [path for library in LIBRARIES if (path := self._compiled(*library))]
        if made:
            build_data["artifacts"] += made
            build_data["pure_python"] = False
            system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{system}"

    def _compiled(self, name: str, source: str, flags: tuple[str, ...], without: str) -> str | None:
        root, out = Path(self.root), f"{FOLDER}/{name}.so"
        compiler = os.environ.get("CXX", "c++")
        (root / out).unlink(missing_ok=True)
        if shutil.which(compiler) is None:
            self.app.display_warning(f"no C++ compiler ({compiler}): {without}")
            return None
        command = (compiler, *FLAGS, *flags, source, "-o", out)
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if result.returncode:
            self.app.display_warning(f"{' '.join(command)} failed: {without}\n{result.stderr}")
            return None
        return out
