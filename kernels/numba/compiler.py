"""Compiles a kernel when it is first needed, for one dtype, into a function of C; and keeps it in a folder on disk.

A kernel is a body, jitted, that gets a range of items and its arguments:

    class Arguments(NamedTuple):
        count: Size
        x: Elements
        y: Elements

    @jit
    def body(begin, end, call): ...

    kernel = Kernel("scale", body, Arguments)
    kernel.function(torch.float32)      # compiled, or found on disk

The arguments travel as a table of 64-bit words: numbers, and where tensors begin. So one signature serves every call.
"""

import ctypes
import hashlib
import platform
import sys
import threading
import time
from array import array
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, Generic, NewType, TypeVar

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, lower_getattr_generic, models, register_model
from torch import Tensor

from fastseq.jit import NUMBA, CompileError
from fastseq.kernels.numba.simd import I64, vector_bytes

# What a field of a kernel's arguments is: a number, or where a tensor begins, whose elements are of the kernel's dtype,
# int64, or bytes (booleans). None stands for a tensor that is not there: a null pointer.
Size = NewType("Size", int)
Number = NewType("Number", float)
Elements = NewType("Elements", Tensor)
Integers = NewType("Integers", Tensor)
Flags = NewType("Flags", Tensor)

_ELEMENT = {torch.float32: types.float32, torch.float64: types.float64}
SLOW_S = 2.0  # a compilation that takes longer says so

_lock = threading.RLock()

Function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
Call = TypeVar("Call", bound=tuple)


@cache
def folder() -> Path:
    """Where compiled kernels of this state of the sources are kept."""
    state = f"{NUMBA.build}/{platform.python_version()}/{vector_bytes()}"
    return NUMBA.folder / hashlib.sha256(state.encode()).hexdigest()[:16]


class Table(types.Type):
    """A call's arguments in a kernel: an address, whose words are attributes."""

    def __init__(self, fields: type[tuple], element: types.Float) -> None:
        kinds = {
            Size: types.int64,
            Number: types.float64,
            Elements: types.CPointer(element),
            Integers: types.CPointer(types.int64),
            Flags: types.CPointer(types.uint8),
        }
        self.fields = {name: kinds[kind] for name, kind in fields.__annotations__.items()}
        super().__init__(f"{fields.__module__}.{fields.__name__}({element})")


@register_model(Table)
class _TableModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Table) -> None:
        super().__init__(manager, kind, I64.as_pointer())


@infer_getattr
class _TableAttribute(AttributeTemplate):
    key = Table

    def generic_resolve(self, table: Table, name: str) -> types.Type | None:
        return table.fields.get(name)


@lower_getattr_generic(Table)
def _word(context: Any, builder: Any, table: Table, address: Any, name: str) -> Any:
    word = builder.load(builder.gep(address, [I64(list(table.fields).index(name))]))
    word.set_metadata("invariant.load", builder.module.add_metadata([]))  # whatever else is written
    kind = table.fields[name]
    if isinstance(kind, types.CPointer):
        return builder.inttoptr(word, context.get_value_type(kind))
    return builder.bitcast(word, ir.DoubleType()) if kind == types.float64 else word


def _unpacker(fields: type[tuple], element: types.Float) -> Any:
    """An intrinsic that takes an address for a table."""
    table = Table(fields, element)

    @intrinsic
    def unpack(typing_context, address):
        def build(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], I64.as_pointer())

        return table(types.voidptr), build

    return unpack


def _entry(begin, end, address):
    body(begin, end, unpack(address))  # noqa: F821  (they are in the function's own globals)


class Kernel(Generic[Call]):
    """A jitted body and the arguments that it takes.

    Args:
        name: tells it from all others.
        body: called with a range of items (or of a team's members) and the arguments.
        fields: a NamedTuple whose annotations say what each argument is.
    """

    def __init__(self, name: str, body: Any, fields: type[Call]) -> None:
        self.name, self.body, self.fields = name, body, fields
        self._numbers = [i for i, kind in enumerate(fields.__annotations__.values()) if kind is Number]
        self._functions: dict[torch.dtype, Any] = {}
        self._kept: list[Any] = []  # what the functions need to stay alive

    def function(self, dtype: torch.dtype) -> Any:
        """The compiled function, callable from Python and passed to C as it is: (int64 begin, int64 end, void*)."""
        try:
            return self._functions[dtype]
        except KeyError:
            return self._compiled(dtype)

    def table(self, call: Call) -> array:
        """The arguments as the function reads them."""
        words = [value if type(value) is int else _address(value) for value in call]
        for i in self._numbers:
            words[i] = int.from_bytes(array("d", [words[i]]).tobytes(), sys.byteorder, signed=True)
        return array("q", words)

    def _compiled(self, dtype: torch.dtype) -> Any:
        with _lock:
            if dtype in self._functions:
                return self._functions[dtype]
            name = f"{self.name}-{str(dtype).removeprefix('torch.')}"
            # Of its own globals, not of a closure, since numba's cache knows closures apart by what differs from one
            # process to the next.
            names = {"body": self.body, "unpack": _unpacker(self.fields, _ELEMENT[dtype]), "__name__": __name__}
            entry = FunctionType(_entry.__code__, names, name.replace("-", "_"))
            signature = types.void(types.int64, types.int64, types.voidptr)
            try:
                with _Told(self.name, dtype), _Folder(folder() / name):
                    compiled = numba.cfunc(signature, cache=True, error_model="numpy")(entry)
            except Exception as error:  # the folder's, too
                raise CompileError(f"{self.name}: {type(error).__name__}: {error}") from error
            self._kept.append(compiled)
            function = Function(compiled.address)
            self._functions[dtype] = function
            return function


def _address(value: Any) -> Any:
    """Of a tensor's elements, 0 if there are none; of a number itself."""
    return 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value


class _Folder:
    """While numba looks for where to keep what it compiles, that is a folder of ours: one for each kernel, so that
    processes that compile different ones at the same time never write the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.before = numba.config.CACHE_DIR
        self.path.mkdir(parents=True, exist_ok=True)
        numba.config.CACHE_DIR = str(self.path)

    def __exit__(self, *_: Any) -> None:
        numba.config.CACHE_DIR = self.before


class _Told:
    """Says on stderr that something is being compiled, if it takes a while."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.what = f"fastseq: numba compiles {name} for {str(dtype).removeprefix('torch.')}, once on this machine"
        self.timer = threading.Timer(SLOW_S, self._tell)
        self.timer.daemon = True
        self.told = False

    def _tell(self) -> None:
        self.told = True
        print(f"{self.what} ...", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> None:
        self.start = time.monotonic()
        self.timer.start()

    def __exit__(self, *_: Any) -> None:
        self.timer.cancel()
        if self.told:
            print(f" {time.monotonic() - self.start:.1f} s", file=sys.stderr, flush=True)
