"""The roofline: the least time that a case can take on this machine, from rates measured in the same run,
at its start and at its end, since a machine may be busy at one of them.

A case states its FLOPs and its memory traffic. The floor is the larger of FLOPs / FMA peak and the sum over
the traffic of bytes / read bandwidth. The bandwidth is that of the fastest level of the memory hierarchy that
holds the footprint: what is touched between two reads of the same byte. Levels that each core has for itself
count once for each thread. The floor knows no synchronisation, no transcendental functions and no cost of
writing: nothing reaches it.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=gnu++17", "-O3", "-march=native", "-ffp-contract=fast", "-pthread"]

# Where the machine does not tell: bytes of L1 and L2 per core, of L3 for all.
TYPICAL_CACHES = {"L1": 32 << 10, "L2": 512 << 10, "L3": 32 << 20}


class UnmeasuredError(Exception):
    """The machine's rates could not be measured; the message says why."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a call reads or writes, and the footprint they come round in."""

    bytes: int
    footprint: int


@dataclass(frozen=True)
class Roofline:
    """What the machine can do with the run's threads: GFLOP/s in float32, and GB/s and bytes by level."""

    gflops: float
    gb_per_s: dict[str, float]
    capacity: dict[str, int]

    def floor(self, flops: int, traffic: Iterable[Traffic]) -> float:
        """The least seconds for these FLOPs and this traffic."""
        return max(flops / self.gflops, sum(t.bytes / self._bandwidth(t.footprint) for t in traffic)) / 1e9

    def _bandwidth(self, footprint: int) -> float:
        # A level measured slower than one behind it, as on a busy machine, must not raise the floor.
        levels = [level for level in self.gb_per_s if footprint <= self.capacity.get(level, footprint)]
        return max(self.gb_per_s[level] for level in levels)

    def best_of(self, other: "Roofline") -> "Roofline":
        """With the larger of each of two measurements' rates."""
        rates = {level: max(rate, other.gb_per_s[level]) for level, rate in self.gb_per_s.items()}
        return replace(self, gflops=max(self.gflops, other.gflops), gb_per_s=rates)

    def __str__(self) -> str:
        reads = ", ".join(f"{level} {rate:.0f}" for level, rate in self.gb_per_s.items())
        return f"{self.gflops:.0f} GFLOP/s; reads in GB/s: {reads}"


def measure(threads: int) -> Roofline:
    """Builds roofline.cpp for this very machine and runs it, in about three seconds.

    Raises:
        UnmeasuredError: there is no compiler, or it or the program failed.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise UnmeasuredError("no C++ compiler (c++, or the one that CXX names)")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "roofline")
        for command in ([compiler, *FLAGS, str(SOURCE), "-o", program], [program, str(threads)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UnmeasuredError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:200]}")
    rates = json.loads(done.stdout)
    caches = {**TYPICAL_CACHES, **_caches()}
    capacity = {level: size * (1 if level == "L3" else threads) for level, size in caches.items()}
    return Roofline(rates["gflops"], rates["gb_per_s"], capacity)


def _caches() -> dict[str, int]:
    """Bytes of each data cache of the first core, as far as Linux knows."""
    caches = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "type").read_text().strip() != "Instruction":
            size = (index / "size").read_text().strip()
            caches[f"L{(index / 'level').read_text().strip()}"] = int(size.removesuffix("K")) << 10
    return caches
