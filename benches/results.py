"""What a run of the benches found, read from its JSON."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

OURS = "fastseq"
MODES = ("inference", "training")
NOTHING = "-"  # for a peer that has no part in a case
LEFT_OUT = "only in make bench-full"  # for one that could race, and would take too long

# In the report's order, with the names that the benches file their races under; others follow by their own names.
FAMILIES = {
    "LSTM": ("lstm", "projection"),
    "GRU": ("gru",),
    "RNN": ("rnn",),
    "packed, lengths": ("packed LSTM", "packed GRU", "packed RNN", "option"),
    "cells": ("cell",),
    "attention": (
        "attention",
        "attention with dropout",
        "attention with masks",
        "attention on packed sequences",
        "attention of one query",
    ),
    "MultiheadAttention": ("MultiheadAttention",),
    "Transformer": ("Transformer encoder",),
    "decoding": ("greedy decoding", "generation"),
    "models": ("models", "Hugging Face models"),
    "fused pieces": ("fused pieces",),
}
TITLES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "transformers": "Hugging Face",
    "numba": "fastseq's numba",
    "plain": "fastseq, plain",
}
# What a run was measured on.
MACHINE = ("cpu", "instruction_set", "threads", "commit", "versions", "run", "roofline", "peers")


class UnreadableError(Exception):
    """A file is not what a run of the benches writes; the message says what is wrong."""


@dataclass(frozen=True)
class Race:
    """One case in one mode; times are medians in seconds, ratios the median of a peer's over fastseq's. Peers that are
    timed alone have other numbers of rounds.
    """

    op: str
    mode: str
    case: str
    threads: int
    served_by: str
    median_seconds: dict[str, float]
    ratios: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    absent: dict[str, str]
    flops: int
    bytes: int
    roofline_fraction: float | None
    rounds: int
    series: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return next((family for family, ops in FAMILIES.items() if self.op in ops), self.op)

    @property
    def name(self) -> str:
        """The case, with its op where the family has others."""
        if self.op.lower() == self.family.lower() or len(FAMILIES.get(self.family, ())) < 2:
            return self.case
        return f"{self.op.removeprefix(self.family).strip()}: {self.case}"

    @property
    def seconds(self) -> float:
        return self.median_seconds[OURS]


@dataclass(frozen=True)
class Run:
    """A run: the races of all families, the series, and what they were measured on."""

    races: list[Race]
    series: dict[str, list[Race]]
    first_calls: list[dict[str, Any]]
    machine: dict[str, Any]
    date: str

    @property
    def families(self) -> list[str]:
        present = dict.fromkeys(race.family for race in self.races)
        return [family for family in FAMILIES if family in present] + [f for f in present if f not in FAMILIES]

    @property
    def peers(self) -> list[str]:
        """Everyone that fastseq can race against, whether they did or not; fastseq itself, otherwise, comes last."""
        return [*self.rivals, *(peer["name"] for peer in self.machine["peers"] if peer["name"] not in self.rivals)]

    @property
    def rivals(self) -> list[str]:
        """Those that are not fastseq itself, otherwise served or called."""
        return [peer["name"] for peer in self.machine["peers"] if not peer["ours"] and peer["name"] != "plain"]

    def of(self, family: str, mode: str) -> list[Race]:
        return [race for race in self.races if (race.family, race.mode) == (family, mode)]

    def mean(self, races: Iterable[Race], peer: str) -> tuple[float, int] | None:
        """The geometric mean of a peer's ratios, and of how many."""
        ratios = [race.ratios[peer] for race in races if peer in race.ratios]
        return (geometric_mean(ratios), len(ratios)) if ratios else None

    def why_not(self, races: Iterable[Race], peer: str) -> str:
        """Why a peer has no ratio in these races."""
        reasons = list(dict.fromkeys(race.absent[peer] for race in races if race.absent.get(peer, "-") != "-"))
        if "not installed" in reasons:
            return "not installed"
        if reasons:
            return reasons[0]
        named = any(peer in (*race.ratios, *race.absent) for race in self.races)
        return NOTHING if named else self.missing(peer)

    def missing(self, peer: str) -> str:
        """Why a peer is in no race at all."""
        versions = self.machine["versions"]
        return "not installed" if peer in versions and versions[peer] is None else "not run"

    @property
    def caption(self) -> str:
        """The commit, the machine and the versions, for every figure."""
        machine = self.machine
        versions = ", ".join(
            f"{TITLES.get(name, name) if name != 'numba' else name} {number or 'not installed'}"
            for name, number in machine["versions"].items()
        )
        smoke = "A smoke run, whose times mean nothing. " if machine["run"] == "smoke" else ""
        cpu = f"{machine['cpu']} ({machine['instruction_set']})"
        threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
        return f"{smoke}Commit {machine['commit']} on {cpu}, {threads}; {versions}."


def title(peer: str) -> str:
    return TITLES.get(peer, peer)


def load(path: Path) -> Run:
    """Reads a run from the JSON that pytest-benchmark wrote.

    Raises:
        UnreadableError: there is no such file, or it is of something else.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror}; make bench writes it") from None
    except ValueError as error:
        raise UnreadableError(f"{path} is not JSON: {error}") from None
    content = content if isinstance(content, dict) else {}
    machine = content.get("fastseq") or content.get("machine_info", {}).get("fastseq")  # in older runs
    if not isinstance(machine, dict):
        raise UnreadableError(f"{path} is not of fastseq's benches: it lacks fastseq")
    if missing := [name for name in MACHINE if name not in machine]:
        raise UnreadableError(f"{path} is of other benches than these: its fastseq lacks {', '.join(missing)}")
    run = Run([], {}, [], machine, content.get("datetime", "")[:10])
    try:
        for benchmark in content["benchmarks"]:
            info = benchmark["extra_info"]
            kind = info.get("series", {}).get("kind")
            if kind == "first call":
                run.first_calls.append(info["series"])
            elif "op" in info:
                of_its_kind = run.series.setdefault(kind, []) if kind else run.races
                of_its_kind.append(Race(**info, rounds=benchmark["stats"]["rounds"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise UnreadableError(f"{path} is of other benches than these: {type(error).__name__}: {error}") from None
    return run
