"""One version of fastseq that runs its own benches' cases as compare.py tells it: `python one_version.py ROOT 2`.

It takes fastseq and the benches from ROOT. It gets a JSON object a line on stdin and answers with one on stdout, or
with {"error": ...}. The first it says unasked: which fastseq it has, and the cases. All else that is printed goes to
stderr.

Nothing of how calls are timed is the version's own.
"""

import gc
import importlib
import inspect
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

SEED = 5  # of what is drawn
WARM_UP_CALLS, WARM_UP_S = 3, 0.05
# Before a round: the caches are the other version's, and its threads may still spin.
SETTLE_S = 2e-3


class Cases:
    """A plugin of pytest that keeps what was collected, by node id, and why a module could not be."""

    def __init__(self) -> None:
        self.items: dict[str, pytest.Function] = {}
        self.failed: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = {item.nodeid: item for item in session.items if "race" in inspect.signature(item.obj).parameters}


class Runner:
    """Holds the call of one case at a time."""

    def __init__(self, items: dict[str, pytest.Function], threads: int) -> None:
        self.items, self.threads = items, threads
        self.call: Any = None

    def prepare(self, nodeid: str, results: str) -> dict[str, Any]:
        """Makes the call, keeps its results in a file, by name, and warms it up; tells about what it takes."""
        import peers  # the version's
        import race

        self.drop()
        raced: list[tuple[str, str, Any]] = []
        item = self.items[nodeid]
        item.obj(**item.callspec.params, race=lambda *case: raced.append(case))
        [(op, mode, case)] = raced
        torch.set_grad_enabled(mode == "training")
        job = race.job_of(case, mode == "training", self.threads)
        self.call = peers.call_of(job.ours.layer, job.ours)
        torch.manual_seed(SEED)
        found = zip(job.ours.names, self.call(), strict=True)
        torch.save({name: torch.as_tensor(result).detach() for name, result in found}, results)
        tries = [self.clock(1) for _ in range(WARM_UP_CALLS)]
        until = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < until:
            tries.append(self.clock(1))
        served_by = getattr(peers, "served_by", lambda layer: ())
        return dict(
            op=op,
            mode=mode,
            case=str(case),
            seconds=min(tries),
            served_by=", ".join(sorted(served_by(job.ours.layer))),
            by_norm=getattr(job.ours, "by_norm", False),
            random=getattr(job, "random", False),
        )

    def round(self, loops: int) -> dict[str, Any]:
        until = time.perf_counter() + SETTLE_S
        self.call()
        while time.perf_counter() < until:
            self.call()
        return dict(seconds=self.clock(loops))

    def drop(self) -> dict[str, Any]:
        self.call = None
        gc.collect()
        return {}

    def clock(self, loops: int) -> float:
        """Seconds a call."""
        call = self.call
        start = time.perf_counter()
        for _ in range(loops):
            call()
        return (time.perf_counter() - start) / loops


def take(root: Path) -> str:
    """Imports fastseq from this folder, whatever is installed. Returns the file that it came from."""
    # An editable installation would fill the gaps of one version with modules of another.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
    sys.path[0] = str(root)  # in place of this file's folder, whose benches are those of one version only
    fastseq = importlib.import_module("fastseq")
    with suppress(ImportError):  # a version without any
        importlib.import_module("fastseq.kernels").__path__.append(str(root / "kernels"))  # as setup.py maps them
    return str(fastseq.__file__)


def main(root: str, threads: str, *selection: str) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(int(threads))
    benches, file, cases = Path(root) / "benches", take(Path(root)), Cases()
    # A series' points are cases like the others, at more sizes.
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", f"--ignore={benches / 'bench_series.py'}"]
    code = pytest.main([str(benches), *options, *selection], plugins=[cases])
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):  # conftest.py could not be imported
        sys.exit("pytest has collected nothing")
    runner = Runner(cases.items, int(threads))
    print(json.dumps(dict(file=file, cases=list(cases.items), failed=cases.failed)), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(runner, request.pop("do"))(**request)
        except Exception as error:  # of whatever kind: it is the other side's to judge
            answer = dict(error=f"{type(error).__name__}: {error}")
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
