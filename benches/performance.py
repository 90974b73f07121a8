"""The report on a run of the benches: `python benches/performance.py out/bench.json`, which is `make report`.

It writes docs/performance.md with its figures in docs/performance, docs/performance.html, which is a page in one file,
and the part of README.md between two markers. The same JSON gives the same files.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from string import Template
from typing import Annotated

import plots
import typer
from results import LEFT_OUT, MODES, NOTHING, OURS, Race, Run, UnreadableError, load, title

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_name("page.html")
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
COMMANDS = {"representative": "make bench", "full": "make bench-full", "smoke": "make bench-smoke"}
NEAR = 0.6  # of the limit: less is worth a look


@dataclass(frozen=True)
class Cell:
    """What a table says, and the number that it is sorted by; without one, it comes last."""

    text: str
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns from `numbers` on are numbers, but for the last `words`."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: int = 1
    words: int = 0
    folded: str = ""  # in Markdown, a line to click on
    noted: bool = False  # in Markdown, too, notes follow the texts

    def numeric(self, column: int) -> bool:
        return self.numbers <= column < len(self.columns) - self.words


@dataclass(frozen=True)
class Figure:
    name: str
    label: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A part of the report; its text has the code marks of Markdown, and nothing else of it."""

    title: str
    text: Sequence[str]
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = field(default=())


