"""What comes before the second call: imports, a first call, compiling. Each in a process of its own.

`python benches/first_call.py LAYER HOW` is that process. Caches of compiled code are an empty folder.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

# Compiling can take minutes.
LIMIT_S = 60


@dataclass(frozen=True)
class FirstCall:
    """Of a layer, in inference, by torch, fastseq, fastseq's kernels in numba or torch.compile."""

    layer: str
    how: str
    smoke: bool = False

    def __str__(self) -> str:
        return f"{self.layer}-{self.how}"

    @property
    def keeps(self) -> bool:
        """Whether what was compiled is kept for the next process."""
        return self.how in ("numba", "torch.compile")


# torch.compile unrolls recurrent layers, which takes longer than the limit.
CASES = [
    *(FirstCall(layer, how, smoke=layer == "LSTM" and how == "fastseq")
      for layer in ("LSTM", "GRU") for how in ("torch", "fastseq", "numba")),
    *(FirstCall("attention", how) for how in ("torch", "fastseq", "numba", "torch.compile")),
    *(FirstCall("TransformerEncoderLayer", how) for how in ("torch", "fastseq", "torch.compile")),
]  # fmt: skip


def measure(case: FirstCall) -> list[dict[str, float | str]]:
    """Seconds of the parts, in a process that finds nothing compiled and, where something is kept, in the next one.

    Files are in memory: the first process of all would read them from a disk, and it is torch's.

    A process that fails or takes longer than the limit has the one entry `absent`, the reason.
    """
    read_files()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FASTSEQ_CACHE": f"{folder}/fastseq", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch"}
        if case.how == "numba":
            environment["FASTSEQ_BACKEND"] = "numba"
        for _ in range(2 if case.keeps else 1):
            command = [sys.executable, __file__, case.layer, case.how]
            try:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                return [*found, {"absent": f"> {LIMIT_S} s"}]
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
                return [*found, {"absent": said[-1][:80]}]
            found.append(json.loads(done.stdout))
    return found


@cache
def read_files() -> None:
    subprocess.run([sys.executable, "-c", "import torch, fastseq"], capture_output=True)


def child(layer: str, how: str) -> dict[str, float]:
    seconds, start = {}, time.perf_counter()

    def lap(part: str) -> None:
        nonlocal start
        seconds[part], start = time.perf_counter() - start, time.perf_counter()

    import torch

    lap("import torch")
    if how in ("fastseq", "numba"):
        import fastseq

        lap("import fastseq")
    module, inputs = {"LSTM": recurrent, "GRU": recurrent, "attention": attention}.get(layer, dense)(layer, how)
    if how == "torch.compile":
        module = torch.compile(module)
    elif how != "torch" and isinstance(module, torch.nn.Module):
        module = fastseq.accelerate(module)
    with torch.no_grad():
        for part in ("first call", "second call"):
            start = time.perf_counter()
            module(*inputs)
            lap(part)
    return seconds


def recurrent(layer: str, how: str) -> tuple[Any, Any]:
    import torch

    return getattr(torch.nn, layer)(256, 256), (torch.randn(100, 1, 256),)


def attention(layer: str, how: str) -> tuple[Any, Any]:
    import torch

    inputs = tuple(torch.randn(4, 8, 512, 64) for _ in range(3))
    if how in ("torch", "torch.compile"):
        return torch.nn.functional.scaled_dot_product_attention, inputs
    from fastseq.functional import scaled_dot_product_attention

    return scaled_dot_product_attention, inputs


def dense(layer: str, how: str) -> tuple[Any, Any]:
    import torch

    return torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True).eval(), (torch.randn(8, 128, 512),)


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:])))
