"""Who races: each peer is one function from a job to the call that is timed, and one row in `PEERS`."""

import copy
import importlib.util
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import fastseq

# Unrolling a long sequence can keep a compiler busy for an hour.
COMPILE_LIMIT_S = 15

# ONNX's name of a layer, its order of gates, as positions in torch's, and what sets it to torch's formulas.
ONNX_LAYERS = {
    nn.LSTM: ("LSTM", (0, 3, 1, 2), {}),
    nn.GRU: ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    nn.RNN: ("RNN", (0,), {}),
}
ONNX_OPSET, ONNX_IR = 17, 9


class AbsentError(Exception):
    """A peer cannot take part in a case; the message says why, in a few words."""


@dataclass(frozen=True)
class Job:
    """What a peer is asked for: the output y of `layer` on `x` and, with a `dy`, the gradients that gives.

    A peer's call returns [y], or [y, dx, *gradients of the parameters]. The layer stays as it is: peers that
    run in torch work on a copy.
    """

    layer: nn.Module
    x: Tensor
    dy: Tensor | None
    threads: int
    plain: tuple[nn.Module, Tensor, Tensor] | None = None  # the layer, x and dy that the peer `plain` runs


Call = Callable[[], Sequence[Any]]


def call_of(module: Callable[[Tensor], tuple[Tensor, Any]], layer: nn.Module, x: Tensor, dy: Tensor | None) -> Call:
    """The call of a module that runs in torch; `layer` holds its parameters."""
    if dy is None:
        return lambda: [module(x)[0]]
    leaves = [x.detach().clone().requires_grad_(), *layer.parameters()]

    def step() -> list[Tensor | None]:
        for leaf in leaves:
            leaf.grad = None
        y = module(leaves[0])[0]
        y.backward(dy)
        return [y, *(leaf.grad for leaf in leaves)]

    return step


def exact(job: Job) -> Sequence[Tensor]:
    """What every peer should return, computed in float64."""
    layer = copy.deepcopy(job.layer).double()
    with fastseq.use_backend("reference"):  # for what only fastseq has
        return call_of(layer, layer, job.x.double(), None if job.dy is None else job.dy.double())()


def fastseq_call(job: Job) -> Call:
    layer = fastseq.accelerate(copy.deepcopy(job.layer))
    return call_of(layer, layer, job.x, job.dy)


def torch_call(job: Job) -> Call:
    layer = copy.deepcopy(job.layer)
    return call_of(layer, layer, job.x, job.dy)


def plain_call(job: Job) -> Call:
    if job.plain is None:
        raise AbsentError("-")
    layer, x, dy = job.plain
    return call_of(fastseq.accelerate(layer), layer, x, None if job.dy is None else dy)


def compile_call(job: Job) -> Call:
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()  # earlier cases would make the shapes of this one dynamic, and slower
    torch._dynamo.config.allow_rnn = True
    torch._inductor.config.compile_threads = 1  # no worker is left compiling while others are timed
    layer = copy.deepcopy(job.layer)
    call = call_of(torch.compile(layer, dynamic=False), layer, job.x, job.dy)
    try:
        with time_limit(COMPILE_LIMIT_S):
            call()
    except OutOfTime:
        torch._dynamo.reset()
        raise AbsentError(f"compiles > {COMPILE_LIMIT_S} s") from None
    except Exception as error:  # whatever stops a compiler, the others still race
        raise AbsentError(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}") from error
    return call


def onnxruntime_call(job: Job) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(onnx_model(job), options, providers=["CPUExecutionProvider"])
    feed = {"x": job.x.numpy()}
    return lambda: session.run(None, feed)


def openvino_call(job: Job) -> Call:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(core.read_model(onnx_model(job)), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(job.x.numpy(), shared_memory=True))

    def step() -> list[Any]:
        request.infer()
        return [request.get_output_tensor().data]

    return step


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
    """

    name: str
    prepare: Callable[[Job], Call]
    modes: tuple[str, ...] = ("inference", "training")
    requires: tuple[str, ...] = ()
    alone: bool = False
    same: bool = True

    def call(self, job: Job) -> Call:
        """The call for this job.

        Raises:
            AbsentError: this peer cannot do it here.
        """
        if not all(importlib.util.find_spec(module) for module in self.requires):
            raise AbsentError("not installed")
        return self.prepare(job)


FASTSEQ = Peer("fastseq", fastseq_call)
PEERS = [
    Peer("torch", torch_call),
    Peer("plain", plain_call, same=False),
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


def onnx_model(job: Job) -> bytes:
    """The recurrent layer of a job as a serialised ONNX model from x [T, B, I] to y [T, B, D*H]."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    layer = job.layer
    op, order, attributes = ONNX_LAYERS[type(layer)]
    T, B, _ = job.x.shape
    suffixes = ("", "_reverse") if layer.bidirectional else ("",)
    shape = [T, B, len(suffixes) * layer.hidden_size]

    def reordered(name: str) -> np.ndarray:
        gates = np.split(getattr(layer, name).detach().numpy(), len(order))
        return np.concatenate([gates[k] for k in order])

    constants = {"shape": np.array(shape)}
    nodes, x = [], "x"
    for n in range(layer.num_layers):
        directions = [f"l{n}{suffix}" for suffix in suffixes]
        constants[f"W{n}"] = np.stack([reordered(f"weight_ih_{d}") for d in directions])
        constants[f"R{n}"] = np.stack([reordered(f"weight_hh_{d}") for d in directions])
        constants[f"B{n}"] = np.stack(
            [np.concatenate([reordered(f"bias_ih_{d}"), reordered(f"bias_hh_{d}")]) for d in directions]
        )
        # ONNX's output is [T, D, B, H].
        nodes += [
            helper.make_node(
                op,
                [x, f"W{n}", f"R{n}", f"B{n}"],
                [f"TDBH{n}"],
                hidden_size=layer.hidden_size,
                direction="bidirectional" if layer.bidirectional else "forward",
                **attributes,
            ),
            helper.make_node("Transpose", [f"TDBH{n}"], [f"TBDH{n}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"TBDH{n}", "shape"], [f"y{n}"]),
        ]
        x = f"y{n}"
    graph = helper.make_graph(
        nodes,
        op,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(job.x.shape))],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=ONNX_IR)
    return model.SerializeToString()
