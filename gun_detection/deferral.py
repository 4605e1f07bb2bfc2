"""What PyTorch's libraries load at once and the platform hardly ever needs, left for later.

torchvision's RoI align takes one function from PyTorch's compiler, and with it loads the compiler,
SymPy and what trains on many machines: nearly half of what a process that scores takes to start,
and a sixth of its memory. The function is asked for deterministic training on GPUs alone.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_LOADED_BY = "torchvision.ops.roi_align"
_MODULE = "torch._dynamo.utils"
_FUNCTION = "is_compile_supported"


class _StandIn(ModuleType):
    """In the place of the module while torchvision takes the function from it."""

    def __getattr__(self, name: str) -> Any:
        if name == _FUNCTION:
            return lambda device: getattr(importlib.import_module(_MODULE), _FUNCTION)(device)
        if name.startswith("__"):
            # Imports ask what kind of module it is.
            raise AttributeError(name)
        # Another version of torchvision takes more: it gets what it would without this.
        sys.modules.pop(_MODULE, None)
        return getattr(importlib.import_module(_MODULE), name)


class CompilerOnDemand:
    """A finder of modules, for `sys.meta_path`: PyTorch's compiler is loaded when it is called."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module that loads the compiler, in a way that does not; None for all others."""
        if name != _LOADED_BY or _MODULE in sys.modules:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            stand_in = sys.modules[_MODULE] = _StandIn(_MODULE)
            try:
                execute(module)
            finally:
                if sys.modules.get(_MODULE) is stand_in:
                    del sys.modules[_MODULE]

        # Of this loader alone: every module has its own.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
