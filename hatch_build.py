"""Builds the native kernels with the package, which is installed without them where they cannot be built; adds to wheels what the package reads outside itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_spec = importlib.util.spec_from_file_location(
    "build_kernels", Path(__file__).parent / "llamafactory_kt/native/build.py"
)
assert _spec is not None and _spec.loader is not None
kernels = importlib.util.module_from_spec(_spec)  # without the package, which imports PyTorch
_spec.loader.exec_module(kernels)


TRAVELLING = ("examples/demo/model", "examples/demo/adapter", "docs/messages_zh.md")
"""what is outside the package, and read by it: llamafactory_kt/ground/travelling.py"""


class NativeKernels(BuildHookInterface):  # type: ignore[misc]
    """Hatchling's hook."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        return list(kernels.requirements())

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root, library, note = Path(self.root), kernels.LIBRARY, kernels.NOT_BUILT
        problem = kernels.build()
        if problem is None:
            note.unlink(missing_ok=True)
            build_data.update(pure_python=False, tag=f"py3-none-{kernels.platform_tag()}")
        else:
            library.unlink(missing_ok=True)
            note.write_text(problem)
            self.app.display_warning(f"Without the native kernels (slower): {problem}")
        build_data["artifacts"].append(str((library if problem is None else note).relative_to(root)))
        if version != "editable":  # which finds them where they are
            build_data["force_include"].update({path: f"llamafactory_kt/travelling/{path}" for path in TRAVELLING})