def number(value: float) -> str:
    """With three digits, or as many as there are before the point."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def milliseconds(seconds: float | None) -> Cell:
    return Cell(NOTHING) if seconds is None else Cell(number(seconds * 1e3), seconds)


def ratio(race: Race, peer: str, run: Run) -> Cell:
    if peer in race.ratios:
        low, high = race.quartiles[peer]
        return Cell(number(race.ratios[peer]), race.ratios[peer], f"{number(low)} to {number(high)}")
    return Cell(run.why_not([race], peer))


def mean(run: Run, races: Sequence[Race], peer: str) -> Cell:
    found = run.mean(races, peer)
    if found is None:
        return Cell(run.why_not(races, peer))
    return Cell(number(found[0]), found[0], f"{found[1]} of {len(races)}" if found[1] < len(races) else "")


def report(run: Run) -> list[Section]:
    """All sections that the run has something for."""
    sections = [at_a_glance(run), every_case(run), behind(run), limit(run)] if run.races else []
    for kind, section in (("scaling", growth), ("threads", threads), ("overhead", overhead), ("memory", memory)):
        if run.series.get(kind):
            sections.append(section(run))
    if run.first_calls:
        sections.insert(-1 if run.series.get("memory") else len(sections), first_calls(run))
    return [*sections, how(run)]


def at_a_glance(run: Run) -> Section:
    rows = [
        [Cell(family), Cell(mode), Cell(str(len(races)), len(races)), *(mean(run, races, peer) for peer in run.peers)]
        for family in run.families
        for mode in MODES
        if (races := run.of(family, mode))
    ]
    columns = ("family", "mode", "cases", *map(title, run.peers))
    return Section(
        "At a glance",
        [
            "The time of a peer over fastseq's, as the geometric mean over the cases of a family: above 1, fastseq is"
            " faster. Where a peer has a part in some of the cases only, the mean is of those: brackets say of how"
            " many, and such means are hollow in the figure; they cannot be compared with the others of the family."
            f" {title('numba')} and {title('plain')} are fastseq itself, served by numba's kernels, or called without"
            " the option or the packing that the case is about.",
        ],
        [Figure("overview", "Geometric means of the ratios of each peer, by family", plots.overview(run))],
        [Table("means", columns, rows, numbers=2, noted=True)],
    )


def every_case(run: Run) -> Section:
    rows = [
        [
            Cell(race.family),
            Cell(race.name),
            Cell(race.mode),
            milliseconds(race.seconds),
            *(ratio(race, peer, run) for peer in run.peers),
            share(race),
            Cell(str(race.rounds), race.rounds),
            Cell(race.served_by),
        ]
        for family in run.families
        for race in run.races
        if race.family == family
    ]
    columns = ("family", "case", "mode", "fastseq ms", *map(title, run.peers), "of the limit", "rounds", "served by")
    text = (
        "A mark is the median of the ratios of single turns, whose two times are of the same moment, and a line goes"
        " from their first to their third quartile; ONNX Runtime and OpenVINO are timed alone, and their ratios are"
        f" those of their times to fastseq's median. {len(rows)} races in all."
    )
    label = "Ratios of each peer in each case, with quartiles"
    table = Table("cases", columns, rows, numbers=3, words=1, folded="All races as a table")
    return Section("Every case", [text], [Figure("ratios", label, plots.ratios(run))], [table])


def behind(run: Run) -> Section:
    """What a peer does faster; fastseq without an option or packing is none."""
    whom = [peer for peer in run.peers if peer != "plain"]
    lost = sorted(
        ((race.ratios[peer], race, peer) for race in run.races for peer in whom if race.ratios.get(peer, 1) < 1),
        key=lambda found: found[0],
    )
    rows = [
        [
            Cell(race.family),
            Cell(race.name),
            Cell(race.mode),
            Cell(title(peer)),
            ratio(race, peer, run),
            quartiles(race, peer),
        ]
        for _, race, peer in lost
    ]
    races = len({id(race) for _, race, _ in lost})
    of_torch = sum(peer == "torch" for _, _, peer in lost)
    unsure = sum(race.quartiles[peer][1] > 1 for _, race, peer in lost)
    text = (
        f"In {races} of {len(run.races)} races somebody is faster than fastseq: torch in {of_torch or 'none'} of them;"
        f" {title('numba')} counts, too. In {unsure or 'none'} of these {len(lost)} comparisons the quartiles lie on"
        " both sides of 1."
        if lost
        else "Nobody is faster than fastseq in any case."
    )
    columns = ("family", "case", "mode", "peer", "ratio", "quartiles")
    return Section("Where fastseq is behind", [text], (), [Table("behind", columns, rows, numbers=4)] if rows else [])


def quartiles(race: Race, peer: str) -> Cell:
    low, high = race.quartiles[peer]
    return Cell(f"{number(low)} to {number(high)}", low)


def share(race: Race) -> Cell:
    fraction = race.roofline_fraction
    return Cell(NOTHING) if fraction is None else Cell(f"{fraction:.0%}", fraction)


def limit(run: Run) -> Section:
    rates = run.machine["roofline"]
    label = "fastseq's FLOP/s by FLOPs a byte, and its share of the machine's limit by family"
    if not isinstance(rates, dict):
        return Section("The machine's limit", [f"The machine's rates were {rates}."])
    reads = ", ".join(f"{level} {rate:.0f}" for level, rate in rates["gb_per_s"].items())
    with_limit = [race for race in run.races if race.roofline_fraction is not None]
    near = sum(race.roofline_fraction >= NEAR for race in with_limit if race.roofline_fraction is not None)
    return Section(
        "The machine's limit",
        [
            "Measured with all threads at the run's start and at its end, of which the larger counts:"
            f" {rates['gflops']:.0f} GFLOP/s of float32 multiply-adds, and reads in GB/s from {reads}. A case's limit"
            " is the time that its FLOPs take at this rate, or its least traffic at that of the caches which hold it,"
            " whichever is more. It knows no writing, no exponentials and no waiting for each other, so nothing reaches"
            " it.",
            f"{near} of {len(with_limit)} races are at {NEAR:.0%} of it or more (the dashed line). Cases of no counted"
            " FLOPs, as the fused pieces, are on the right only.",
        ],
        [Figure("roofline", label, plots.roofline(run))],
    )


def growth(run: Run) -> Section:
    rows = [
        [
            Cell(race.series["layer"]),
            Cell(race.series["axis"]),
            Cell(str(race.series["value"]), race.series["value"]),
            Cell(race.series["fixed"]),
            Cell(race.mode),
            milliseconds(race.seconds),
            milliseconds(race.median_seconds.get("torch")),
            ratio(race, "torch", run),
        ]
        for race in run.series["scaling"]
    ]
    columns = ("layer", "size", "value", "others", "mode", "fastseq ms", "torch ms", "torch")
    label = "Milliseconds of fastseq and torch over steps, rows, hidden size and sequence length"
    return Section(
        "How cost grows",
        ["One size grows, the others stay. Both axes are logarithmic."],
        [Figure("scaling", label, plots.scaling(run))],
        [Table("growth", columns, rows, numbers=5, folded="As a table")],
    )


def threads(run: Run) -> Section:
    races = run.series["threads"]
    counts = sorted({race.threads for race in races})
    rows = []
    for name in dict.fromkeys(race.case for race in races):
        seconds = {race.threads: race.median_seconds for race in races if race.case == name}
        row = [Cell(name)]
        for who in (OURS, "torch"):
            times = [seconds.get(count, {}).get(who) for count in counts]
            row += map(milliseconds, times)
            if len(counts) > 1:
                both = times[0] and times[-1]
                row.append(Cell(number(times[0] / times[-1]), times[0] / times[-1]) if both else Cell(NOTHING))
        rows.append(row)
    columns = ["case"]
    for who in (OURS, "torch"):
        columns += [f"{who} ms, {count} thread{'s' if count > 1 else ''}" for count in counts]
        columns += [f"{who}, speed-up"] if len(counts) > 1 else []
    several = len(counts) > 1
    text = "Inference by one thread and by more." if several else "This machine gives one thread only."
    figures = (
        [Figure("threads", "Speed with the most threads over speed with one", plots.threads(run))] if several else []
    )
    return Section("Threads", [text], figures, [Table("threads", columns, rows)])


def overhead(run: Run) -> Section:
    rows = [
        [
            Cell(race.series["layer"]),
            Cell(race.mode),
            *(
                Cell(number(s * 1e6), s) if (s := race.median_seconds.get(who)) else Cell(NOTHING)
                for who in (OURS, "torch")
            ),
            ratio(race, "torch", run),
        ]
        for race in run.series["overhead"]
    ]
    return Section(
        "Calls of next to nothing",
        ["One step of one row of 8 features, or a sequence of one: what remains is the way to a kernel and back."],
        [Figure("overhead", "Microseconds of the smallest calls of fastseq and torch", plots.overhead(run))],
        [Table("overhead", ("layer", "mode", "fastseq µs", "torch µs", "torch"), rows, numbers=2)],
    )


def first_calls(run: Run) -> Section:
    rows = []
    for call in run.first_calls:
        for k, found in enumerate(call["runs"]):
            parts = [
                Cell(f"{found[part]:.2f}", found[part]) if part in found else Cell(found.get("absent", NOTHING))
                for part in ("import torch", "import fastseq", "first call")
            ]
            second = (
                Cell(number(found["second call"] * 1e3), found["second call"])
                if "second call" in found
                else Cell(NOTHING)
            )
            kept = call["how"] in ("numba", "torch.compile")
            state = ("from the cache" if k else "compiled") if kept else "ahead of time"
            rows.append([Cell(call["layer"]), Cell(call["how"]), Cell(state), *parts, second])
    columns = ("layer", "by", "code", "import torch s", "import fastseq s", "first call s", "second call ms")
    return Section(
        "First calls",
        [
            "A process for each: from the first import to the first result, in inference. numba and torch.compile"
            " compile for the first process and keep the result for the next (`from the cache`). fastseq's kernels in"
            " C++ were compiled when it was installed. torch.compile unrolls recurrent layers, which takes too long for"
            " 100 steps.",
        ],
        [Figure("first-calls", "Seconds from the first import to the first result", plots.first_calls(run))],
        [Table("first-calls", columns, rows, numbers=3)],
    )


def memory(run: Run) -> Section:
    rows = []
    for race in run.series["memory"]:
        peaks = race.series["peak_mib"]
        cells = [Cell(f"{peaks[who]:.0f}", peaks[who]) if who in peaks else Cell(NOTHING) for who in (OURS, "torch")]
        times = [milliseconds(race.median_seconds.get(who)) for who in (OURS, "torch")]
        rows.append([Cell(race.case), *cells, *times, ratio(race, "torch", run)])
    columns = ("case", "fastseq MiB", "torch MiB", "fastseq ms", "torch ms", "torch")
    text = (
        "How far one training step raises the resident set at its peak, in a process of its own that has been warmed up"
        " by a small step, beside the step's time."
    )
    return Section("Memory", [text], (), [Table("memory", columns, rows)])


def how(run: Run) -> Section:
    missing = [
        f"{title(name) if name != 'numba' else name} is not installed"
        for name, found in run.machine["versions"].items()
        if not found
    ]
    not_run = [title(peer) for peer in run.peers if not any(peer in (*r.ratios, *r.absent) for r in run.races)]
    absent = [*missing, *(f"{name} was not run" for name in not_run if f"{name} is not installed" not in missing)]
    text = [
        "In a race everyone has the same threads and the same inputs, and first has to return the right results: they"
        " are compared with those of float64, and what is drawn, as dropout, by its size. Not compared are"
        f" {title('transformers')}'s Marian, whose weights are its own, and {title('plain')}, which does another thing."
        " Then fastseq and the peers that run in torch take turns, in a random order, with the same"
        " number of calls in a turn; ONNX Runtime and OpenVINO, whose threads go on spinning after a call, are timed"
        " alone between two halves of the turns. Times are medians; ratios are medians of ratios, not ratios of these"
        f" medians.{rounds(run.races)} `benches/race.py` has the details,"
        " `benches/representative.py` the cases of `make bench`.",
        "Where torch lacks what fastseq has, it does what one does without: packed sequences of attention are padded,"
        " with a mask; decoding by a Transformer has no cache and computes all tokens anew in each step; beam search"
        " takes one sentence at a time. These ratios are of ways to do it as much as of kernels.",
        f"`{NOTHING}` stands for a peer that has no part in a case: it cannot do it, or does the same as another one.",
    ]
    if absent:
        text.append(f"Not in this run: {'; '.join(absent)}.")
    return Section("How it was measured", text)


def rounds(races: Sequence[Race]) -> str:
    """How many there were, as a sentence."""
    counts = [race.rounds for race in races]
    if not counts:
        return ""
    many = f"{min(counts)} to {max(counts)} rounds" if len(set(counts)) > 1 else f"rounds: {counts[0]}"
    return f" Races have {many} of turns, {median(counts):.0f} in the median; the fewest where a call takes longest."


def as_markdown(run: Run, sections: Sequence[Section]) -> str:
    page = "It makes `docs/performance.html` too: the same as one page in a file, with tables to sort."
    lines = ["# Performance", "", f"{introduction(run)} {page}", "", f"*{run.caption}*", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for paragraph in section.text:
            lines += [paragraph, ""]
        for figure in section.figures:
            lines += [f"![{figure.label}](performance/{figure.name}.svg)", "", f"*{figure.label}. {run.caption}*", ""]
        for table in section.tables:
            lines += ["<details>", f"<summary>{table.folded}</summary>", ""] if table.folded else []
            lines += [markdown_table(table), ""]
            lines += ["</details>", ""] if table.folded else []
    return "\n".join(lines)


def introduction(run: Run) -> str:
    return f"Made by `make report` from what `{COMMANDS[run.machine['run']]}` found on {run.date}; not written by hand."


def markdown_table(table: Table) -> str:
    rule = ["--:" if table.numeric(k) else "---" for k in range(len(table.columns))]
    rows = [table.columns, rule, *([in_markdown(cell, table.noted) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def in_markdown(cell: Cell, noted: bool) -> str:
    return f"{cell.text} ({cell.note})" if noted and cell.note else cell.text


def as_html(run: Run, sections: Sequence[Section]) -> str:
    parts = []
    for section in sections:
        anchor = re.sub(r"\W+", "-", section.title.lower())
        parts.append(f'<section id="{anchor}">\n<h2>{html.escape(section.title)}</h2>')
        parts += [f"<p>{prose(paragraph)}</p>" for paragraph in section.text]
        for figure in section.figures:
            svg = plots.inline(figure.svg, figure.name, figure.label)
            caption = f"{html.escape(figure.label)}. {html.escape(run.caption)}"
            parts.append(f'<figure>\n<div class="wide">{svg}</div>\n<figcaption>{caption}</figcaption>\n</figure>')
        parts += [html_table(table, section.title) for table in section.tables]
        parts.append("</section>")
    links = "\n".join(
        f'<a href="#{re.sub(r"[^a-z0-9]+", "-", section.title.lower())}">{html.escape(section.title)}</a>'
        for section in sections
    )
    lead = prose(introduction(run))
    return Template(PAGE.read_text()).substitute(
        lead=lead, caption=html.escape(run.caption), links=links, sections="\n".join(parts)
    )


def prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def html_table(table: Table, caption: str) -> str:
    head = "".join(
        f'<th scope="col"{aligned(table, k)}><button type="button">{html.escape(name)}</button></th>'
        for k, name in enumerate(table.columns)
    )
    rows = "\n".join(
        "<tr>" + "".join(html_cell(table, k, cell) for k, cell in enumerate(row)) + "</tr>" for row in table.rows
    )
    return (
        f'<div class="wide"><table id="{table.name}-table">\n<caption>{html.escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def html_cell(table: Table, column: int, cell: Cell) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value:.6g}"'
    note = f" <small>{html.escape(cell.note)}</small>" if cell.note else ""
    return f"<td{aligned(table, column)}{value}>{html.escape(cell.text)}{note}</td>"


def aligned(table: Table, column: int) -> str:
    return ' class="number"' if table.numeric(column) else ""


def takes_part(run: Run, peer: str, mode: str) -> bool:
    """Whether a peer has results in a mode, or would have if it were installed; if it was left out of most cases, what
    there is says little.
    """
    able = any(mode in known["modes"] for known in run.machine["peers"] if known["name"] == peer)
    races = [race for race in run.races if race.mode == mode]
    left_out = sum(race.absent.get(peer) == LEFT_OUT for race in races)
    able = able and left_out <= sum(peer in race.ratios for race in races)
    return able and (run.mean(races, peer) is not None or run.why_not(races, peer) == "not installed")


def for_readme(run: Run, docs: str) -> str:
    """The README's part: the plot and the means of those who race in inference and in training."""
    by_mode = {mode: [peer for peer in run.rivals if takes_part(run, peer, mode)] for mode in MODES}
    columns = ["family", *(f"{mode}: {title(peer)}" for mode, names in by_mode.items() for peer in names)]
    rows = [
        [Cell(family), *(mean(run, run.of(family, mode), peer) for mode, names in by_mode.items() for peer in names)]
        for family in run.families
    ]
    table = Table("readme", columns, rows, noted=True)
    lines = [
        f"![How many times as long as fastseq its peers take, by family]({docs}/performance/overview.svg)",
        "",
        "How many times as long as fastseq each peer takes, as geometric means over the cases of a family, or over some"
        " of them, as the brackets say (hollow in the plot):",
        "",
        markdown_table(table),
        "",
        f"`{COMMANDS[run.machine['run']]} report` measures this and makes [the report]({docs}/performance.md): every"
        " case, its spread, where fastseq is behind, the machine's limit, growth, threads, first calls, memory."
        f" {run.caption}",
    ]
    return "\n".join(lines)


