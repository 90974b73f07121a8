"""What torch.compile must be told about our modules, without importing torch._dynamo (over a second) to say it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)

_CONFIG = "torch._dynamo.config"


def assume_constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, whose only effect is this mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def allow_rnn() -> None:
    """Sets `torch._dynamo.config.allow_rnn`, now or, if torch._dynamo is not loaded yet, when it is."""
    if _CONFIG in sys.modules:
        _set(sys.modules[_CONFIG])
    elif not any(isinstance(finder, _SetOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SetOnImport())


def _set(config: ModuleType) -> None:
    config.allow_rnn = True  # type: ignore[attr-defined]


class _SetOnImport(MetaPathFinder):
    """Sets the option when torch._dynamo.config has been imported, then is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_set(module: ModuleType) -> None:
                execute(module)
                _set(sys.modules[fullname])

            spec.loader.exec_module = execute_and_set  # type: ignore[method-assign]
        return spec
