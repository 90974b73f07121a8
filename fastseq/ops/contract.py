"""What the contracts of all ops share: the library that holds their schemas, whether an op of ours serves a call, and
helpers for their autograd.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastseq.dynamo import assume_constant_result
from fastseq.registry import FLOATS, HALF, OPS, Op

# The schemas live in Python, so that the ops exist where the extension does not.
LIBRARY = torch.library.Library("fastseq", "DEF")

# Entered by an op's autograd kernel when it calls the op again, to reach what computes.
below_autograd = torch._C._AutoDispatchBelowAutograd


def implement(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    autograd: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
) -> None:
    """Gives the ops `name` and `name_backward`, whose schemas are defined, what runs on tensors of each kind."""
    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"fastseq::{name}", forward_fake, lib=LIBRARY)
    torch.library.register_fake(f"fastseq::{name}_backward", backward_fake, lib=LIBRARY)


_PLAIN = {Tensor, torch.nn.Parameter}
_KNOWN = FLOATS | HALF

Some = TypeVar("Some", bound=tuple)


# Dynamo cannot look into the choice of an implementation, and need not: it does not change between a trace and its use.
@assume_constant_result
def requested(op: str) -> str | None:
    """The implementation of the op that is asked for by name, or None."""
    return OPS[op].requested()


@assume_constant_result
def _is_served(op: str, device: str, dtype: torch.dtype) -> bool:
    """Whether something better than the reference serves the op, or an implementation is asked for by name."""
    return OPS[op].requested() is not None or OPS[op].preferred(device, dtype) is not OPS[op].reference


@assume_constant_result
def computes_in(op: str, device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the op that serves tensors of this dtype: half precision in float32, unless a kernel takes it."""
    return OPS[op].computes_in(device, dtype)


def why_torch(op: Op, device: str, dtype: torch.dtype) -> str | None:
    """Why torch's path serves tensors of this kind, or None."""
    if _is_served(op.name, device, computes_in(op.name, device, dtype)):
        return None
    return f"no kernel for {str(dtype).removeprefix('torch.')} on {device} here"


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but a kernel wants to see a call on these: no tracing, no mode, no transform, no tensor subclass,
    and no view that stands for the negative of what is in memory.

    Such a call can go to the kernel at once, which spares the dispatcher's two calls of Python: at one step a call,
    they would take longer than the kernel.
    """
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg()):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_small(op: str, size: int, least: int, x: Tensor) -> bool:
    """Whether a call on x is torch's, being of less than the least size at which ours is ahead: on a CPU, in float32 or
    float64, unless an implementation is asked for by name.
    """
    return size < least and x.device.type == "cpu" and x.dtype in FLOATS and requested(op) is None


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that dtype. `Tensor.to` takes a while to find out that there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward: it has hooks, or a forward set on it alone."""
    return "forward" in module.__dict__ or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_transformed(*grads: Tensor) -> bool:
    """Whether only the reference can serve: under torch.func's transforms, forward-mode AD, batched gradients."""
    if torch.compiler.is_compiling():
        return False
    if any(torch._C._functorch.is_legacy_batchedtensor(g) for g in grads):
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for in a call on x, or None: it leaves float64 alone."""
    if x.dtype == torch.float64 or not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_tensor(name: str, t: Any, x: Tensor | None = None) -> None:
    """Raises unless t is a dense tensor of a dtype that kernels know, and on the device of x."""
    if not isinstance(t, Tensor) or t.layout != torch.strided or t.is_nested:
        kind = type(t).__name__ if not isinstance(t, Tensor) else "a nested one" if t.is_nested else t.layout
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if t.dtype not in _KNOWN:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
    if x is not None and t.device != x.device:
        raise ValueError(f"{name} must be on x's device, {x.device}, got {t.device}")


def check_dropout(dropout_p: Any, training: Any) -> None:
    """Raises unless a function's options of dropout are what they shall be."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {dropout_p!r}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if type(training) is not bool:
        raise TypeError(f"training must be a bool, got {training!r}")


def new_seed(dropout_p: float) -> Tensor | None:
    """What dropout draws from, out of torch's default generator of the CPU; None without dropout."""
    return torch.randint(2**63 - 1, (), device="cpu") if dropout_p > 0 else None


def grads_through(
    forward: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    rest: Sequence[Any],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Differentiable gradients of the inputs that need one, None for the others, through forward, a reference.

    It is called with inputs and rest; grads are those of its first outputs, or of its only one, None where there is
    none.
    """
    with torch.enable_grad():
        # Of their own, since one input may depend on another, whose share must not be counted twice.
        own = [None if t is None else t.view_as(t) for t in inputs]
        made = forward(*own, *rest)
        made = (made,) if isinstance(made, Tensor) else made
        given = [(output, grad) for output, grad in zip(made, grads, strict=False) if grad is not None]
        wanted = [t for t, need in zip(own, needs, strict=True) if need and t is not None]
        outputs, given_grads = zip(*given, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given_grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def widened(arguments: Some) -> Some:
    """An op's arguments in float64, those in lists, too."""

    def wide(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [wide(v) for v in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return type(arguments)(*map(wide, arguments))


def rounding(exact: Tensor, dtype: torch.dtype, steps: int, tf32: bool = False) -> dict[str, Any]:
    """Tolerances for what half precision, or float32 multiplied as TF32, makes of results: so many of its steps, those
    of the largest element at most. None for what is computed exactly.
    """
    if dtype not in HALF and not (tf32 and dtype == torch.float32):
        return {}
    eps = steps * torch.finfo(dtype if dtype in HALF else torch.float16).eps  # TF32 has as many digits as float16
    finite = exact[exact.isfinite()]
    return dict(rtol=eps, atol=eps * max(1.0, finite.abs().max().item() if finite.numel() else 0.0))
