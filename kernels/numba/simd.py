"""Vectors for numba: a type as wide as the CPU's registers, pointers, and what kernels do with them.

A kernel says what goes into which register, and LLVM has nothing left to guess: sums stay in registers, a*b + c becomes
one instruction, and the end of a row is read and written under a mask. All of it lives in jitted functions only:

    @jit
    def scale(x, by, y, count):
        for i in range(0, count, lanes(x)):
            n = min(lanes(x), count - i)
            store(y, i, load(x, i, n) * by, n)

`x` is a pointer (numba's CPointer) to float32 or float64, which says how many lanes a vector of its elements has. There
are no bounds to fall back on: who calls says how far a pointer reaches.
"""

import math
import operator
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, typing
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, overload, register_model

from fastseq.kernels.numba.jit import OPTIONS, part

I32, I64 = ir.IntType(32), ir.IntType(64)
_FLAGS = ("contract", "nsz")  # a*b + c may be one instruction, and nobody asks for the sign of a zero


@cache
def vector_bytes() -> int:
    """The width of the CPU's registers, or of those that FASTSEQ_CPU_ISA asks for."""
    features = llvm.get_host_cpu_features()
    asked = os.environ.get("FASTSEQ_CPU_ISA", "")
    if features.get("avx512f") and asked in ("", "avx512"):
        return 64
    return 32 if features.get("avx2") and asked != "portable" else 16


class Vector(types.Type):
    """As many elements as fit into a register."""

    def __init__(self, element: types.Float) -> None:
        self.element = element
        self.lanes = vector_bytes() * 8 // element.bitwidth
        super().__init__(f"Vector({element}, {self.lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(manager[kind.element].get_value_type(), kind.lanes))


def _vector(pointer: Any) -> Vector | None:
    """The vector of what a type points to."""
    if isinstance(pointer, types.CPointer) and isinstance(pointer.dtype, types.Float):
        return Vector(pointer.dtype)
    return None


# Values of LLVM, while it is built.


def _llvm(context: Any, kind: Vector) -> ir.VectorType:
    return context.get_value_type(kind)


def _splat(builder: Any, kind: ir.VectorType, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    mask = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask)


def _constant(kind: ir.VectorType, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _load(builder: Any, pointer: Any, offset: Any, kind: ir.VectorType) -> Any:
    at = builder.bitcast(builder.gep(pointer, [offset]), kind.as_pointer())
    loaded = builder.load(at)
    loaded.align = _size(kind.element)
    return loaded


def _store(builder: Any, pointer: Any, offset: Any, value: Any) -> None:
    at = builder.bitcast(builder.gep(pointer, [offset]), value.type.as_pointer())
    builder.store(value, at).align = _size(value.type.element)


def _size(element: ir.Type) -> int:
    return 8 if isinstance(element, ir.DoubleType) else 4


def _mask(builder: Any, count: Any, lanes: int) -> Any:
    """Which lanes come before the count-th."""
    numbers = ir.VectorType(I32, lanes)
    counts = _splat(builder, numbers, builder.trunc(count, I32))
    return builder.icmp_signed("<", ir.Constant(numbers, list(range(lanes))), counts)


def _suffix(kind: ir.VectorType) -> str:
    return f"v{kind.count}f{8 * _size(kind.element)}"


def _call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in arguments]), name
    )
    return builder.call(function, arguments)


def _masked_load(builder: Any, pointer: Any, offset: Any, kind: ir.VectorType, count: Any) -> Any:
    at = builder.bitcast(builder.gep(pointer, [offset]), kind.as_pointer())
    align, mask = I32(_size(kind.element)), _mask(builder, count, kind.count)
    name = f"llvm.masked.load.{_suffix(kind)}.p0"
    return _call(builder, name, kind, at, align, mask, ir.Constant(kind, None))


def _masked_store(builder: Any, pointer: Any, offset: Any, value: Any, count: Any) -> None:
    at = builder.bitcast(builder.gep(pointer, [offset]), value.type.as_pointer())
    align, mask = I32(_size(value.type.element)), _mask(builder, count, value.type.count)
    _call(builder, f"llvm.masked.store.{_suffix(value.type)}.p0", ir.VoidType(), value, at, align, mask)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FLAGS), c, flags=_FLAGS)


