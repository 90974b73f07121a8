"""What fastseq's modules share: whether an op serves a call, or torch's own path."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight

from fastseq.ops.contract import computes_in, is_plain, requested, why_torch
from fastseq.ops.recurrent import Arguments, Recurrent
from fastseq.registry import BackendError, Op


def are_sound(weights: list[Any], dtype: torch.dtype, device: torch.device, autocast: bool) -> bool:
    """Whether weights are what an op can take beside an input; torch's path knows what to do with those of other kinds.

    `ExpandedWeight`, which torch.nn.utils computes gradients per sample with, is no instance of Tensor to an op.
    """
    for w in weights:
        if type(w) is not Parameter and (not isinstance(w, Tensor) or isinstance(w, ExpandedWeight)):
            return False
        if (w.dtype != dtype and not autocast) or w.device != device:
            return False
    return True


def cast(tensors: Any, dtype: torch.dtype) -> Any:
    """A tensor or None, or a list or tuple of such, in another dtype."""
    if isinstance(tensors, (list, tuple)):
        return type(tensors)([cast(t, dtype) for t in tensors])
    return None if tensors is None else tensors.to(dtype)


class Served(torch.nn.Module):
    """What fastseq's modules share, whichever class of torch's they extend."""

    note = ""  # for `explain`

    @property
    def table(self) -> Op:
        """The table of the op that serves this module."""
        raise NotImplementedError  # each module names its own

    @property
    def example(self) -> Tensor:
        """A tensor on the device and of the dtype on which it depends what serves this module."""
        # Wrappers that shard or replicate a model keep its weights as plain attributes.
        held = (t for module in self.modules() for t in (*module._parameters.values(), *vars(module).values()))
        return next((t for t in held if isinstance(t, Tensor)), torch.empty(0))

    def why_torch(self) -> str | None:
        """Why this module takes torch's path whatever its input, or None."""
        example = self.example
        return why_torch(self.table, example.device.type, example.dtype)

    def _as_torch(self, torchs_forward: Any, reason: str | None, *args: Any) -> Any:
        """The call of torch's own forward.

        Raises:
            BackendError: an implementation was asked for by name, but there is a reason why none serves.
        """
        if reason is not None and (name := requested(self.table.name)) is not None:
            raise BackendError(f"fastseq.nn.{type(self).__name__}: {name} was asked for but {reason}")
        return torchs_forward(*args)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script compiles in place of this module: torch's own, which shares everything with it."""
        theirs = next(base for base in type(self).__mro__ if base.__module__.startswith("torch.nn.modules."))
        twin: torch.nn.Module = object.__new__(theirs)
        twin.__dict__ = self.__dict__
        return twin

    def _node(self, *args: Any, **options: Any) -> Any:
        """This module as one node of the graph that torch.fx traces, as torch's own is; None where it traces nothing.

        Args:
            args: of forward, None for what was not given.
            options: by keyword, likewise.
        """
        proxy = next((x for x in args if isinstance(x, Proxy)), None)
        if proxy is None:
            return None
        tracer: Any = proxy.tracer
        given = {name: option for name, option in options.items() if option is not None}
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, given)

    def _weights(self, names: Iterable[str]) -> list[Any]:
        """The weights by name, wherever parametrizations, pruning or DataParallel have put them."""
        parameters = self._parameters
        return [parameters[n] if n in parameters else getattr(self, n) for n in names]


class ServedRecurrent(Served):
    """What fastseq's recurrent layers and cells share."""

    # Whether autocast gives its low precision back, as in torch, or float32.
    _autocast_lowers = True

    @property
    def op(self) -> Recurrent:
        """The op that serves this module."""
        raise NotImplementedError  # each module names its own

    @property
    def table(self) -> Op:
        return self.op.table

    def _split(self, state: Any) -> tuple[Any, Any] | None:
        """h and c of a state as users give it, or None if it is not one."""
        if state is None:
            return None, None
        if not self.op.has_cell:
            return state, None
        if type(state) is not tuple or len(state) != 2 or state[0] is None or state[1] is None:
            return None
        return state

    def _yields(self, arguments: Arguments) -> bool:
        """Whether torch's own forward shall have a plain call that comes to these arguments, checked or not.

        Others stay ours: they may want what torch's forward does not have, and torch.compile would unroll its steps.
        """
        if torch.compiler.is_compiling():
            return False
        x, h0, c0, weights, *_ = arguments
        rule = self.table.rule_for_torch(x.device.type, x.dtype)
        if rule is None or not is_plain(x, h0, c0, *weights) or torch._C._is_any_autocast_enabled():
            return False
        if any(w is None for w in weights):  # of which torch has something to say
            return False
        return rule(*arguments) is not None

    def _dtypes(self, x: Tensor, low: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
        """What a call on an input x, under autocast to `low` if any, computes in and returns."""
        if low is None:
            return computes_in(self.op.name, x.device.type, x.dtype), x.dtype
        return torch.float32, low if self._autocast_lowers else torch.float32
