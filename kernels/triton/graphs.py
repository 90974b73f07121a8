"""Many launches of the same kernels, one after the other, as one CUDA graph where that pays."""

import threading
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A launch costs several microseconds of Python, a graph's node about one of the GPU's; capturing costs as much as the
# launches themselves. So a series is captured when it comes for the second time, if it is long enough to matter.
_MIN_LAUNCHES = 16
_KEPT = 32  # graphs; they hold no tensors, only some kilobytes a node

_graphs: "OrderedDict[tuple[Any, ...], torch.cuda.CUDAGraph | None]" = OrderedDict()
_lock = threading.Lock()


class Launch(NamedTuple):
    """A kernel with all of its arguments but `first`, the step that it starts at."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # those of the kernel, and Triton's own such as num_warps

    def __call__(self, first: int) -> None:
        self.kernel[self.grid](first=first, **self.arguments)

    def key(self) -> tuple[Any, ...]:
        """Equal for launches that do the same to the same memory."""
        values = ((v.data_ptr(), v.dtype) if isinstance(v, Tensor) else v for v in self.arguments.values())
        return self.kernel, self.grid, *values


def run(launches: list[Launch], steps: int, device: torch.device) -> None:
    """Runs all of `launches` for step 0, then all for step 1, ..., in order on the current stream.

    A series on the same addresses as one before, as in a loop whose shapes do not change, is replayed as a CUDA graph.
    Nothing can be stale in it: a graph consists of nothing but the addresses and numbers that are its key, and the
    caller holds the tensors that are there now. Where the caller captures a graph, the launches become part of that.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on the current one
        graph = None
        long = device.type == "cuda" and steps * len(launches) >= _MIN_LAUNCHES
        if long and not torch.cuda.is_current_stream_capturing():
            graph = _graph(launches, steps, device)
        if graph is not None:
            graph.replay()
            return
        for step in range(steps):
            for launch in launches:
                launch(step)


def _graph(launches: list[Launch], steps: int, device: torch.device) -> "torch.cuda.CUDAGraph | None":
    """The series' graph, captured now if it is asked for the second time; None the first time."""
    key = (device.index, steps, *(launch.key() for launch in launches))
    with _lock:
        seen = key in _graphs
        graph = _graphs.pop(key, None)
        if seen and graph is None:
            graph = torch.cuda.CUDAGraph()
            # Capturing needs a stream of its own. Nothing is allocated or run on it, so it needs no waiting either.
            # Other threads may go on using CUDA meanwhile.
            with torch.cuda.stream(torch.cuda.Stream(device)):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    for step in range(steps):
                        for launch in launches:
                            launch(step)
                finally:
                    graph.capture_end()
        _graphs[key] = graph
        if len(_graphs) > _KEPT:
            _graphs.popitem(last=False)
    return graph
