"""Options, fixtures and the summary of the benches: `python -m pytest benches`.

All of pytest-benchmark's command line works; its statistics are of fastseq's own calls. The peers' times, the
ratios and the fraction of the roofline are in `extra_info` of its JSON and in the tables at the end.
"""

import pytest
import torch
from peers import PEERS
from race import FULL, SMOKE
from race import race as run_race
from report import render
from roofline import UnmeasuredError, measure

SMOKE_PEERS = "torch,numba,plain,onnxruntime"
OUTCOMES = pytest.StashKey[list]()
ROOFLINE = pytest.StashKey[str]()


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


def _peer_names(config):
    names = config.option.peers or (SMOKE_PEERS if config.option.smoke else None)
    return names.split(",") if names else [peer.name for peer in PEERS]


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if "race" not in getattr(item, "fixturenames", ()) or case is None:
            return True
        return config.option.cases in str(case) and (case.smoke or not config.option.smoke)

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
def roofline(pytestconfig, threads):
    """The machine's rates, or None where they cannot be measured."""
    try:
        rates = measure(threads)
    except UnmeasuredError as reason:
        pytestconfig.stash[ROOFLINE] = f"not measured: {reason}"
        return None
    pytestconfig.stash[ROOFLINE] = str(rates)
    return rates


@pytest.fixture
def race(benchmark, pytestconfig, threads, roofline):
    """Races fastseq against the chosen peers: call it with the op's name, the mode and the case."""

    def run(op, mode, case):
        names = _peer_names(pytestconfig)
        able = set(names if case.peers is None else case.peers) | {peer.name for peer in PEERS if peer.ours}
        peers = [peer for peer in PEERS if peer.name in able.intersection(names) and mode in peer.modes]
        benchmark.group = f"{op} {case}"
        outcome = run_race(
            benchmark, op, mode, case, peers, threads, SMOKE if pytestconfig.option.smoke else FULL, roofline
        )
        if outcome is not None:
            benchmark.extra_info.update(
                op=op,
                mode=mode,
                case=str(case),
                threads=threads,
                served_by=outcome.served_by,
                median_seconds=outcome.seconds,
                ratios=outcome.ratios,
                absent=outcome.absent,
                roofline_fraction=outcome.roofline_fraction,
            )
            pytestconfig.stash[OUTCOMES].append(outcome)

    return run


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter, config):
    outcomes = config.stash[OUTCOMES]
    if outcomes:
        terminalreporter.section("fastseq")
        if config.option.smoke:
            terminalreporter.write_line("a smoke run, one round each: it shows that all works, not how fast\n")
        terminalreporter.write_line(
            render(outcomes, config.option.threads, config.stash[ROOFLINE], terminalreporter.hasmarkup)
        )