# Pointers.


@intrinsic
def at(typing_context, base, offset):
    """The pointer so many elements further."""

    def build(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return base(base, types.int64), build


@intrinsic
def is_null(typing_context, base):
    def build(context, builder, signature, arguments):
        return builder.icmp_unsigned("==", builder.ptrtoint(arguments[0], I64), I64(0))

    return types.boolean(base), build


@intrinsic
def null(typing_context, base):
    """A null pointer to what this points to."""

    def build(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(base), None)

    return base(base), build


# Vectors from and to memory.


@intrinsic
def lanes(typing_context, base):
    """How many elements a vector has of what this points to."""
    count = _vector(base).lanes

    def build(context, builder, signature, arguments):
        return I64(count)

    return types.int64(base), build


@intrinsic
def zeros(typing_context, base):
    """A vector of zeros, of what this points to."""
    kind = _vector(base)

    def build(context, builder, signature, arguments):
        return ir.Constant(_llvm(context, kind), None)

    return kind(base), build


@intrinsic
def splat(typing_context, base, value):
    """A vector of one value, of what this points to."""
    kind = _vector(base)

    def build(context, builder, signature, arguments):
        return _splat(builder, _llvm(context, kind), arguments[1])

    return kind(base, kind.element), build


@intrinsic
def _load_all(typing_context, base, offset):
    kind = _vector(base)

    def build(context, builder, signature, arguments):
        return _load(builder, *arguments, _llvm(context, kind))

    return kind(base, types.int64), build


@intrinsic
def _load_some(typing_context, base, offset, count):
    kind = _vector(base)

    def build(context, builder, signature, arguments):
        where, start, some = arguments
        return _masked_load(builder, where, start, _llvm(context, kind), some)

    return kind(base, types.int64, types.int64), build


@intrinsic
def _store_all(typing_context, base, offset, value):
    def build(context, builder, signature, arguments):
        _store(builder, *arguments)
        return context.get_dummy_value()

    return types.void(base, types.int64, _vector(base)), build


@intrinsic
def _store_some(typing_context, base, offset, value, count):
    def build(context, builder, signature, arguments):
        _masked_store(builder, *arguments)
        return context.get_dummy_value()

    return types.void(base, types.int64, _vector(base), types.int64), build


def load(base, offset, count=None):
    """The elements from an offset on; of the first `count` lanes if given, the others are 0 and not read."""


@overload(load, inline="never", jit_options=dict(forceinline=True, **OPTIONS))
def _overload_load(base, offset, count=None):
    if count is None or isinstance(count, (types.Omitted, types.NoneType)):
        return lambda base, offset, count=None: _load_all(base, offset)

    def some(base, offset, count=None):
        return _load_all(base, offset) if count >= lanes(base) else _load_some(base, offset, count)

    return some


def store(base, offset, value, count=None):
    """Writes a vector, or its first `count` lanes."""


@overload(store, inline="never", jit_options=dict(forceinline=True, **OPTIONS))
def _overload_store(base, offset, value, count=None):
    if count is None or isinstance(count, (types.Omitted, types.NoneType)):
        return lambda base, offset, value, count=None: _store_all(base, offset, value)

    def some(base, offset, value, count=None):
        if count >= lanes(base):
            _store_all(base, offset, value)
        else:
            _store_some(base, offset, value, count)

    return some


# Arithmetic.


def _operator(function: Callable, emit: Callable) -> None:
    """Makes an operator work on two vectors, or on a vector and a number."""

    @infer_global(function)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            vectors = [a for a in args if isinstance(a, Vector)]
            if len(args) != 2 or not vectors or any(v != vectors[0] for v in vectors):
                return None
            if not all(isinstance(a, (Vector, types.Number)) for a in args):
                return None
            return typing.signature(vectors[0], *(a if isinstance(a, Vector) else vectors[0].element for a in args))

    def lower(context, builder, signature, arguments):
        kind = _llvm(context, signature.return_type)
        wide = [
            value if isinstance(given, Vector) else _splat(builder, kind, value)
            for given, value in zip(signature.args, arguments, strict=True)
        ]
        return emit(builder, *wide)

    for left, right in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(function, left, right)(lower)


_operator(operator.add, lambda builder, a, b: builder.fadd(a, b, flags=_FLAGS))
_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=_FLAGS))
_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=_FLAGS))
_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b, flags=_FLAGS))


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def larger(a, b):
    """Of each lane the larger; b where one is NaN."""


