"""Which form and which tiles the Triton kernels of the recurrent ops run with: the cost model.

Its numbers are estimates from data sheets and from what the compiler reports (registers, shared memory), not
measurements. What they have to get right is the order of the candidates.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """What the choice of a form depends on."""

    multiprocessors: int
    shared: int  # bytes of shared memory that one program can have
    capability: int  # 90 for compute capability 9.0


class Product(NamedTuple):
    """The product of a step: for each of B rows in D directions `stack` sums over K for each of `outputs`.

    `size` is that of an element in bytes; `exact` says that float32 is multiplied without tensor cores.
    """

    stack: int
    outputs: int
    K: int
    B: int
    D: int
    size: int
    exact: bool


class Plan(NamedTuple):
    """The form of a kernel, and its tiles."""

    persistent: bool
    units: int  # BLOCK_U
    rows: int  # BLOCK_B
    k: int  # BLOCK_K
    split: int  # SPLIT
    ahead: int  # AHEAD
    warps: int
    stages: int
    registers: int | None = None  # a thread's limit, where the compiler should not choose

    def grid(self, outputs: int, B: int, D: int) -> tuple[int, int, int]:
        return _tiles(outputs, self.units), _tiles(B, self.rows), D

    @property
    def options(self) -> dict[str, int | None]:
        """What kernels are compiled with for these tiles."""
        return dict(
            BLOCK_U=self.units,
            BLOCK_B=self.rows,
            BLOCK_K=self.k,
            SPLIT=self.split,
            num_warps=self.warps,
            num_stages=self.stages,
            maxnreg=self.registers,
        )


def _tiles(n: int, tile: int) -> int:
    return -(-n // tile)


def _power_of_2(n: int, least: int, most: int) -> int:
    return max(least, min(most, 1 << max(n - 1, 0).bit_length()))


def stepwise(of: Product, chip: Chip) -> Plan:
    """The tiles for one launch a step."""
    rows = _power_of_2(of.B, 16, 64)
    # A stack is as tall as tensor cores want; single tiles are made so where there are enough of them for the chip.
    many = _tiles(of.outputs, 64) * _tiles(of.B, rows) * of.D >= chip.multiprocessors
    units = 64 if of.stack == 1 and many and not of.exact else 16
    split = 4 if of.stack * units == 16 and rows == 16 else 1  # else four warps would compute the same
    k = _power_of_2(of.K, 16, 16 if of.exact else 128 // of.size // (2 if split > 1 else 1))
    return Plan(False, units, rows, k, split, 1, 8 if of.exact and split == 1 else 4, 3)


def persistent(of: Product, units: int, rows: int, chip: Chip) -> Plan | None:
    """The tiles for one launch of all steps, with so many units and rows a program; None where that cannot be."""
    tall, group = of.stack * units, _tiles(of.outputs, units)
    if group > 1 and group * _tiles(of.B, rows) * of.D > chip.multiprocessors:
        return None  # programs that wait for each other must all be resident, one on a multiprocessor
    # What spills registers, as the compiler reports it. (`stack` is 1 and K long in backward.)
    if (of.exact and (rows > 16 or (of.stack == 1 and of.K > 1024))) or (units == 32 and of.K * of.size >= 2048):
        return None
    split = 8 if tall <= 16 and rows == 16 else 1  # else several warps would compute the same
    warps = 4 if rows == 16 and split == 1 and not of.exact else 8
    # A chunk is 8 or 16 registers a thread, and two to four are on their way at once. More than 32 chunks take long to
    # compile; more than 16 of K at once is more than the registers hold of products without tensor cores.
    registers, in_flight = (16, 48) if split > 1 else (8, 24 if chip.capability >= 100 else 32)
    most = max(registers * warps * 128 // (rows * of.size), _power_of_2(_tiles(of.K, 32), 16, of.K))
    k = 16 if of.exact else _power_of_2(of.K, 16 * split, most) // split
    count = _tiles(of.K, k * split)
    weights, vectors = count * k * split * of.size * tall, k * split * rows * of.size
    if weights > 160 << 10:
        return None  # they would spill registers on their way to shared memory
    for ahead in range(max(2, in_flight * warps * 128 // vectors) - 1, 0, -1):
        if weights + (ahead + 1) * vectors + 8192 <= chip.shared:
            # Left alone, the compiler stops at 128 registers for some of the smaller tiles, and spills.
            small = (units == 8 if split > 1 else weights <= 64 << 10) and of.size == 4
            limit = 224 if small else 255 if split == 1 and tall < 64 and chip.capability < 100 else None
            return Plan(True, units, rows, k, split, min(ahead, count - 1), warps, 1, None if of.exact else limit)
    return None


def plan(of: Product, T: int, chip: Chip) -> Plan:
    """The form and tiles for T steps whose estimated time is least.

    The model takes for a step the slowest of what has to be moved and computed, and adds what no size changes. Rates
    are about half of an H100's peaks.
    """
    launch, exchange, gates = 2.5, 1.5, 0.5  # us: a graph's node; a signal and a wait through L2; the rest of a step
    shared_rate, l2_rate, l2_total = 2e5, 1e5, 4e6  # bytes/us: of shared memory, of L2 to one program and to all
    math_rate = 1.2e5 if of.exact else 3.2e6 / of.size  # multiply-adds/us of one multiprocessor

    def time(p: Plan) -> float:
        group, tiles, _ = p.grid(of.outputs, of.B, of.D)
        programs = group * tiles * of.D
        waves = _tiles(programs, chip.multiprocessors)
        weights, vectors = of.stack * p.units * of.K * of.size, p.rows * of.K * of.size
        math = of.stack * p.units * p.rows * of.K / math_rate
        if not p.persistent:
            moved = max((weights + vectors) * waves / l2_rate, (weights + vectors) * programs / l2_total)
            return T * (launch + max(moved, math * waves))
        moved = max(vectors / l2_rate, vectors * programs / l2_total, weights / shared_rate)
        return launch + weights / l2_rate + T * waves * (gates + exchange * (group > 1) + max(moved, math))

    candidates = [stepwise(of, chip)]
    if T > 1:
        tiles = [(units, rows) for units in (8, 16, 32, 64) for rows in (16, 32, 64) if rows == 16 or rows < 2 * of.B]
        candidates += [p for units, rows in tiles if (p := persistent(of, units, rows, chip)) is not None]
    return min(candidates, key=time)
