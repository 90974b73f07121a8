"""Peak extra memory of one training step, ours and torch's, each in a process of its own: `python benches/memory.py`.

What counts is how far the resident set rises above where it stood before the step (Linux only).
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attention
import recurrent
import torch
from bench_fused import loss
from peers import call_of
from race import job_of

MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """A case, and a small one of its kind, whose step loads what loads on first use."""

    layer: str
    case: Any
    small: Any
    smoke: bool = False

    def __str__(self) -> str:
        return f"{self.layer} {self.case}"


CASES = {
    str(measured): measured
    for measured in [
        *(Measured("LSTM", case, recurrent.Case(3, 2, 4)) for case in recurrent.SHAPES),
        *(Measured("attention", attention.Case(1, S), attention.Case(1, 64)) for S in (2048, 4096, 8192)),
        Measured("attention", attention.Case(1, 8192, causal=True), attention.Case(1, 64, causal=True)),
        Measured("cross entropy", loss(2048, 32000), loss(32, 10)),
    ]
}
# In the report.
REPORTED = [
    "LSTM T100_B128_H512",
    "attention B1_H8_S2048_D64",
    "attention B1_H8_S4096_D64",
    "cross entropy loss-2048x32000",
]


def measure(name: str, who: str) -> float:
    """MiB that one forward and backward of a case add at their peak, in a process of its own."""
    return float(subprocess.check_output([sys.executable, __file__, name, who]))


def peak_rise(name: str, who: str) -> float:
    """The same in this process."""
    measured = CASES[name]
    jobs = [job_of(case, True, torch.get_num_threads()) for case in (measured.small, measured.case)]
    tasks = [job.ours if who == "fastseq" else job.task for job in jobs]
    warm_up, step = (call_of(task.layer, task) for task in tasks)
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    step()
    return (status("VmHWM") - before) / MIB


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak_rise(*sys.argv[1:]))
    else:
        print(f"{'case':40} {'torch MiB':>10} {'fastseq MiB':>12}")
        for name in CASES:
            rises = [measure(name, who) for who in ("torch", "fastseq")]
            print(f"{name:40} {rises[0]:10.1f} {rises[1]:12.1f}")
