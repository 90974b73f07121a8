"""fastseq makes existing PyTorch sequence models fast: `model = fastseq.accelerate(model)`.

Importing it changes nothing in torch.
"""

import importlib
from types import ModuleType

from fastseq import decoding, functional, nn
from fastseq.accelerate import accelerate, explain, restore
from fastseq.registry import BackendError, use_backend
from fastseq.routing import route_attention, routed_attention
from fastseq.version import __version__

__all__ = [
    "BackendError",
    "__version__",
    "accelerate",
    "decoding",
    "explain",
    "functional",
    "nn",
    "restore",
    "route_attention",
    "routed_attention",
    "use_backend",
]


def __getattr__(name: str) -> ModuleType:
    """What not everybody needs is imported when it is first used."""
    if name in ("models", "schedules"):
        return importlib.import_module(f"fastseq.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
