"""fastseq makes existing PyTorch sequence models fast: `model = fastseq.accelerate(model)`.

Importing it changes nothing in torch.
"""

from fastseq import functional, nn
from fastseq.accelerate import accelerate, explain, restore
from fastseq.registry import BackendError, use_backend
from fastseq.routing import route_attention, routed_attention
from fastseq.version import __version__

__all__ = [
    "BackendError",
    "__version__",
    "accelerate",
    "explain",
    "functional",
    "nn",
    "restore",
    "route_attention",
    "routed_attention",
    "use_backend",
]
