"""What a machine with an NVIDIA GPU has to say: builds, tests on the GPU, compute-sanitizer on the CUDA kernels where
that is installed, then races, into one folder as JSON.

`make gpu-check OUT=folder`. It needs no network and writes nowhere else. With `--dry` and without a GPU it shows that
all that would run imports, collects and computes: tests are collected, and races are run once, small, on the CPU.

In a race each contestant is first compared with the exact result. Then all take turns on the same inputs, of which
there are as many copies as it takes to exceed the GPU's L2 cache, so that every call reads from memory; CUDA events
time them.
"""

import copy
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Protocol

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = "no NVIDIA GPU that torch can use: nothing is measured"
NEEDED = ("setuptools", "ninja", "numpy", "pytest", "hypothesis", "expecttest", "rich", "triton")
OURS = "fastseq"
BY_NAME = ("triton", "cuda")  # implementations of recurrent layers that race beside the one that serves
SEED = 5

WARM_UP_CALLS = 3
ROUNDS, SECONDS = 100, 1.0  # the most rounds, and about how long a contestant is timed
COPIES_OF_L2 = 3
SANITIZERS = ("memcheck", "racecheck")
KERNELS = "kns=ward_steps"  # forward_steps and backward_steps: what compute-sanitizer looks at, and torch's not
SANITIZER_SECONDS, FOUND = 180, 99  # the longest that one may take, and how it exits if it has found something
# How much larger than the best contestant's an error may be, and what counts as none, in steps of the dtype.
WORSE, NOTHING = 2.0, 4.0


class AbsentError(Exception):
    """A contestant cannot take part; the message says why."""


Call = Callable[[], Sequence[Tensor]]


