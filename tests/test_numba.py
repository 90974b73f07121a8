"""What numba's kernels are made of: vectors, products, threads, and compiling."""

import ctypes
import mmap
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import REQUIRED, threads_set

if "numba" not in REQUIRED:
    pytest.importorskip("numba")

from fastseq import jit as jit_runtimes
from fastseq.kernels.numba import attention, compiler, gru, simd, team
from fastseq.kernels.numba.compiler import Elements, Integers, Kernel, Size
from fastseq.kernels.numba.jit import jit
from fastseq.ops.attention import Arguments

DTYPES = [torch.float32, torch.float64]


class Map(NamedTuple):
    count: Size
    x: Elements
    exp: Elements
    sigmoid: Elements
    tanh: Elements


@jit
def _functions(begin, end, call):
    for i in range(begin * simd.lanes(call.x), call.count, simd.lanes(call.x)):
        n = call.count - i
        x = simd.load(call.x, i, n)
        simd.store(call.exp, i, simd.exp(x), n)
        simd.store(call.sigmoid, i, simd.sigmoid(x), n)
        simd.store(call.tanh, i, simd.tanh(x), n)


FUNCTIONS = Kernel("test functions", _functions, Map)


def functions_of(x: torch.Tensor) -> list[torch.Tensor]:
    """exp, sigmoid and tanh as kernels compute them."""
    results = [torch.full_like(x, torch.nan) for _ in range(3)]
    team.run(FUNCTIONS, x.dtype, Map(len(x), x, *results), 1)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_are_as_exact_as_stated(dtype: torch.dtype) -> None:
    limit = {torch.float32: 87.0, torch.float64: 708.0}[dtype]
    near_zero = torch.logspace(-12, 0, 20_001, dtype=torch.float64)
    x = torch.cat([torch.linspace(-limit, limit, 100_003, dtype=torch.float64), near_zero, -near_zero]).to(dtype)
    eps = torch.finfo(dtype).eps
    wide = x.double()
    for got, want, ulp in zip(functions_of(x), (wide.exp(), wide.sigmoid(), wide.tanh()), (2, 3, 4), strict=True):
        # Half a step of rounding is the unit of the last place; float64 itself is what float64 is held against.
        error = ((got.double() - want) / want).abs().max().item()
        assert error <= (ulp + (dtype == torch.float64)) * eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_of_what_is_not_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0], dtype=dtype)
    exp, sigmoid, tanh = functions_of(x)
    assert exp[0].isnan() and exp[2] == 0 and exp[4] == 0 and exp[5] == 1
    torch.testing.assert_close(sigmoid, x.sigmoid(), equal_nan=True, rtol=0, atol=1e-30)
    torch.testing.assert_close(tanh, x.tanh(), equal_nan=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as on Linux")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_end_of_a_row_is_the_end(dtype: torch.dtype) -> None:
    """Right behind the last element is a page that nobody may touch."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(begin + page), page, 0) == 0
    try:
        for count in range(1, 40):
            size = count * dtype.itemsize
            ends = torch.frombuffer(memory, dtype=dtype, count=count, offset=page - size)
            ends.copy_(torch.linspace(-1, 1, count, dtype=dtype))
            expected = ends.tanh()
            others = torch.empty_like(expected)
            team.run(FUNCTIONS, dtype, Map(count, ends, others, others, ends), 1)
            torch.testing.assert_close(ends, expected)
            del ends
    finally:
        assert libc.mprotect(ctypes.c_void_p(begin + page), page, 3) == 0


class Product(NamedTuple):
    rows: Size
    panels: Size
    K: Size
    left: Elements
    right: Elements
    out: Elements
    add: Size


@jit
def _product(begin, end, call):
    width = 2 * simd.lanes(call.left)
    simd.multiply(
        call.rows, call.panels, call.K * width, call.K, call.left, call.K, call.right, width, call.out,
        call.panels * width, call.add != 0,
    )  # fmt: skip


PRODUCT = Kernel("test product", _product, Product)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_every_height_and_width(dtype: torch.dtype) -> None:
    width = 2 * simd.vector_bytes() // dtype.itemsize
    for rows in [*range(1, 19), 40]:
        for panels in range(1, 6):
            for K in (1, 2, 7, 300):
                left, right = torch.randn(rows, K, dtype=dtype), torch.randn(panels, K, width, dtype=dtype)
                out = torch.randn(rows, panels, width, dtype=dtype)
                expected = torch.einsum("rk,pkw->rpw", left.double(), right.double())
                for add in (0, 1):
                    want = expected + out.double() if add else expected
                    team.run(PRODUCT, dtype, Product(rows, panels, K, left, right, out, add), 1)
                    atol = 1e-4 if dtype == torch.float32 else 1e-12
                    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)


def test_products_are_vector_instructions_that_stay_in_registers(tmp_path: Path) -> None:
    """The inner loop of the highest tile: as many fused multiply-adds as it has sums, and nothing put on the stack."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("looks for instructions of AVX2 and AVX-512")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from test_numba import PRODUCT\n"
        "PRODUCT.function(torch.float32)\n"
        "print(PRODUCT._kept[0]._library.get_asm_str())"
    )
    assembly = run_python(code, tmp_path, str(Path(__file__).parent)).stdout
    register = "zmm" if simd.vector_bytes() == 64 else "ymm"
    blocks = re.split(r"^[.\w$]*:", assembly, flags=re.MULTILINE)
    sums = [len(re.findall(rf"vfmadd\w+ps\s.*%{register}", block)) for block in blocks]
    highest = blocks[max(range(len(blocks)), key=lambda i: sums[i])]
    assert max(sums) >= 2 * simd.tile_rows() and max(sums) % (2 * simd.tile_rows()) == 0  # LLVM may unroll the loop
    assert not re.search(r"^\s*v.*\(%rsp", highest, flags=re.MULTILINE)
    assert not re.search(r"vfmadd\w+ss", highest)


