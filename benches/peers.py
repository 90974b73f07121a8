"""Who races: each peer is one function from a job to the call that is timed, and one row in `PEERS`."""

import copy
import importlib.util
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq.registry import OPS, _requested

# Unrolling a long sequence can keep a compiler busy for an hour.
COMPILE_LIMIT_S = 15

# What those who draw random numbers begin from when results are compared.
SEED = 5


OUTPUTS = ("y", "weights")  # the names of those that count as results


class AbsentError(Exception):
    """A peer cannot take part in a case; the message says why, in a few words."""


@dataclass(frozen=True)
class Task:
    """A layer and what it is called with.

    Attributes:
        layer: called with all inputs in their order; returns a tuple.
        inputs: by name.
        dy: the gradient of the first output, in training.
        outputs: how many of the layer's outputs count as results.
        aligned: brings an output, or the gradient of an input, into the form that all tasks of a job share.
        by_norm: gradients are compared by their norms, not by their elements.
    """

    layer: nn.Module
    inputs: dict[str, Tensor]
    dy: Tensor | None = None
    outputs: int = 1
    aligned: Callable[[Tensor], Tensor] = lambda result: result
    by_norm: bool = False

    @property
    def names(self) -> list[str]:
        """Of its results: the outputs and, in training, the gradients of inputs and parameters."""
        outputs = OUTPUTS[: self.outputs]
        return [*outputs] if self.dy is None else [*outputs, *(f"d{name}" for name in (*self.inputs, *self.trained))]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are, by name, and in the order of their names: peers may define them in another one."""
        return {name: p for name, p in sorted(self.layer.named_parameters()) if p.requires_grad}


@dataclass(frozen=True)
class Job:
    """What peers are asked for: the results of `task`, whose layer stays as it is.

    Attributes:
        task: torch's, and that of everyone who has none of his own here.
        ours: fastseq's.
        threads: what everyone gets.
        plain: what the peer `plain` does.
        transformers: makes the call of the peer `transformers`, a model like the task's of Hugging Face's.
        onnx_model: makes the task as a serialised ONNX model, whose inputs have the task's names.
        random: results are drawn: fastseq's must be those of its own reference with the same seed, everyone
            else's must be of the same size.
    """

    task: Task
    ours: Task
    threads: int
    plain: Task | None = None
    transformers: Callable[[], "Call"] | None = None
    onnx_model: Callable[[], bytes] | None = None
    random: bool = False


Call = Callable[[], Sequence[Any]]


def call_of(module: Callable[..., Any], task: Task) -> Call:
    """The call of a module that runs in torch; the task's layer holds its parameters."""
    if task.dy is None:
        inputs = list(task.inputs.values())
        return lambda: module(*inputs)[: task.outputs]
    leaves = [x.detach().clone().requires_grad_() for x in task.inputs.values()]
    count = len(leaves)
    leaves += task.trained.values()

    def step() -> list[Tensor | None]:
        for leaf in leaves:
            leaf.grad = None
        results = module(*leaves[:count])[: task.outputs]
        results[0].backward(task.dy)
        return [*results, *(leaf.grad for leaf in leaves)]

    return step


def exact(job: Job) -> Sequence[Tensor]:
    """What every peer should return, computed in float64."""
    task = job.ours if job.random else job.task
    wide = replace(
        task,
        layer=copy.deepcopy(task.layer).double(),
        inputs={name: x.double() for name, x in task.inputs.items()},
        dy=None if task.dy is None else task.dy.double(),
    )
    torch.manual_seed(SEED)
    with fastseq.use_backend("reference"):  # for what only fastseq has
        return [wide.aligned(result) for result in call_of(wide.layer, wide)()]


def fastseq_call(job: Job) -> Call:
    return call_of(job.ours.layer, job.ours)


def served_by(layer: nn.Module) -> set[str]:
    """The implementations that serve fastseq's layers; one that took torch's own path must show."""
    names = {row.served_by for row in fastseq.explain(layer).rows}
    if not names:  # a function's, which names its op
        names = {OPS[layer.op].candidates("cpu", torch.float32)[0].name}
    return names


def numba_call(job: Job) -> Call:
    """fastseq's own, served by numba wherever numba has a kernel."""
    here = copy_context()
    here.run(_requested.set, "numba")  # as use_backend does, but not anew in each call
    task = replace(job.ours, layer=copy.deepcopy(job.ours.layer))
    if "numba" not in here.run(served_by, task.layer):
        raise AbsentError("-")
    return partial(here.run, call_of(task.layer, task))