class Case(Protocol):
    """One race: who takes part, and what is computed."""

    op: str
    training: bool
    dtype: torch.dtype

    def small(self) -> "Case":
        """The same at a size for a CPU."""
        ...

    def inputs(self, device: str) -> list[Tensor]: ...

    def contestants(self, device: str) -> dict[str, Callable[[list[Tensor]], Call]]:
        """By name, what makes a call on inputs; the call returns results and, in training, gradients."""
        ...

    def exact(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """What calls should return, in a wider dtype."""
        ...


def step(function: Callable[..., Tensor], leaves: list[Tensor], rest: list[Tensor], dout: Tensor | None) -> Call:
    """A call, with backward if there is a gradient to send."""
    if dout is None:
        return lambda: [function(*leaves[:3], *rest)]
    leaves = [t.detach().requires_grad_() for t in leaves]

    def call() -> Sequence[Tensor]:
        out = function(*leaves[:3], *leaves[3:], *rest)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    return call


@dataclass(frozen=True)
class Attention:
    """Scaled dot product attention on [B, H, S, D]."""

    B: int
    H: int
    S: int
    D: int
    dtype: torch.dtype = torch.bfloat16
    training: bool = False
    causal: bool = False
    padded: bool = False  # the last half of the keys
    bias: bool = False  # [1, H, S, S], with its gradient in training
    dropout: float = 0.0
    queries: int = 0  # S unless given

    op = "attention"

    def small(self) -> "Attention":
        sizes = dict(B=min(self.B, 2), H=min(self.H, 2), S=max(32, self.S // 64), queries=min(self.queries, 4))
        return Attention(**{**asdict(self), **sizes})

    def inputs(self, device: str) -> list[Tensor]:
        normal = partial(torch.randn, device=device, dtype=self.dtype)
        L, S, D = self.queries or self.S, self.S, self.D
        inputs = [normal(self.B, self.H, length, D) for length in (L, S, S)]
        if self.bias:
            inputs.append(normal(1, self.H, L, S))
        if self.training:
            inputs.append(normal(self.B, self.H, L, D))
        return inputs

    def _padding(self, device: str) -> Tensor | None:
        return (torch.arange(self.S, device=device) >= self.S // 2).expand(self.B, -1) if self.padded else None

    def _call(self, function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
        dout = inputs[-1] if self.training else None
        leaves = inputs[:-1] if self.training else inputs
        return step(function, leaves if self.training else leaves[:3], [] if self.training else leaves[3:], dout)

    def _ours(self, inputs: list[Tensor]) -> Call:
        from fastseq.functional import scaled_dot_product_attention

        padding = self._padding(str(inputs[0].device))
        options = dict(is_causal=self.causal, dropout_p=self.dropout, key_padding_mask=padding)
        return self._call(partial(scaled_dot_product_attention, **options), inputs)

    def _torchs(self, backend: SDPBackend, inputs: list[Tensor]) -> Call:
        options: dict[str, Any] = dict(is_causal=self.causal, dropout_p=self.dropout)
        if (padding := self._padding(str(inputs[0].device))) is not None:
            seen = ~padding[:, None, None]
            if self.causal:
                seen = seen & torch.ones(self.S, self.S, dtype=torch.bool, device=padding.device).tril()
            options.update(attn_mask=seen, is_causal=False)

        def call(*tensors: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*tensors, **options)

        return self._call(call, inputs)

    def _flex(self, inputs: list[Tensor]) -> Call:
        if self.dropout:
            raise AbsentError("has no dropout")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        L, S, device = self.queries or self.S, self.S, inputs[0].device

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            ahead = k <= q if self.causal else k >= 0
            return ahead & (k < S // 2) if self.padded else ahead

        block_mask = create_block_mask(seen, None, None, L, S, device) if self.causal or self.padded else None
        # On a CPU, to see that it works, without minutes of compiling.
        compiled = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

        def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
            added = None if bias is None else lambda score, b, h, q, k: score + bias[0, h, q, k]
            return compiled(query, key, value, score_mod=added, block_mask=block_mask)

        return self._call(call, inputs)

    def contestants(self, device: str) -> dict[str, Callable[[list[Tensor]], Call]]:
        torchs = {
            "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
            "torch flash": SDPBackend.FLASH_ATTENTION,
            "torch memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
            "torch math": SDPBackend.MATH,
        }
        return {
            OURS: self._ours,
            **{name: partial(self._torchs, backend) for name, backend in torchs.items()},
            "FlexAttention": self._flex,
        }

    def exact(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        wide = [t.float() for t in inputs]
        if self.dropout:  # of which only fastseq's own draws are known
            import fastseq

            torch.manual_seed(SEED)
            with fastseq.use_backend("reference"):
                return self._ours(wide)()
        return self._torchs(SDPBackend.MATH, wide)()


@dataclass(frozen=True)
class Layer:
    """A layer of torch.nn on input [B, T, I], accelerated and as it is."""

    kind: str
    B: int
    T: int
    I: int
    H: int  # hidden features, or heads
    dtype: torch.dtype = torch.bfloat16
    training: bool = False

    @property
    def op(self) -> str:
        return self.kind

    @property
    def is_recurrent(self) -> bool:
        return self.kind in ("LSTM", "GRU", "RNN")

    def small(self) -> "Layer":
        heads = 16 if self.is_recurrent else self.H
        return Layer(**{**asdict(self), "B": 2, "T": 8, "I": 16 if heads == 16 else self.I, "H": heads})

    def inputs(self, device: str) -> list[Tensor]:
        shape = (self.B, self.T, self.I)
        inputs = [torch.randn(shape, device=device, dtype=self.dtype)]
        if self.training:
            width = self.H if self.is_recurrent else self.I
            inputs.append(torch.randn(self.B, self.T, width, device=device, dtype=self.dtype))
        return inputs

    @cache  # noqa: B019  (a handful of cases)
    def _layer(self, device: str) -> nn.Module:
        torch.manual_seed(0)
        layer = getattr(nn, self.kind)(self.I, self.H, batch_first=True, dropout=0.0)
        return layer.to(device, self.dtype).train(self.training)

    def _call(self, layer: nn.Module, inputs: list[Tensor]) -> Call:
        def forward(x: Tensor) -> Tensor:
            if self.kind == "MultiheadAttention":
                return layer(x, x, x, need_weights=False)[0]
            return layer(x)[0] if self.is_recurrent else layer(x)

        if not self.training:
            return lambda: [forward(inputs[0])]
        x = inputs[0].detach().requires_grad_()
        leaves = [x, *layer.parameters()]

        def call() -> Sequence[Tensor]:
            out = forward(x)
            return [out, *torch.autograd.grad(out, leaves, inputs[1])]

        return call

    def contestants(self, device: str) -> dict[str, Callable[[list[Tensor]], Call]]:
        import fastseq

        theirs = self._layer(device)
        ours = fastseq.accelerate(copy.deepcopy(theirs))
        by_name = {f"{OURS} {name}": partial(self._by_name, name, ours) for name in BY_NAME if self.is_recurrent}
        return {OURS: partial(self._call, ours), **by_name, "torch": partial(self._call, theirs)}

    def _by_name(self, implementation: str, layer: nn.Module, inputs: list[Tensor]) -> Call:
        import fastseq
        from fastseq.registry import OPS

        op = OPS["rnn_tanh" if self.kind == "RNN" else self.kind.lower()]
        impl = next((impl for impl in op.impls if impl.name == implementation), None)
        if impl is None:
            raise AbsentError(f"{op.name} has none")
        if (reason := op.reason_against(impl, inputs[0].device.type, self.dtype)) is not None:
            raise AbsentError(reason)
        call = self._call(layer, inputs)

        def call_by_name() -> Sequence[Tensor]:
            with fastseq.use_backend(implementation):
                return call()

        return call_by_name

    def exact(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        wide = copy.deepcopy(self._layer(str(inputs[0].device))).double()
        return self._call(wide, [t.double() for t in inputs])()


@dataclass(frozen=True)
class Decoder:
    """A recurrent decoder of [B, T, H] that looks at a memory [B, S, 2*H] at every step, by `AdditiveAttention` before
    its steps or by `LuongAttention` after them; torch's are a loop over its cells.
    """

    cell: str
    attend: str
    B: int
    T: int
    S: int
    H: int
    dtype: torch.dtype = torch.bfloat16
    training: bool = False

    op = "attention_decoder"

    def small(self) -> "Decoder":
        return Decoder(**{**asdict(self), "B": 2, "T": 5, "S": 7, "H": 24})

    def inputs(self, device: str) -> list[Tensor]:
        sequence, memory = (self.B, self.T, self.H), (self.B, self.S, 2 * self.H)
        shapes = [sequence, memory, *([sequence] if self.training else [])]
        return [torch.randn(shape, device=device, dtype=self.dtype) for shape in shapes]

    @cache  # noqa: B019  (a handful of cases)
    def _decoder(self, device: str) -> nn.Module:
        from fastseq.nn import AdditiveAttention, AttentionDecoder, LuongAttention

        torch.manual_seed(0)
        attention = (AdditiveAttention if self.attend == "before" else LuongAttention)(self.H, 2 * self.H)
        decoder = AttentionDecoder(self.H, self.H, attention, self.cell, self.attend, batch_first=True)
        return decoder.to(device, self.dtype)

    def _loop(self, device: str) -> nn.Module:
        """The same with an attention of another class: then the decoder takes one step after the other."""
        decoder: Any = copy.deepcopy(self._decoder(device))
        decoder.attention.__class__ = type("Attention", (type(decoder.attention),), {})
        return decoder

    def _call(self, decoder: nn.Module, inputs: list[Tensor]) -> Call:
        x, memory, *dout = inputs
        if not self.training:
            return lambda: [decoder(x, memory).hidden]
        leaves = [t.detach().requires_grad_() for t in (x, memory)]

        def call() -> Sequence[Tensor]:
            hidden = decoder(*leaves).hidden
            return [hidden, *torch.autograd.grad(hidden, [*leaves, *decoder.parameters()], dout)]

        return call

    def contestants(self, device: str) -> dict[str, Callable[[list[Tensor]], Call]]:
        decoders = {OURS: self._decoder(device), "torch": self._loop(device)}
        return {name: partial(self._call, decoder) for name, decoder in decoders.items()}

    def exact(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        return self._call(self._loop(str(inputs[0].device)).double(), [t.double() for t in inputs])()


@dataclass(frozen=True)
class Fused:
    """What lies between a transformer's dense layers, on [rows, columns]: gelu(x + bias), dropped, or
    layer_norm(residual + x), x dropped, or the mean of cross entropies.
    """

    op: str
    rows: int
    columns: int
    dtype: torch.dtype = torch.bfloat16
    training: bool = False
    dropout: float = 0.0

    def small(self) -> "Fused":
        return Fused(**{**asdict(self), "rows": 7, "columns": 40})

    def inputs(self, device: str) -> list[Tensor]:
        kind = dict(device=device, dtype=self.dtype)
        x, other = torch.randn(2, self.rows, self.columns, **kind).unbind()
        if self.op == "cross_entropy":
            return [x, torch.randint(self.columns, (self.rows,), device=device)]
        parameters = torch.randn(2, self.columns, **kind).unbind()
        return [x, parameters[0], other] if self.op == "activation" else [x, other, *parameters, torch.randn_like(x)]

    def _ours(self, *inputs: Tensor) -> Tensor:
        from fastseq.functional import add_norm, bias_activation, cross_entropy

        if self.op == "cross_entropy":
            return cross_entropy(*inputs)
        if self.op == "activation":
            return bias_activation(*inputs, activation="gelu", dropout_p=self.dropout)
        return add_norm(*inputs, dropout_p=self.dropout)

    def _torchs(self, x: Tensor, other: Tensor, *rest: Tensor) -> Tensor:
        if self.op == "cross_entropy":
            return F.cross_entropy(x, other)
        if self.op == "activation":
            return F.dropout(F.gelu(x + other), self.dropout)
        return F.layer_norm(other + F.dropout(x, self.dropout), x.shape[1:], *rest)

    def _call(self, function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
        if self.op == "cross_entropy":
            x, target = inputs
            return step(function, [x], [target], x.new_ones(()) if self.training else None)
        *leaves, dout = inputs
        return step(function, leaves, [], dout) if self.training else lambda: [function(*leaves)]

    def contestants(self, device: str) -> dict[str, Callable[[list[Tensor]], Call]]:
        return {OURS: partial(self._call, self._ours), "torch": partial(self._call, self._torchs)}

    def exact(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        import fastseq

        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        if not self.dropout:
            return self._call(self._torchs, wide)()
        torch.manual_seed(SEED)
        with fastseq.use_backend("reference"):
            return self._call(self._ours, wide)()


def cases() -> list[Case]:
    both: list[Case] = []
    for training in (False, True):
        both += [
            *(
                Attention(B, 16, S, 64, training=training, causal=causal)
                for B, S in ((64, 256), (4, 4096))
                for causal in (False, True)
            ),
            Attention(4, 16, 4096, 128, training=training),
            Attention(4, 16, 4096, 128, training=training, causal=True),
            Attention(4, 16, 4096, 128, torch.float16, training=training, causal=True),
            Attention(4, 16, 2048, 64, torch.float32, training=training, causal=True),
            Attention(16, 16, 1024, 64, training=training, padded=True, dropout=0.1 * training),
            Attention(16, 16, 1024, 64, training=training, causal=True, padded=True),
            Attention(4, 16, 1024, 64, training=training, bias=True),
            Layer("MultiheadAttention", 64, 256, 512, 8, training=training),
            Layer("MultiheadAttention", 64, 64, 512, 8, training=training),
            Layer("TransformerEncoderLayer", 64, 64, 512, 8, training=training),
            Layer("TransformerEncoderLayer", 8, 1024, 1024, 16, training=training),
            Decoder("gru", "before", 64, 50, 50, 512, training=training),
            Decoder("lstm", "after", 64, 50, 50, 512, training=training),
            Decoder("gru", "before", 16, 100, 400, 1024, training=training),
            Fused("activation", 16384, 4096, training=training, dropout=0.1 * training),
            Fused("norm", 16384, 1024, training=training, dropout=0.1 * training),
            Fused("norm", 4096, 8192, training=training),
            Fused("cross_entropy", 8192, 32000, training=training),
        ]
        for kind in ("LSTM", "GRU", "RNN"):
            for dtype in (torch.bfloat16, torch.float32):
                both += [Layer(kind, B, 512, H, H, dtype, training) for H in (256, 512, 768, 1024) for B in (1, 16, 64)]
        # Those for which torch takes cuDNN's persistent kernels.
        both += [Layer("LSTM", B, 512, H, H, torch.float16, training) for H in (256, 512, 1024) for B in (16, 64)]
    return [*both, Attention(16, 32, 8192, 128, queries=1)]


@dataclass
class Outcome:
    op: str
    case: str
    served_by: str
    median_seconds: dict[str, float] = field(default_factory=dict)
    microseconds_a_step: dict[str, float] = field(default_factory=dict)  # of a recurrent layer
    absent: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # of root mean squares, over those of the exact results


def race(case: Case, device: str) -> Outcome:
    """Compares and then times all contestants.

    Raises:
        AssertionError: fastseq's results are further from the exact ones than anyone's should be.
    """
    from fastseq import BackendError

    torch.manual_seed(0)
    inputs = case.inputs(device)
    outcome = Outcome(case.op, describe(case), served_by(case, device))
    expected = case.exact(inputs)
    makers = {}
    for name, make in case.contestants(device).items():
        try:
            torch.manual_seed(SEED)
            results = make(inputs)()
        except torch.OutOfMemoryError:
            outcome.absent[name] = "out of memory"
        except Exception as error:
            if name.startswith(OURS) and not isinstance(error, (AbsentError, BackendError)):
                raise
            kind = "" if isinstance(error, AbsentError) else f"{type(error).__name__}: "
            outcome.absent[name] = f"{kind}{str(error).strip().splitlines()[0][:100]}"
        else:
            outcome.errors[name] = max(
                ((got.to(want.dtype) - want).norm() / want.norm().clamp(min=1e-30)).item()
                for got, want in zip(results, expected, strict=True)
            )
            makers[name] = make
        if device == "cuda":
            torch.cuda.empty_cache()
    # Dropout's other draws are no errors.
    peers = [n for n in outcome.errors if not n.startswith(OURS) and not getattr(case, "dropout", 0)]
    least = min((outcome.errors[name] for name in peers), default=0.0)
    allowed = max(WORSE * least, NOTHING * torch.finfo(case.dtype).eps)
    for name, error in outcome.errors.items():
        assert not name.startswith(OURS) or error <= allowed, (
            f"{outcome.case}: {name} has an error of {error:.1e}, not {allowed:.1e}"
        )
    if device == "cuda":
        del expected
        outcome.median_seconds = clock(makers, case, inputs)
        if isinstance(case, Layer) and case.is_recurrent:
            outcome.microseconds_a_step = {name: 1e6 * s / case.T for name, s in outcome.median_seconds.items()}
    return outcome


def clock(makers: dict[str, Callable[[list[Tensor]], Call]], case: Case, inputs: list[Tensor]) -> dict[str, float]:
    """Median seconds a call, by name."""
    size = sum(t.numel() * t.element_size() for t in inputs)
    copies = 1 + COPIES_OF_L2 * torch.cuda.get_device_properties(0).L2_cache_size // size
    sets = [inputs, *(case.inputs("cuda") for _ in range(copies - 1))]
    calls = {name: [make(s) for s in sets] for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for of_one in calls.values():
        for call in of_one[:WARM_UP_CALLS]:
            call()
    for turn in range(ROUNDS):
        for name, of_one in calls.items():
            if sum(times[name]) < SECONDS:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                of_one[turn % copies]()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: median(of_one) for name, of_one in times.items()}


def describe(case: Any) -> str:
    """The case's fields that are not the usual ones."""
    given = {f: getattr(case, f) for f, d in case.__dataclass_fields__.items() if getattr(case, f) != d.default}
    given.setdefault("dtype", case.dtype)
    return " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in given.items())


def served_by(case: Case, device: str) -> str:
    """What serves fastseq's part: torch, where there is no kernel yet."""
    import fastseq
    from fastseq.registry import OPS

    if isinstance(case, Layer):
        layer = fastseq.accelerate(copy.deepcopy(case._layer(device)))
        return fastseq.explain(layer).rows[0].served_by
    op = OPS[case.op]
    return op.candidates(device, op.computes_in(device, case.dtype))[0].name


def facts() -> dict[str, Any]:
    """What was measured where."""
    import triton

    import fastseq

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    found = dict(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit or "unknown",
        fastseq=fastseq.__version__,
        torch=torch.__version__,
        triton=triton.__version__,
        python=platform.python_version(),
    )
    if torch.cuda.is_available():
        from fastseq.selfcheck import architecture, driver

        found |= dict(
            gpu=torch.cuda.get_device_name(),
            architecture=architecture("cuda"),
            driver_cuda=driver("cuda"),
            cudnn=str(torch.backends.cudnn.version()),
        )
    return found


def environment(out: Path) -> dict[str, str]:
    """Everything that is written goes to the folder, and the build in it is what is imported."""
    places = {
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "FASTSEQ_CACHE": "selfcheck",
        "XDG_CACHE_HOME": "cache",
        "CUDA_CACHE_PATH": "cuda",
        "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis",
        "TMPDIR": "tmp",
    }
    for place in places.values():
        (out / place).mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        **{name: str(out / place) for name, place in places.items()},
        "PYTHONPATH": os.pathsep.join([str(out / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def exit_of(what: str, command: list[str], out: Path, **more: str) -> int:
    """Runs a step, with its output in a file."""
    log = out / f"{what}.log"
    print(f"{what}, see {log}", flush=True)
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, env={**environment(out), **more}, stdout=file, stderr=subprocess.STDOUT
        )
    return done.returncode


def run(what: str, command: list[str], out: Path, **more: str) -> None:
    """Runs a step of this Python's and ends everything where it fails."""
    if exit_of(what, [sys.executable, *command], out, **more):
        log = out / f"{what}.log"
        print("".join(log.read_text().splitlines(keepends=True)[-20:]))
        sys.exit(f"{what} failed, see {log}")


def build(out: Path, dry: bool) -> None:
    """The extension, with CUDA kernels for this machine's GPU."""
    base = str(out / "build")
    more = {}
    if not dry:
        major, minor = torch.cuda.get_device_capability()
        more = dict(FASTSEQ_REQUIRE="cpp,cuda", TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")
    Path(base).mkdir(parents=True, exist_ok=True)
    run(
        "build",
        [
            "setup.py",
            "-q",
            "egg_info",
            "--egg-base",
            base,
            "build",
            "--build-base",
            base,
            "--build-lib",
            str(out / "lib"),
        ],
        out,
        **more,
    )


def small_steps() -> None:
    """What compute-sanitizer watches: small layers by the CUDA kernels, forward and backward."""
    import fastseq
    from fastseq.ops.gru import GRU
    from fastseq.ops.lstm import LSTM
    from fastseq.ops.recurrent import SELF_CHECK_CASES
    from fastseq.ops.rnn import RNN_RELU, RNN_TANH

    signal.alarm(SANITIZER_SECONDS)  # that ends it
    with fastseq.use_backend("cuda"), torch.autograd.set_multithreading_enabled(False):
        for op in (LSTM, GRU, RNN_TANH, RNN_RELU):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for case in SELF_CHECK_CASES:
                    arguments = case.arguments(op, "cuda", dtype)
                    op(arguments._replace(x=arguments.x.requires_grad_())).y.sum().backward()
        torch.cuda.synchronize()


def sanitize(out: Path) -> dict[str, str]:
    """What each of compute-sanitizer's tools has to say of the CUDA kernels."""
    found = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if found is None:
        return dict.fromkeys(SANITIZERS, "compute-sanitizer is not there")
    options = subprocess.run([found, "--help"], capture_output=True, text=True).stdout
    flag = next((flag for flag in ("--kernel-name", "--kernel-regex") if flag in options), None)  # new and old name
    watch = [found, "--error-exitcode", str(FOUND), *([flag, KERNELS] if flag else [])]
    verdicts = {}
    for tool in SANITIZERS:
        code = exit_of(tool, [*watch, "--tool", tool, sys.executable, __file__, "--small-steps"], out)
        verdicts[tool] = {0: "clean", FOUND: f"found errors, see {tool}.log"}.get(
            code, f"no verdict (exit {code}), see {tool}.log"
        )
    return verdicts


def race_all(out: Path, dry: bool, only: str) -> None:
    """Runs in a process of its own, which imports what was built."""
    device = "cpu" if dry else "cuda"
    outcomes, wrong = [], []
    chosen = [case for case in cases() if only in f"{case.op} {describe(case)}"]
    for case in dict.fromkeys(case.small() for case in chosen) if dry else chosen:
        try:
            with torch.autograd.set_multithreading_enabled(False):  # backward, too, is to see what use_backend says
                outcome = race(case, device)
        except AssertionError as error:  # a result: it is named, and the others still race
            wrong.append(str(error))
            continue
        outcomes.append(asdict(outcome))
        ours = outcome.median_seconds.get(OURS)
        ratios = [f"{n} {t / ours:.2f}" for n, t in outcome.median_seconds.items() if ours and n != OURS]
        absent = [f"{n} is absent: {reason}" for n, reason in outcome.absent.items()]
        print(
            f"{case.op} {outcome.case}: {outcome.served_by}; times over fastseq's:",
            "; ".join([", ".join(ratios) or "-", *absent]),
            flush=True,
        )
    verdicts = json.loads((out / "sanitizers.json").read_text())
    results = dict(facts=facts(), sanitizers=verdicts, wrong=wrong, races=[] if dry else outcomes)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    if wrong:
        sys.exit("\n".join(["wrong results:", *wrong]))


def main(
    out: Annotated[Path, typer.Option(help="the folder for everything that is written")] = Path("out/gpu-check"),
    dry: Annotated[bool, typer.Option(help="without a GPU: see that everything could run")] = False,
    only: Annotated[str, typer.Option(help="races with this in their descriptions, such as 'LSTM B=16'")] = "",
    races: Annotated[bool, typer.Option("--races", hidden=True)] = False,
    small: Annotated[bool, typer.Option("--small-steps", hidden=True)] = False,
) -> None:
    """Builds fastseq, runs its tests on the GPU, and races it against torch."""
    out = out.resolve()
    if small:
        small_steps()
        return
    if races:
        race_all(out, dry, only)
        return
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        print(NO_GPU, flush=True)
        if not dry:
            sys.exit(1)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"Python packages that are not there: {', '.join(missing)}")
    out.mkdir(parents=True, exist_ok=True)
    build(out, dry)
    tests = ["-m", "pytest", "tests", "-m", "gpu", "-p", "no:cacheprovider", "-q"]
    run("tests", [*tests, *(["--collect-only"] if dry else [])], out, FASTSEQ_REQUIRE="" if dry else "triton,cuda")
    verdicts = dict.fromkeys(SANITIZERS, "a dry run") if dry else sanitize(out)
    (out / "sanitizers.json").write_text(json.dumps(verdicts))
    run("races", [__file__, "--races", "--out", str(out), "--only", only, *(["--dry"] if dry else [])], out)
    print("; ".join(f"{tool}: {verdict}" for tool, verdict in verdicts.items()))
    print(f"nothing was measured: a dry run, in {out}" if dry else f"results in {out / 'results.json'}")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