class Meeting(NamedTuple):
    meetings: Size
    members: Size
    seen: Integers  # [members + 1, 16] how often each has come, and how often one was late
    team: Integers


@jit
def _meet(begin, end, call):
    rank = team.join(call.team, begin, end, call.members)
    if rank < 0:
        return
    count = team.size(call.team)
    for meeting in range(call.meetings):
        call.seen[rank * 16] += 1
        team.barrier(call.team, rank, 0, count)
        for other in range(count):
            if call.seen[other * 16] != meeting + 1:
                call.seen[call.members * 16] += 1
        team.barrier(call.team, rank, 0, count)


MEET = Kernel("test meeting", _meet, Meeting)


@pytest.mark.parametrize("members", [1, 2, 3, 7])
def test_members_of_a_team_wait_for_each_other(members: int) -> None:
    with threads_set(members):
        seen = torch.zeros(members + 1, 16, dtype=torch.int64)
        team.run_team(MEET, torch.float32, Meeting(300, members, seen, 0), members)
    came = seen[:-1, 0]
    assert came[0] == 300 and set(came.tolist()) <= {0, 300} and seen[-1, 0] == 0


def test_a_team_that_one_thread_gets_is_a_team_of_one() -> None:
    """As inside another parallel region: torch hands the whole range to the caller."""
    seen = torch.zeros(5, 16, dtype=torch.int64)
    words = torch.zeros(1024, dtype=torch.int64)
    table = MEET.table(Meeting(10, 4, seen, words))
    MEET.function(torch.float32)(0, 4, table.buffer_info()[0])
    assert seen[:, 0].tolist() == [10, 0, 0, 0, 0]


def layer() -> tuple:
    """The arguments of a GRU's forward, of a size that two threads share, and what torch gives for it."""
    module = torch.nn.GRU(96, 96)
    x = torch.randn(20, 3, 96)
    weights = [w.detach() for w in module._flat_weights]
    with torch.no_grad():
        expected = module(x)[0]
    return (x, None, None, weights, False, False, False, None, None, None, None, None), expected


def test_python_threads_at_once() -> None:
    cases = [layer() for _ in range(4)]
    wrong: list[int] = []

    def work(index: int) -> None:
        arguments, expected = cases[index]
        for _ in range(50):
            if not torch.allclose(gru.forward(*arguments)[0], expected, atol=1e-5):
                wrong.append(index)

    with threads_set(2):
        gru.forward(*cases[0][0])
        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
    assert not wrong and not any(worker.is_alive() for worker in workers)


FORKING = """
import os, sys, threading, torch
from fastseq.kernels.numba import gru
torch.set_num_threads(2)
module = torch.nn.GRU(32, 32)
weights = [w.detach() for w in module._flat_weights]
arguments = (torch.randn(40, 9, 32), None, None, weights, False, False, False, None, None, None, None, None)
expected = gru.forward(*arguments)[0]
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as torch's DataLoader does in its workers: torch's own products hang otherwise
    alike = torch.equal(gru.forward(*arguments)[0], expected)
    os._exit(0 if alike else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork() -> None:
    run_python(FORKING)


def run_python(code: str, folder: Path | None = None, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A process of its own, with its own cache if a folder is given."""
    environment = {**os.environ, **({"FASTSEQ_CACHE": str(folder)} if folder else {})}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


