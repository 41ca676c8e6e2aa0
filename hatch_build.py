"""The build hook: with SGLANG_ROUTER_COMPILE=1, a wheel holds the hot path compiled by mypyc.

    pip install .                            pure Python; needs no compiler
    SGLANG_ROUTER_COMPILE=1 pip install .    compiled; needs a C compiler and the headers of Python

Without the variable this does nothing, and asks for nothing. An editable installation is always pure. A source
distribution is pure as well, and both kinds of wheel can be built from it. scripts/compile.py does the work, and
scripts/compile_rule.py says which modules are compiled.

The plugin hatch-mypyc is not used: it would need its own list of modules beside that rule, and it compiles with
setuptools, which takes the C files of a library one after the other, on one core.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "SGLANG_ROUTER_COMPILE"
COMPILERS = ["mypy>=2.4,<2.5", "setuptools>=65"]
"""mypyc is part of mypy. Another version may make other code, or refuse ours: test it before it goes in here."""


def wanted() -> bool:
    """Return whether the variable asks for a compiled wheel. Ends the build for a value that is neither."""
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "0", "1"):
        sys.exit(f"error: {VARIABLE}={asked}: it must be 1, for a compiled wheel, or 0")
    return asked == "1"


class CompiledWheel(BuildHookInterface[Any]):
    """Adds the compiled modules to a wheel."""

    def dependencies(self) -> list[str]:
        """Return what must be installed to build: with mypyc, also the packages whose types the sources use."""
        return [*COMPILERS, *self.metadata.core.dependencies, "types-pyyaml"] if wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, before the wheel is packed. If that fails, the build ends with what the compiler said last."""
        if version == "editable" or not wanted():
            return
        self.folder = tempfile.TemporaryDirectory(prefix="sglang-router-wheel-")
        made = Path(self.folder.name)
        # It must find `scripts` in the folder it runs in, which this variable takes from Python's path.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        command = [sys.executable, "-m", "scripts.compile", str(made)]
        if subprocess.run(command, cwd=self.root, env=environment, check=False).returncode:  # noqa: S603
            sys.exit(1)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"].update({str(path): str(path.relative_to(made)) for path in made.rglob("*.*")})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the compiled modules, which are in the wheel now."""
        if not build_data["pure_python"]:
            self.folder.cleanup()
