"""How long layers of a model take, as they are and as torch's: what `explain` measures on request."""

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from fastseq.bench import Effort, device_of, take_turns

_EFFORT = Effort(seconds=0.3)  # for each layer as torch's, and as it is


def timed(
    model: nn.Module, example: Any, layers: dict[str, nn.Module], torchs: Callable[[nn.Module], nn.Module]
) -> dict[str, tuple[float, float]]:
    """Milliseconds of a call of each layer by name, as torch's and as it is, without gradients.

    Args:
        model: called once with the example, as it is, so that the layers' inputs are known.
        example: its input, or a tuple of its arguments.
        layers: those to measure, by name; what the call does not come to is left out.
        torchs: makes torch's layer of a copy of one.
    """
    inputs: dict[str, tuple[Any, Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        # Only the first call of a layer that is called more than once.
        return lambda _, args, kwargs: inputs.setdefault(name, (args, kwargs)) and None

    handles = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(*example if type(example) is tuple else (example,))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (args, kwargs) in inputs.items():
        twin = torchs(copy.deepcopy(layers[name]))
        calls = {who: partial(layer, *args, **kwargs) for who, layer in (("torch", twin), ("now", layers[name]))}
        with torch.no_grad():
            times = take_turns(calls, _EFFORT, device_of(twin, args))
        found[name] = (1e3 * median(times["torch"]), 1e3 * median(times["now"]))
    return found
