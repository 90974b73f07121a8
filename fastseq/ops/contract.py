"""What the contracts of all ops share: the library that holds their schemas, and helpers for their autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

# The schemas live in Python, so that the ops exist where the extension does not.
LIBRARY = torch.library.Library("fastseq", "DEF")

# Entered by an op's autograd kernel when it calls the op again, to reach what computes.
below_autograd = torch._C._AutoDispatchBelowAutograd


def grads_or_none(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Differentiable gradients of `outputs` for the inputs that need one, None for the others."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
