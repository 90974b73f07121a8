"""How long layers of a model take, as they are and as torch's: what `explain` measures on request."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

_SECONDS = 0.3  # for each measurement


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
        before, after = (_milliseconds(module, args, kwargs) for module in (twin, layers[name]))
        found[name] = (before, after)
    return found


def _milliseconds(module: nn.Module, args: Any, kwargs: Any) -> float:
    with torch.no_grad():
        module(*args, **kwargs)  # what is done once is not counted
        timer = Timer(
            "module(*args, **kwargs)",
            globals={"module": module, "args": args, "kwargs": kwargs},
            num_threads=torch.get_num_threads(),
        )
        return 1e3 * timer.blocked_autorange(min_run_time=_SECONDS).median