_operator(larger, _larger)


def _where(relation: str) -> Any:
    """An intrinsic of two vectors and two to choose from: the third where the first two so relate, else the fourth."""

    @intrinsic
    def where(typing_context, a, b, yes, no):
        def build(context, builder, signature, arguments):
            a, b, yes, no = arguments
            return builder.select(builder.fcmp_ordered(relation, a, b), yes, no)

        return a(a, a, a, a), build

    return where


where_less, where_equal = _where("<"), _where("==")


def _folded(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """One lane of all, by halves combined with halves: a chain of few dependent operations."""
    count = value.type.count
    while count > 1:
        count //= 2
        halves = [
            builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(I32, count), list(range(at, at + count))))
            for at in (0, count)
        ]
        value = combine(*halves)
    return builder.extract_element(value, I32(0))


@intrinsic
def total(typing_context, vector):
    """The sum of the lanes."""

    def build(context, builder, signature, arguments):
        return _folded(builder, arguments[0], lambda a, b: builder.fadd(a, b, flags=_FLAGS))

    return vector.element(vector), build


@intrinsic
def largest(typing_context, vector):
    """The largest lane."""

    def build(context, builder, signature, arguments):
        return _folded(builder, arguments[0], lambda a, b: _larger(builder, a, b))

    return vector.element(vector), build


# Functions. expm1(x) = 2^n expm1(r) + (2^n - 1) with x = n ln2 + r and |r| <= ln2/2. The polynomial for
# (expm1(r) - r) / r^2 interpolates at Chebyshev nodes; its relative error in expm1(r) is in the comment.

_COEFFICIENTS = {
    types.float32: (0.5, 0.166665768513, 0.0416665544424, 0.00836320297204, 0.00139262134718),  # 2.4e-8
    types.float64: (  # 4.1e-17
        0.50000000000000010262,
        0.16666666666666667456,
        0.041666666666623991516,
        0.0083333333333300513464,
        0.0013888888917281793308,
        0.00019841269863105968748,
        0.000024801521190217727651,
        2.7557268378684192873e-6,
        2.7620138719973995569e-7,
        2.5100424157005066788e-8,
    ),
}
_LN2 = {
    types.float32: (0.693145751953125, 1.42860682030941723212e-6),
    types.float64: (6.93147180369123816490e-01, 1.90821492927058770002e-10),
}
_MANTISSA = {types.float32: 23, types.float64: 52}
_BIAS = {types.float32: 127, types.float64: 1023}
LIMIT = {types.float32: 87.0, types.float64: 708.0}  # exp stays finite and normal within it


def _powers(builder: Any, x: Any, element: types.Float) -> tuple[Any, Any]:
    """2^n and expm1(r) of x within LIMIT; NaN stays NaN in the second."""
    kind = x.type
    constant = lambda value: _constant(kind, value)  # noqa: E731
    mantissa, (high, low) = _MANTISSA[element], _LN2[element]
    whole = constant(1.5 * 2.0**mantissa)  # adding it leaves the nearest integer in the low bits
    shifted = builder.fadd(builder.fmul(x, constant(math.log2(math.e)), flags=_FLAGS), whole, flags=_FLAGS)
    n = builder.fsub(shifted, whole)
    r = _fma(builder, n, constant(-high), x)
    r = _fma(builder, n, constant(-low), r)
    *rest, q = map(constant, _COEFFICIENTS[element])
    for coefficient in reversed(rest):
        q = _fma(builder, q, r, coefficient)
    part = _fma(builder, builder.fmul(r, r, flags=_FLAGS), q, r)
    words = ir.VectorType(ir.IntType(8 * _size(kind.element)), kind.count)
    bits = builder.add(builder.bitcast(shifted, words), ir.Constant(words, [_BIAS[element]] * kind.count))
    scale = builder.bitcast(builder.shl(bits, ir.Constant(words, [mantissa] * kind.count)), kind)
    return scale, part