def put_into(readme: Path, text: str) -> None:
    """Puts text between the two markers of a file.

    Raises:
        UnreadableError: the file lacks them.
    """
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UnreadableError(f"{readme} lacks the markers {BEGIN} and {END}, between which the results go")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def write(run: Run, docs: Path, readme: Path | None) -> list[Path]:
    """Writes all files and returns their paths."""
    sections = report(run)
    folder = docs / "performance"
    folder.mkdir(parents=True, exist_ok=True)
    files = {docs / "performance.md": as_markdown(run, sections), docs / "performance.html": as_html(run, sections)}
    for section in sections:
        for figure in section.figures:
            files[folder / f"{figure.name}.svg"] = plots.standalone(figure.svg, figure.label)
    for old in set(folder.glob("*.svg")) - files.keys():
        old.unlink()
    if readme and run.races:
        put_into(readme, for_readme(run, docs.name))
    for path, content in files.items():
        path.write_text(content)
    return list(files)


def main(
    results: Annotated[Path, typer.Argument(help="what --benchmark-json wrote")] = Path("out/bench.json"),
    docs: Annotated[
        Path, typer.Option(help="the folder of performance.md, performance.html and performance/*.svg")
    ] = ROOT / "docs",
    readme: Annotated[Path, typer.Option(help="the file with the two markers")] = ROOT / "README.md",
) -> None:
    """Makes the report on a run of the benches."""
    try:
        for path in write(load(results), docs, readme):
            typer.echo(path)
    except UnreadableError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