COMPILING = """
import sys, torch
from fastseq.kernels.numba import compiler, rnn_relu
compiler.SLOW_S = float(sys.argv[1])
rnn_relu.warmup(torch.float32)
kernels = (rnn_relu._LAYER._forward, rnn_relu._LAYER._backward)
print(sum(kernel._kept[0].cache_hits for kernel in kernels))
module = torch.nn.RNN(8, 8, nonlinearity="relu")
x = torch.randn(5, 2, 8)
arguments = (x, None, None, list(module._flat_weights), False, False, False, None, None, None, None, None)
with torch.no_grad():
    torch.testing.assert_close(rnn_relu.forward(*arguments)[0], module(x)[0])
"""


def test_what_is_compiled_is_kept_and_told(tmp_path: Path) -> None:
    first, second = (run_python(COMPILING, tmp_path, "0.01") for _ in range(2))
    assert first.stdout.split() == ["0"] and second.stdout.split() == ["2"]
    assert "fastseq: numba compiles rnn_relu forward for float32" in first.stderr
    assert len(first.stderr.strip().splitlines()) == 3  # the third packs weights
    assert run_python(COMPILING, tmp_path, "60").stderr == ""


def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    threads = [threading.Thread(target=run_python, args=(COMPILING, tmp_path, "60")) for _ in range(3)]
    errors: list[object] = []
    hook, threading.excepthook = threading.excepthook, lambda args: errors.append(args.exc_value)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert not errors
    assert run_python(COMPILING, tmp_path, "60").stdout.split() == ["2"]


def test_the_cache_is_of_this_state_of_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = compiler.folder()
    sources = tmp_path / "numba"
    sources.mkdir()
    for source in Path(compiler.__file__).parent.glob("*.py"):
        (sources / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr("fastseq.kernels.numba.__path__", [str(sources)])

    def again() -> Path:
        vars(jit_runtimes.NUMBA).pop("build", None)
        compiler.folder.cache_clear()
        return compiler.folder()

    try:
        assert again() == before
        (sources / "gru.py").write_text((sources / "gru.py").read_text() + "# another\n")
        assert again() != before
    finally:
        monkeypatch.undo()
        assert again() == before


def test_what_does_not_fit_is_refused_before_a_kernel_runs() -> None:
    """Calls of the ops themselves, which nothing in Python has checked; the next good one works."""
    good, expected = layer()
    x, _, _, weights, *_ = good

    def changed(place: int, value: object) -> tuple:
        return (*good[:place], value, *good[place + 1 :])

    for call, message in (
        (changed(1, torch.zeros(1, 4, 96)), "h0 must be"),
        (changed(3, [w[:-1] for w in weights]), "must"),
        (changed(3, [*weights[:2], weights[2].double(), weights[3]]), r"weights\[2\] must be torch.float32"),
        (changed(8, torch.tensor([21, 1, 1])), "lengths must be between 0 and T=20"),
        (changed(9, torch.zeros(20, 2, dtype=torch.bool)), "reset must be"),
        ((x[0], *good[1:7], torch.tensor([3, 1]), *good[8:]), "batch_sizes must"),
    ):
        with pytest.raises(ValueError, match=message):
            gru.forward(*call)
    torch.testing.assert_close(gru.forward(*good)[0], expected)
    outputs = gru.forward(*changed(5, True))
    with pytest.raises(ValueError, match="gates must be"):
        gru.backward(
            None, outputs[1], None, None, *good[:5], *good[7:], outputs[0], outputs[3][:, 1:], outputs[4], [True] * 9
        )  # fmt: skip

    q = torch.randn(2, 4, 5, 8)
    given = dict(zip(Arguments._fields, Arguments(q, q, q, scale=1.0), strict=True))
    for name, value in (
        ("key", q[..., :7]),
        ("value", q[:, :, :4]),
        ("value", q[:, :3]),
        ("mask", torch.zeros(2, 1, 5, 4)),
        ("key_padding", torch.zeros(2, 4, dtype=torch.bool)),
        ("slopes", torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match=name):
            attention.forward(*Arguments(**{**given, name: value}), 0)
    out, lse, _ = attention.forward(*given.values(), 0)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=1.0))
    with pytest.raises(ValueError, match="lse must be"):
        attention.backward(out, None, *given.values(), out, lse[:, :, :4], [True] * 3 + [False])
