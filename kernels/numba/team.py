"""Threads for a kernel: torch's own, so that its number of threads, its pools and its rules after a fork hold here.

`run` hands a range of independent items to them. `run_team` starts a team whose members wait for each other at
barriers; a member's body begins with `join`.
"""

import ctypes
import os
import sys
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastseq.kernels.numba.compiler import Call, Kernel
from fastseq.kernels.numba.jit import jit
from fastseq.kernels.numba.simd import I32

MOST_MEMBERS = 64
_LINE = 16  # 64-bit words between what different threads write
_PRESENT, _SIZE, _TURNS = 0, _LINE, 2 * _LINE
_CLOSED = 1 << 40
_SPINS = 4096  # before a thread that waits yields, since the one that it waits for may not be running


_is_fork = False  # of a process that had threads, which the pool of torch's OpenMP still waits for


def _forked() -> None:
    global _is_fork
    _is_fork = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@cache
def _parallel_for() -> Any:
    """torch's function of C, from its stable interface since 2.10; None if there is none."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).torch_parallel_for
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    return function


def threads() -> int:
    """How many threads a call may have."""
    return 1 if _is_fork or _parallel_for() is None else torch.get_num_threads()


def run(kernel: Kernel[Call], dtype: torch.dtype, call: Call, items: int, grain: int = 1) -> None:
    """Calls the kernel's body for the items [0, items), in ranges of at least `grain`, on torch's threads."""
    _start(kernel.function(dtype), kernel.table(call), items, grain)


def run_team(kernel: Kernel[Call], dtype: torch.dtype, call: Call, members: int) -> None:
    """Calls the kernel's body for a team of up to so many members; its last field is the team, given as 0."""
    function, members = kernel.function(dtype), min(members, MOST_MEMBERS)
    team = array("q", bytes(8 * (_TURNS + members * _LINE)))
    table = kernel.table(call)
    table[-1] = team.buffer_info()[0]
    _start(function, table, members, 1)


def _start(function: Any, table: array, items: int, grain: int) -> None:
    if items <= grain or threads() == 1:
        if items > 0:
            function(0, items, table.buffer_info()[0])
    elif _parallel_for()(0, items, grain, function, table.buffer_info()[0]) != 0:
        raise RuntimeError("torch_parallel_for failed")


# Within kernels.


@intrinsic
def fetch_add(typing_context, base, index, value):
    def build(context, builder, signature, arguments):
        base, index, value = arguments
        return builder.atomic_rmw("add", builder.gep(base, [index]), value, "acq_rel")

    return types.int64(base, types.int64, types.int64), build


@intrinsic
def _load_acquire(typing_context, base, index):
    def build(context, builder, signature, arguments):
        return builder.load_atomic(builder.gep(arguments[0], [arguments[1]]), "acquire", 8)

    return types.int64(base, types.int64), build


@intrinsic
def _store_release(typing_context, base, index, value):
    def build(context, builder, signature, arguments):
        base, index, value = arguments
        builder.store_atomic(value, builder.gep(base, [index]), "release", 8)
        return context.get_dummy_value()

    return types.void(base, types.int64, types.int64), build


@intrinsic
def _pause(typing_context):
    """Tells the processor that this thread waits, if it knows a word for that."""
    name, arguments = {
        "x86_64": ("llvm.x86.sse2.pause", []),
        "aarch64": ("llvm.aarch64.hint", [I32(1)]),
    }.get(os.uname().machine if hasattr(os, "uname") else "", ("", []))

    def build(context, builder, signature, _):
        if name:
            kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
            builder.call(_declared(builder, kind, name), arguments)
        return context.get_dummy_value()

    return types.void(), build


def _declared(builder: Any, kind: ir.FunctionType, name: str) -> Any:
    module = builder.module
    return module.globals[name] if name in module.globals else ir.Function(module, kind, name)


@intrinsic
def _yield(typing_context):
    def build(context, builder, signature, _):
        if os.name == "posix":
            builder.call(_declared(builder, ir.FunctionType(I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), build


@jit
def _wait(team, index, value):
    """Until the word there is at least the value."""
    spins = 0
    while _load_acquire(team, index) < value:
        if spins < _SPINS:
            spins += 1
            _pause()
        else:
            _yield()


@jit
def join(team, begin, end, members):
    """The caller's rank in the team, or -1 if it has come too late; called by each with the range that it got.

    torch hands out its range as it likes: to fewer threads than asked for, all of it to one, or parts of it late. So
    the team is whoever answers the roll call: the first one waits a bounded time for the others, then closes the call.
    Barriers inside the team are safe because every member is running.
    """
    expected = (members + end - begin - 1) // (end - begin)
    rank = fetch_add(team, _PRESENT, 1)
    if rank >= _CLOSED:
        return -1
    if rank == 0:
        spins = 0
        while _load_acquire(team, _PRESENT) < expected and spins < _SPINS:
            spins += 1
            _pause()
        _store_release(team, _SIZE, fetch_add(team, _PRESENT, _CLOSED))
    else:
        _wait(team, _SIZE, 1)
    return rank


@jit
def size(team):
    """How many members have joined."""
    return _load_acquire(team, _SIZE)


@jit
def barrier(team, rank, first, count):
    """Waits until the members first..first+count-1 have all come here equally often; the caller is one of them."""
    if count == 1:
        return
    mine = _TURNS + rank * _LINE
    turn = team[mine] + 1
    _store_release(team, mine, turn)
    for other in range(first, first + count):
        _wait(team, _TURNS + other * _LINE, turn)


@jit
def share(count, member, members):
    """Where the part of a member begins, of so many things; it ends where the next one's begins."""
    return count * member // members


@jit
def take(counter):
    """The next of items that threads take one after the other; `counter` is 0 at first."""
    return fetch_add(counter, 0, 1)