def _clamp(builder: Any, x: Any, limit: float) -> Any:
    """NaN passes through."""
    return _larger(builder, _constant(x.type, -limit), _smaller(builder, _constant(x.type, limit), x))


@intrinsic
def exp(typing_context, x):
    """exp(x) for x up to LIMIT, within 2 ulp; 0 below -LIMIT."""

    def build(context, builder, signature, arguments):
        (x,) = arguments
        low = _constant(x.type, -LIMIT[signature.return_type.element])
        scale, part = _powers(builder, _larger(builder, low, x), signature.return_type.element)
        result = _fma(builder, scale, part, scale)
        return builder.select(builder.fcmp_ordered("<", x, low), ir.Constant(x.type, None), result)

    return x(x), build


@intrinsic
def sigmoid(typing_context, x):
    """1 / (1 + exp(-x)), within 3 ulp where that is at least exp(-LIMIT)."""

    def build(context, builder, signature, arguments):
        (x,) = arguments
        element, one = signature.return_type.element, _constant(x.type, 1.0)
        scale, part = _powers(builder, _clamp(builder, builder.fneg(x), LIMIT[element]), element)
        return builder.fdiv(one, _fma(builder, scale, part, builder.fadd(scale, one)))

    return x(x), build


@intrinsic
def tanh(typing_context, x):
    """Within 4 ulp, small arguments included: nothing cancels."""

    def build(context, builder, signature, arguments):
        (x,) = arguments
        element, one, two = signature.return_type.element, _constant(x.type, 1.0), _constant(x.type, 2.0)
        limit = 20.0 if element == types.float32 else 40.0
        scale, part = _powers(builder, _clamp(builder, builder.fadd(x, x), limit), element)
        e = _fma(builder, scale, part, builder.fsub(scale, one))
        return builder.fdiv(e, builder.fadd(e, two))

    return x(x), build


@intrinsic
def relu(typing_context, x):
    """NaN stays NaN."""

    def build(context, builder, signature, arguments):
        (x,) = arguments
        zero = ir.Constant(x.type, None)
        return builder.select(builder.fcmp_ordered("<", x, zero), zero, x)

    return x(x), build


@intrinsic
def relu_back(typing_context, dy, y):
    """The gradient before a ReLU that gave y."""

    def build(context, builder, signature, arguments):
        dy, y = arguments
        zero = ir.Constant(y.type, None)
        return builder.select(builder.fcmp_ordered("<=", y, zero), zero, dy)

    return dy(dy, y), build


# Products. A tile keeps the sums of a few rows times a few vectors of columns in registers.


def tile_rows() -> int:
    """The most rows of a tile that is two vectors wide: 2 vectors of a panel, a broadcast and the sums fill AVX2's 16
    registers; AVX-512 has 32."""
    return 8 if vector_bytes() == 64 else 6


_TILE_ROWS = tile_rows()


