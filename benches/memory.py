"""Peak extra memory of one training step, ours and torch's, each in a process of its own: `python benches/memory.py`.

What counts is how far the resident set rises above where it stood before the step (Linux only).
"""

import subprocess
import sys
from pathlib import Path

import torch
from recurrent import SHAPES as CASES

import fastseq

MIB = 2**20


def peak_rise(name: str, accelerated: bool) -> float:
    """MiB that one forward and backward of a case add at their peak."""
    case = next(case for case in CASES if str(case) == name)
    layer, warm_up = case.layer(), torch.nn.LSTM(4, 4)
    if accelerated:
        fastseq.accelerate(layer), fastseq.accelerate(warm_up)
    warm_up(torch.randn(3, 2, 4))[0].sum().backward()  # loads what loads on first use
    x, dy = case.input().requires_grad_(), case.output_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    layer(x)[0].backward(dy)
    return (status("VmHWM") - before) / MIB


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak_rise(sys.argv[1], sys.argv[2] == "fastseq"))
    else:
        print(f"{'case':32} {'torch MiB':>10} {'fastseq MiB':>12}")
        for case in CASES:
            rises = [
                float(subprocess.check_output([sys.executable, __file__, str(case), who]))
                for who in ("torch", "fastseq")
            ]
            print(f"{case!s:32} {rises[0]:10.1f} {rises[1]:12.1f}")
