"""Peak extra memory of one training step, ours and torch's, each in a process of its own: `python benches/memory.py`.

What counts is how far the resident set rises above where it stood before the step (Linux only).
"""

import subprocess
import sys
from pathlib import Path

import attention
import recurrent
import torch
from peers import call_of
from race import job_of

# Each with a small case of its kind, whose step loads what loads on first use.
CASES = [
    *((case, recurrent.Case(3, 2, 4)) for case in recurrent.SHAPES),
    (attention.Case(1, 8192), attention.Case(1, 64)),
    (attention.Case(1, 8192, causal=True), attention.Case(1, 64, causal=True)),
]
MIB = 2**20


def peak_rise(name: str, who: str) -> float:
    """MiB that one forward and backward of a case add at their peak."""
    case, small = next((case, small) for case, small in CASES if str(case) == name)
    jobs = [job_of(case, training=True, threads=torch.get_num_threads()) for case in (small, case)]
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
        print(f"{'case':32} {'torch MiB':>10} {'fastseq MiB':>12}")
        for case, _ in CASES:
            rises = [
                float(subprocess.check_output([sys.executable, __file__, str(case), who]))
                for who in ("torch", "fastseq")
            ]
            print(f"{case!s:32} {rises[0]:10.1f} {rises[1]:12.1f}")