def _emit_tile(builder: Any, kind: ir.VectorType, rows: int, offsets: list[Any], operands: dict[str, Any]) -> None:
    """out[i][j] (+)= sum over k of left[i * left_row + k * left_k] * right[k * right_k + offset of j]."""
    o = operands
    entry = builder.block
    loop, done = builder.append_basic_block("product"), builder.append_basic_block("product.done")
    lefts = [builder.gep(o["left"], [builder.mul(I64(i), o["left_row"])]) for i in range(rows)]
    rights = [builder.gep(o["right"], [offset]) for offset in offsets]
    zero = ir.Constant(kind, None)
    builder.cbranch(builder.icmp_signed(">", o["K"], I64(0)), loop, done)
    builder.position_at_end(loop)
    k = builder.phi(I64)
    k.add_incoming(I64(0), entry)
    sums = [[builder.phi(kind) for _ in offsets] for _ in range(rows)]
    at_right = builder.mul(k, o["right_k"])
    vectors = [_load(builder, right, at_right, kind) for right in rights]
    at_left = builder.mul(k, o["left_k"])
    added = []
    for i in range(rows):
        value = _splat(builder, kind, builder.load(builder.gep(lefts[i], [at_left])))
        added.append([_fma(builder, vector, value, acc) for vector, acc in zip(vectors, sums[i], strict=True)])
    following = builder.add(k, I64(1))
    k.add_incoming(following, loop)
    for phis, values in zip(sums, added, strict=True):
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(zero, entry)
            phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, o["K"]), loop, done)
    builder.position_at_end(done)
    results = []
    for values in added:
        for value in values:
            result = builder.phi(kind)
            result.add_incoming(zero, entry)
            result.add_incoming(value, loop)
            results.append(result)
    lanes = kind.count
    with builder.if_else(o["add"]) as (then, otherwise):
        for block, is_added in ((then, True), (otherwise, False)):
            with block:
                for index, result in enumerate(results):
                    i, j = divmod(index, len(offsets))
                    where = builder.add(builder.mul(I64(i), o["out_row"]), I64(j * lanes))
                    if is_added:
                        result = builder.fadd(result, _load(builder, o["out"], where, kind))
                    _store(builder, o["out"], where, result)


def _switch(builder: Any, value: Any, cases: dict[int, Callable[[], None]]) -> None:
    """Runs the one of the cases that a value says."""
    done = builder.append_basic_block("switch.done")
    never = builder.append_basic_block("switch.never")
    choice = builder.switch(value, never)
    for number, emit in cases.items():
        block = builder.append_basic_block(f"switch.{number}")
        choice.add_case(I64(number), block)
        builder.position_at_end(block)
        emit()
        builder.branch(done)
    builder.position_at_end(never)
    builder.branch(done)
    builder.position_at_end(done)


_TILE = ("K", "left", "left_row", "left_k", "right", "right_k", "out", "out_row", "add")


@intrinsic
def tile(typing_context, rows, K, left, left_row, left_k, right, right_k, out, out_row, add):
    """out[i][j] (+)= sum over k < K of left[i][k] * right[k][j], for a few rows i and two vectors of columns j.

    Args:
        rows: from 1 to tile_rows().
        K: the length of the sums.
        left: a pointer; left[i][k] is left_row * i + left_k * k elements further.
        right: a pointer; right[k] is right_k * k elements further.
        out: a pointer; out[i] is out_row * i elements further.
        add: whether to add to what out holds.
    """
    kind = _vector(left)
    integer = types.int64

    def build(context, builder, signature, arguments):
        height, *rest = arguments
        vector, operands = _llvm(context, kind), dict(zip(_TILE, rest, strict=True))
        offsets = [I64(0), I64(kind.lanes)]
        emit = lambda n: lambda: _emit_tile(builder, vector, n, offsets, operands)  # noqa: E731
        _switch(builder, height, {n: emit(n) for n in range(1, tile_rows() + 1)})
        return context.get_dummy_value()

    given = (integer, integer, left, integer, integer, left, integer, left, integer, types.boolean)
    return types.void(*given), build


def _wide(rows: int) -> int:
    """How many panels of two vectors a tile of few rows takes at once: an FMA's latency wants eight sums in flight, and
    AVX2 has registers for twelve."""
    return {1: 4, 2: 3, 3: 2}[rows]


