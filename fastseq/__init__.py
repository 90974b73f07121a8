"""fastseq makes existing PyTorch sequence models fast: `model = fastseq.accelerate(model)`.

Importing it changes nothing in torch.
"""

from fastseq import nn, ops
from fastseq.accelerate import accelerate, explain, restore
from fastseq.registry import BackendError, use_backend
from fastseq.version import __version__

__all__ = ["BackendError", "__version__", "accelerate", "explain", "nn", "ops", "restore", "use_backend"]