def torch_call(job: Job) -> Call:
    task = replace(job.task, layer=copy.deepcopy(job.task.layer))
    return call_of(task.layer, task)


def plain_call(job: Job) -> Call:
    if job.plain is None:
        raise AbsentError("-")
    return call_of(fastseq.accelerate(job.plain.layer), job.plain)


def transformers_call(job: Job) -> Call:
    if job.transformers is None:
        raise AbsentError("-")
    return job.transformers()


def compile_call(job: Job) -> Call:
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()  # earlier cases would make the shapes of this one dynamic, and slower
    torch._dynamo.config.allow_rnn = True
    torch._inductor.config.compile_threads = 1  # no worker is left compiling while others are timed
    task = replace(job.task, layer=copy.deepcopy(job.task.layer))
    call = call_of(torch.compile(task.layer, dynamic=False), task)
    try:
        with time_limit(COMPILE_LIMIT_S):
            call()
    except OutOfTime:
        torch._dynamo.reset()
        raise AbsentError(f"compiles > {COMPILE_LIMIT_S} s") from None
    except Exception as error:  # whatever stops a compiler, the others still race
        raise AbsentError(in_short(error)) from error
    return call


def onnxruntime_call(job: Job) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    with absent_if_unloaded():
        session = onnxruntime.InferenceSession(onnx_model(job), options, providers=["CPUExecutionProvider"])
    feed = {name: x.numpy() for name, x in job.task.inputs.items()}
    return lambda: session.run(None, feed)


def openvino_call(job: Job) -> Call:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with absent_if_unloaded():
        request = core.compile_model(core.read_model(onnx_model(job)), "CPU", settings).create_infer_request()
    for name, x in job.task.inputs.items():
        request.set_tensor(name, openvino.Tensor(x.numpy(), shared_memory=True))

    def step() -> list[Any]:
        request.infer()
        return [request.get_output_tensor(k).data for k in range(job.task.outputs)]

    return step


def onnx_model(job: Job) -> bytes:
    if job.onnx_model is None:
        raise AbsentError("-")
    return job.onnx_model()


@contextmanager
def absent_if_unloaded() -> Iterator[None]:
    """A runtime that does not know an operator of the model has no part in the race."""
    try:
        yield
    except AbsentError:
        raise
    except Exception as error:
        raise AbsentError(in_short(error)) from error


def in_short(error: Exception) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[:60]}".removesuffix(": ")


@dataclass(frozen=True)
class Peer:
    """A row of the table.

    Attributes:
        name: as in `--peers` and in the tables.
        prepare: makes the call; it may raise AbsentError.
        modes: what it can do.
        requires: the modules it needs.
        alone: it is timed on its own and then dropped, since its threads go on spinning after a call and slow
            whatever follows, by up to 2x on two cores.
        same: its results are those of the job, which is checked.
        ours: it is fastseq too, otherwise served: it can do every case, and nothing is gained by beating it.
    """

    name: str
    prepare: Callable[[Job], Call]
    modes: tuple[str, ...] = ("inference", "training")
    requires: tuple[str, ...] = ()
    alone: bool = False
    same: bool = True
    ours: bool = False

    def call(self, job: Job) -> Call:
        """The call for this job.

        Raises:
            AbsentError: this peer cannot do it here.
        """
        if not all(importlib.util.find_spec(module) for module in self.requires):
            raise AbsentError("not installed")
        return self.prepare(job)


FASTSEQ = Peer("fastseq", fastseq_call, ours=True)
PEERS = [
    Peer("torch", torch_call),
    Peer("numba", numba_call, requires=("numba",), ours=True),
    Peer("plain", plain_call, same=False),
    Peer("transformers", transformers_call, requires=("transformers",), same=False),
    Peer("torch.compile", compile_call),
    Peer("onnxruntime", onnxruntime_call, ("inference",), ("onnx", "onnxruntime"), alone=True),
    Peer("openvino", openvino_call, ("inference",), ("onnx", "openvino"), alone=True),
]


class OutOfTime(BaseException):
    """Not an Exception, which a compiler in the middle of its work might catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block when the time is over; there is no limit on systems without SIGALRM."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def expire(*_: Any) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, expire)
    # Again every second, in case that the first one is lost in a callback whose errors Python only prints.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