@intrinsic
def wide_tile(typing_context, rows, panels, panel_stride, K, left, left_row, left_k, right, right_k, out, out_row, add):
    """The same as `tile` for one to three rows and one to four panels of two vectors, the fewer the more rows: for a
    row, four panels, for two rows, three, for three, two. Panel p is panel_stride * p elements further in `right`, and
    two vectors further in `out`."""
    kind = _vector(left)
    integer = types.int64

    def build(context, builder, signature, arguments):
        height, count, stride, *rest = arguments
        vector, operands = _llvm(context, kind), dict(zip(_TILE, rest, strict=True))
        offsets = [
            builder.add(builder.mul(stride, I64(p)), I64(v * kind.lanes)) for p in range(_wide(1)) for v in range(2)
        ]

        def emit(n: int, p: int) -> Callable[[], None]:
            return lambda: _emit_tile(builder, vector, n, offsets[: 2 * p], operands)

        _switch(
            builder,
            builder.add(builder.mul(height, I64(8)), count),
            {8 * n + p: emit(n, p) for n in (1, 2, 3) for p in range(1, _wide(n) + 1)},
        )
        return context.get_dummy_value()

    given = (integer,) * 4 + (left, integer, integer, left, integer, left, integer, types.boolean)
    return types.void(*given), build


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of a square of vectors: as many perfect shuffles of its rows as halvings lead to one row."""
    lanes = len(rows)
    numbers = ir.VectorType(I32, lanes)
    masks = [
        ir.Constant(numbers, [half * lanes // 2 + i // 2 + i % 2 * lanes for i in range(lanes)]) for half in (0, 1)
    ]
    for _ in range(lanes.bit_length() - 1):
        pairs = zip(rows[: lanes // 2], rows[lanes // 2 :], strict=True)
        rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
    return rows


@intrinsic
def transpose(typing_context, source, source_row, target, target_row):
    """target[i][j] = source[j][i] for a square as wide as a vector; rows are so many elements apart."""
    kind = _vector(source)
    integer = types.int64

    def build(context, builder, signature, arguments):
        source, source_row, target, target_row = arguments
        vector, lanes = _llvm(context, kind), kind.lanes
        rows = [_load(builder, source, builder.mul(I64(i), source_row), vector) for i in range(lanes)]
        for i, row in enumerate(_turned(builder, rows)):
            _store(builder, target, builder.mul(I64(i), target_row), row)
        return context.get_dummy_value()

    return types.void(source, integer, source, integer), build


_DEPTH_BYTES = 16 * 1024  # of a panel: so much of it stays in the L1 cache while the rows pass


@part
def multiply(rows, panels, panel_stride, K, left, left_row, right, right_k, out, out_row, add):
    """out[i][j] (+)= sum over k < K of left[i][k] * right[k][j], for any number of rows and of panels.

    A panel is two vectors of columns; panel p begins panel_stride * p elements further in `right`, and two vectors
    further in `out`. Neighbours of left[i] and of a panel's row are next to each other.
    """
    width = 2 * lanes(left)
    if rows <= 3:
        most = 4 if rows == 1 else 3 if rows == 2 else 2
        panel = 0
        while panel < panels:
            some = min(most, panels - panel)
            if most == 3 and panels - panel == 4:
                some = 2
            wide_tile(
                rows, some, panel_stride, K, left, left_row, 1, at(right, panel * panel_stride), right_k,
                at(out, panel * width), out_row, add,
            )  # fmt: skip
            panel += some
        return
    most = _TILE_ROWS
    tiles = (rows + most - 1) // most
    depth = _depth(left)
    for panel in range(panels):
        for k in range(0, K, depth):
            slice_ = at(right, panel * panel_stride + k * right_k)
            for i in range(tiles):
                row, end = rows * i // tiles, rows * (i + 1) // tiles
                tile(
                    end - row, min(depth, K - k), at(left, row * left_row + k), left_row, 1, slice_, right_k,
                    at(out, row * out_row + panel * width), out_row, add or k > 0,
                )  # fmt: skip


@intrinsic
def _depth(typing_context, base):
    kind = _vector(base)
    depth = _DEPTH_BYTES // (2 * kind.lanes * kind.element.bitwidth // 8)
    return types.int64(base), lambda context, builder, signature, arguments: I64(depth)


# What attention needs besides.


@intrinsic
def magnitude(typing_context, x):
    """|x|"""

    def build(context, builder, signature, arguments):
        (x,) = arguments
        return _call(builder, f"llvm.fabs.{_suffix(x.type)}", x.type, x)

    return x(x), build


@intrinsic
def ramp(typing_context, base, start):
    """start, start + 1, ... in the lanes of a vector of what this points to."""
    kind = _vector(base)

    def build(context, builder, signature, arguments):
        vector = _llvm(context, kind)
        steps = ir.Constant(vector, [float(i) for i in range(vector.count)])
        return builder.fadd(_splat(builder, vector, arguments[1]), steps)

    return kind(base, kind.element), build


@intrinsic
def where_set(typing_context, base, flags, offset, count, yes, no):
    """yes where one of the first `count` bytes from an offset on is not 0, else no; further bytes are not read."""
    kind = _vector(base)

    def build(context, builder, signature, arguments):
        _, flags, offset, count, yes, no = arguments
        bytes_ = ir.VectorType(ir.IntType(8), kind.lanes)
        zero = ir.Constant(bytes_, None)
        at = builder.bitcast(builder.gep(flags, [offset]), bytes_.as_pointer())
        with builder.if_else(builder.icmp_signed("<", count, I64(kind.lanes))) as (some, every):
            with some:
                name, mask = f"llvm.masked.load.v{kind.lanes}i8.p0", _mask(builder, count, kind.lanes)
                first = _call(builder, name, bytes_, at, I32(1), mask, zero), builder.block
            with every:
                loaded = builder.load(at)
                loaded.align = 1
                whole = loaded, builder.block
        seen = builder.phi(bytes_)
        for value, block in (first, whole):
            seen.add_incoming(value, block)
        return builder.select(builder.icmp_unsigned("!=", seen, zero), yes, no)

    return kind(base, flags, types.int64, types.int64, kind, kind), build


@intrinsic
def _turn_some(typing_context, source, source_row, rows, columns, target, target_row):
    kind = _vector(source)
    integer = types.int64

    def build(context, builder, signature, arguments):
        source, source_row, rows, columns, target, target_row = arguments
        vector, lanes = _llvm(context, kind), kind.lanes
        values = []
        for i in range(lanes):
            count = builder.select(builder.icmp_signed("<", I64(i), rows), columns, I64(0))
            values.append(_masked_load(builder, source, builder.mul(I64(i), source_row), vector, count))
        for i, row in enumerate(_turned(builder, values)):
            count = builder.select(builder.icmp_signed("<", I64(i), columns), I64(lanes), I64(0))
            _masked_store(builder, target, builder.mul(I64(i), target_row), row, count)
        return context.get_dummy_value()

    return types.void(source, integer, integer, integer, source, integer), build


@part
def turn(source, source_row, rows, columns, target, target_row):
    """`transpose` of a square of which only so many rows and columns are there: others are not read nor written, and
    rows that are not there give zeros."""
    if rows >= lanes(source) and columns >= lanes(source):
        transpose(source, source_row, target, target_row)
    else:
        _turn_some(source, source_row, rows, columns, target, target_row)


@intrinsic
def dots(typing_context, rows, K, left, left_row, right, out):
    """out[i] = sum over k < K of left[i][k] * right[k] for up to as many rows i as a vector has lanes; out gets a whole
    vector, in whose other lanes stands the last row's sum."""
    kind = _vector(left)
    integer = types.int64

    def build(context, builder, signature, arguments):
        rows, K, left, left_row, right, out = arguments
        vector, lanes = _llvm(context, kind), kind.lanes
        starts = []
        for i in range(lanes):
            row = builder.select(builder.icmp_signed("<", I64(i), rows), I64(i), builder.sub(rows, I64(1)))
            starts.append(builder.gep(left, [builder.mul(row, left_row)]))
        whole = builder.and_(K, I64(-lanes))
        entry = builder.block
        loop, done = builder.append_basic_block("dots"), builder.append_basic_block("dots.done")
        zero = ir.Constant(vector, None)
        builder.cbranch(builder.icmp_signed(">", whole, I64(0)), loop, done)
        builder.position_at_end(loop)
        k = builder.phi(I64)
        sums = [builder.phi(vector) for _ in starts]
        right_k = _load(builder, right, k, vector)
        added = [
            _fma(builder, _load(builder, start, k, vector), right_k, acc)
            for start, acc in zip(starts, sums, strict=True)
        ]
        following = builder.add(k, I64(lanes))
        k.add_incoming(I64(0), entry)
        k.add_incoming(following, loop)
        for acc, value in zip(sums, added, strict=True):
            acc.add_incoming(zero, entry)
            acc.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, whole), loop, done)
        builder.position_at_end(done)
        results = []
        for value in added:
            result = builder.phi(vector)
            result.add_incoming(zero, entry)
            result.add_incoming(value, loop)
            results.append(result)
        some = builder.sub(K, whole)
        tail, summed = builder.append_basic_block("dots.tail"), builder.append_basic_block("dots.summed")
        builder.cbranch(builder.icmp_signed(">", some, I64(0)), tail, summed)
        builder.position_at_end(tail)
        right_k = _masked_load(builder, right, whole, vector, some)
        more = [
            _fma(builder, _masked_load(builder, start, whole, vector, some), right_k, acc)
            for start, acc in zip(starts, results, strict=True)
        ]
        tail = builder.block
        builder.branch(summed)
        builder.position_at_end(summed)
        values = []
        for result, value in zip(results, more, strict=True):
            merged = builder.phi(vector)
            merged.add_incoming(result, done)
            merged.add_incoming(value, tail)
            values.append(merged)
        # Neighbours are added pairwise, in pairs of vectors, until there is one vector with a sum of each.
        numbers = ir.VectorType(I32, lanes)
        even, odd = (ir.Constant(numbers, list(range(first, 2 * lanes, 2))) for first in (0, 1))
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [
                builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd)) for a, b in pairs
            ]
        _store(builder, out, I64(0), values[0])
        return context.get_dummy_value()

    return types.void(integer, integer, left, integer, left, left), build


