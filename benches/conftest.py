"""Options, fixtures and the summary of the benches: `python -m pytest benches`.

All of pytest-benchmark's command line works; its statistics are of fastseq's own calls. The peers' times, the
ratios and the fraction of the roofline are in `extra_info` of its JSON and in the tables at the end; what they were
measured on is at the top of that JSON, under `fastseq`. performance.py makes a report of all that.
"""

from dataclasses import asdict

import pytest
import torch
from peers import PEERS
from race import BRIEF, FULL, SMOKE
from race import race as run_race
from report import commit, cpu, render, versions
from representative import is_first, is_representative
from results import LEFT_OUT
from roofline import UnmeasuredError, measure

from fastseq import native

SMOKE_PEERS = "torch,numba,plain,onnxruntime"
OUTCOMES = pytest.StashKey[list]()
ROOFLINE = pytest.StashKey[object]()  # the rates, or why there are none


def pytest_addoption(parser):
    group = parser.getgroup("fastseq")
    group.addoption(
        "--peers",
        metavar="NAMES",
        help=f"whom to race against: {','.join(peer.name for peer in PEERS)} (default: all of them)",
    )
    group.addoption("--cases", default="", metavar="TEXT", help="only the cases whose name has this in it")
    group.addoption(
        "--threads", type=int, default=torch.get_num_threads(), help="threads for everyone (default: torch's)"
    )
    group.addoption(
        "--representative",
        action="store_true",
        help="what benches/representative.py names, each for a shorter time: fifteen minutes",
    )
    group.addoption(
        "--smoke",
        action="store_true",
        help=f"see that all works: one round of a few cases, against {SMOKE_PEERS} unless --peers is given",
    )


def pytest_configure(config):
    config.stash[OUTCOMES] = []
    config.stash[ROOFLINE] = "not measured"
    unknown = set(_peer_names(config)) - {peer.name for peer in PEERS}
    if unknown:
        raise pytest.UsageError(f"--peers: there is no {', '.join(sorted(unknown))}")
    if config.option.threads < 1:
        raise pytest.UsageError(f"--threads must be positive, got {config.option.threads}")


def _peer_names(config):
    names = config.option.peers or (SMOKE_PEERS if config.option.smoke else None)
    return [name.strip() for name in names.split(",")] if names else [peer.name for peer in PEERS]


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if case is None:
            return True
        return (
            config.option.cases in str(case)
            and (case.smoke or not config.option.smoke)
            and (is_representative(item) or not config.option.representative)
        )

    left_out = [item for item in items if not wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if wanted(item)]


@pytest.fixture(scope="session")
def threads(pytestconfig):
    before = torch.get_num_threads()
    torch.set_num_threads(pytestconfig.option.threads)
    yield pytestconfig.option.threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def limited(pytestconfig, threads):
    """Outcomes, with what the JSON says of them, that get the machine's limit when all are there."""
    found = []

    def measured():
        try:
            return measure(threads)
        except UnmeasuredError as reason:
            pytestconfig.stash[ROOFLINE] = f"not measured: {reason}"

    at_start = measured()
    yield found
    at_end = at_start and measured()
    if at_end:
        rates = pytestconfig.stash[ROOFLINE] = at_start.best_of(at_end)
        for outcome, info in found:
            outcome.limit(rates)
            info["roofline_fraction"] = outcome.roofline_fraction


@pytest.fixture(scope="session")
def effort(pytestconfig):
    option = pytestconfig.option
    return SMOKE if option.smoke else BRIEF if option.representative else FULL


@pytest.fixture
def race(request, benchmark, pytestconfig, threads, limited, effort):
    """Races fastseq against the chosen peers: call it with the op's name, the mode and the case.

    A series races against some peers only (`among`), perhaps with other `threads`; `series` is kept in the JSON.
    """

    def run(op, mode, case, among=None, threads=threads, series=None):
        names = _peer_names(pytestconfig)
        ours = set() if among else {peer.name for peer in PEERS if peer.ours}
        able = set(among or (names if case.peers is None else case.peers)) | ours
        peers = [peer for peer in PEERS if peer.name in able.intersection(names) and mode in peer.modes]
        left_out = [] if is_first(request.node) or not pytestconfig.option.representative else ["torch.compile"]
        benchmark.group = f"{op} {case}"
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            racing = [peer for peer in peers if peer.name not in left_out]
            outcome = run_race(benchmark, op, mode, case, racing, threads, effort)
        finally:
            torch.set_num_threads(before)
        if outcome is None:
            return None
        if series:
            outcome.case = f"{series['layer']} {case}"
        outcome.absent.update({peer.name: LEFT_OUT for peer in peers if peer not in racing})
        benchmark.extra_info.update(
            op=op,
            mode=mode,
            case=outcome.case,
            threads=threads,
            served_by=outcome.served_by,
            median_seconds=outcome.seconds,
            ratios=outcome.ratios,
            quartiles=outcome.quartiles,
            absent=outcome.absent,
            flops=outcome.flops,
            bytes=outcome.bytes,
            roofline_fraction=outcome.roofline_fraction,
            **({"series": series} if series else {}),
        )
        pytestconfig.stash[OUTCOMES].append(outcome)
        if threads == before:
            limited.append((outcome, benchmark.extra_info))
        return outcome

    return run


# Optional: collecting, which compare.py does, needs no pytest-benchmark.
@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    # The clock of the moment differs from run to run, and --benchmark-compare would tell of another machine.
    machine_info["cpu"] = {name: x for name, x in machine_info["cpu"].items() if not name.startswith("hz_actual")}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    rates = config.stash[ROOFLINE]
    output_json["fastseq"] = {
        "cpu": cpu(),
        "instruction_set": native.instruction_set(),
        "threads": config.option.threads,
        "commit": commit(),
        "versions": versions(),
        "run": "smoke" if config.option.smoke else "representative" if config.option.representative else "full",
        "roofline": rates if isinstance(rates, str) else asdict(rates),
        "peers": [{"name": peer.name, "modes": peer.modes, "ours": peer.ours} for peer in PEERS],
    }


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter, config):
    outcomes = config.stash[OUTCOMES]
    if outcomes:
        terminalreporter.section("fastseq")
        if config.option.smoke:
            terminalreporter.write_line("a smoke run, one round each: it shows that all works, not how fast\n")
        terminalreporter.write_line(
            render(outcomes, config.option.threads, str(config.stash[ROOFLINE]), terminalreporter.hasmarkup)
        )
