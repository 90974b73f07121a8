"""What `fastseq bench` is asked to measure: a model by its path, and inputs by their shapes."""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.bench import UsageError, in_short

INPUT_GRAMMAR = (
    "an input is SHAPE[:DTYPE[<HIGH]], like 32x128 (float32, normal), 32x128:bfloat16, 8x64:bool "
    'or "10x4:int64<1000" (integers from 0 to 999, in quotes for the shell; below 2 unless given)'
)
_INPUT = re.compile(r"(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+)(?:<(?P<high>\d+))?)?")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class Input:
    """A tensor to call a model with, as `--input` describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    high: int = 2

    @classmethod
    def parse(cls, text: str) -> "Input":
        """Of SHAPE[:DTYPE[<HIGH]].

        Raises:
            UsageError: the text is not of this form, or the dtype is unknown.
        """
        found = _INPUT.fullmatch(text.strip())
        if found is None:
            raise UsageError(f"{text!r} is no input: {INPUT_GRAMMAR}")
        name = found["dtype"] or "float32"
        if name not in _DTYPES:
            raise UsageError(f"{text!r}: there is no dtype {name!r}; there are {', '.join(_DTYPES)}")
        dtype, high = _DTYPES[name], int(found["high"] or 2)
        if found["high"] and (dtype.is_floating_point or dtype == torch.bool):
            raise UsageError(f"{text!r}: only integers have a bound, not {name}; {INPUT_GRAMMAR}")
        if found["high"] and not 1 <= high <= torch.iinfo(dtype).max:
            raise UsageError(f"{text!r}: the bound must be from 1 to {torch.iinfo(dtype).max} for {name}")
        return cls(tuple(map(int, found["shape"].split("x"))), dtype, high)

    def tensor(self, generator: torch.Generator, device: str) -> Tensor:
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(device, self.dtype)
        return torch.randint(self.high, self.shape, generator=generator).to(device, self.dtype)


def make_inputs(specs: Sequence[Input], device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """A model's positional arguments.

    Raises:
        UsageError: they cannot be made, as when they do not fit into memory.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        return tuple(spec.tensor(generator, device) for spec in specs)
    except RuntimeError as error:
        shapes = ", ".join("x".join(map(str, spec.shape)) for spec in specs)
        raise UsageError(f"inputs of {shapes} cannot be made: {in_short(error)}") from error


def load(path: str, seed: int = 0) -> nn.Module:
    """The model at "module:attribute": what a function or class there returns when called without arguments, or the
    module that stands there. The current directory can be imported from.

    Raises:
        UsageError: there is no such module or attribute, it raises, or it is not a model.
    """
    name, colon, attributes = path.partition(":")
    if not (name and colon and attributes):
        raise UsageError(f"{path!r} is no model: it must be module:attribute, like my_module:make_model")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    torch.manual_seed(seed)
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"{name} cannot be imported: {_where(error)}") from error
        raise UsageError(f"there is no module {error.name!r} in {os.getcwd()} or among the installed ones") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name} cannot be imported: it raised {_where(error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            own = vars(found) if hasattr(found, "__dict__") else {}
            known = [n for n, value in own.items() if getattr(value, "__module__", None) == name and n[0] != "_"]
            has = f"; it has {', '.join(known[:10])}" if known else ""
            kind = "module " if found is sys.modules[name] else ""
            raise UsageError(f"{kind}{getattr(found, '__name__', found)!s} has no attribute {attribute!r}{has}")
        found = getattr(found, attribute)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UsageError(f"{path} must be a torch.nn.Module or a callable that makes one, it is {type(found).__name__}")
    torch.manual_seed(seed)  # imported before or not, the model is the same
    try:
        model = found()
    except Exception as error:
        raise UsageError(f"{path}, called without arguments, raised {_where(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{path} must return a torch.nn.Module, it returned {type(model).__name__}")
    return model


def _where(error: BaseException) -> str:
    """An error, and the line that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    at = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames[-1:] and len(frames) > 1 else ""
    return f"{in_short(error)}{at}"