# Dropout, as fastseq/reference/dropout.py has it.

COUNTERS, HALVES = 16, 8  # a counter gives the bits of 8 columns, 16 apart
DRAWN = COUNTERS * HALVES
_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


@intrinsic
def draw(typing_context, seed, dropped, kept, matrix, row, row_step, column, column_step, target, gap):
    """What dropout multiplies elements with, 0 or `kept`, for 16 counters: target[half * gap + i] for the i-th of them,
    whose row and column are so many steps further."""
    integer = types.int64
    element = target.dtype

    def build(context, builder, signature, arguments):
        seed, dropped, kept, matrix, row, row_step, column, column_step, target, gap = arguments
        words, wide = ir.VectorType(I32, COUNTERS), ir.VectorType(I64, COUNTERS)
        steps = ir.Constant(words, list(range(COUNTERS)))
        low = lambda value: builder.trunc(value, I32)  # noqa: E731
        every = lambda value: _splat(builder, words, low(value))  # noqa: E731
        x = [
            builder.add(every(column), builder.mul(steps, every(column_step))),
            builder.add(every(row), builder.mul(steps, every(row_step))),
            every(matrix),
            ir.Constant(words, None),
        ]
        keys = [low(seed), low(builder.lshr(seed, I64(32)))]
        for _ in range(_ROUNDS):
            products = []
            for value, by in zip(x[::2], _MULTIPLIERS, strict=True):
                product = builder.mul(builder.zext(value, wide), ir.Constant(wide, [by] * COUNTERS))
                high = builder.trunc(builder.lshr(product, ir.Constant(wide, [32] * COUNTERS)), words)
                products.append((high, builder.trunc(product, words)))
            (even_high, even_low), (odd_high, odd_low) = products
            key_low, key_high = (_splat(builder, words, key) for key in keys)
            x = [
                builder.xor(builder.xor(odd_high, x[1]), key_low),
                odd_low,
                builder.xor(builder.xor(even_high, x[3]), key_high),
                even_low,
            ]
            keys = [builder.add(key, I32(weyl)) for key, weyl in zip(keys, _WEYL, strict=True)]
        kind = ir.VectorType(context.get_value_type(element), COUNTERS)
        bound, factor, zero = every(dropped), _splat(builder, kind, kept), ir.Constant(kind, None)
        for half in range(HALVES):
            word = x[half // 2]
            if half % 2:
                drawn = builder.lshr(word, ir.Constant(words, [16] * COUNTERS))
            else:
                drawn = builder.and_(word, ir.Constant(words, [0xFFFF] * COUNTERS))
            value = builder.select(builder.icmp_unsigned("<", drawn, bound), zero, factor)
            _store(builder, target, builder.mul(I64(half), gap), value)
        return context.get_dummy_value()

    return types.void(integer, integer, element, *(integer,) * 5, target, integer), build
