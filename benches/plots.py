"""The report's figures, as SVG that is readable on light and on dark pages."""

import re
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import matplotlib
from results import MODES, OURS, Race, Run, title

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# What pages and SVG files give two values, for light and dark; matplotlib knows them as these colors.
INK, FAINT = "#010203", "#040506"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)"}
# Legible on the other background, too, where a viewer does not tell which it has.
SCHEMES = "svg{--ink:#636c76;--faint:#b4bcc4}@media(prefers-color-scheme:dark){svg{--ink:#9aa4ae;--faint:#4a525b}}"

WHO = {  # color and marker
    OURS: ("#6f5fe0", "o"),
    "torch": ("#e0662b", "s"),
    "torch.compile": ("#c4559d", "D"),
    "onnxruntime": ("#3584d6", "^"),
    "openvino": ("#17a07f", "v"),
    "transformers": ("#b38a00", "P"),
    "numba": ("#6f5fe0", "x"),
    "plain": ("#808a94", "+"),
}
HOLLOW = {"markerfacecolor": "none", "markeredgewidth": 1.4}
HUES = (
    "#3584d6",
    "#e0662b",
    "#17a07f",
    "#c4559d",
    "#b38a00",
    "#6f5fe0",
    "#5f9e2f",
    "#d64545",
    "#2b9fb8",
    "#96703f",
    "#808a94",
)

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastseq",
    "font.size": 9,
    "figure.dpi": 72,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.markersize": 5,
}


def figure(draw: Callable[..., Any]) -> Callable[[Run], str]:
    """Makes a function that draws and returns a matplotlib figure one that returns SVG."""

    def drawn(run: Run) -> str:
        with plt.rc_context(STYLE):
            fig = draw(run)
            out = BytesIO()
            fig.savefig(
                out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
            )
            plt.close(fig)
        return cleaned(out.getvalue().decode())

    drawn.__doc__ = draw.__doc__
    return drawn


def cleaned(svg: str) -> str:
    """Without matplotlib's preamble, in the page's colors, and in the reader's font: DejaVu, measured, is wider."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    return svg.replace("<svg ", '<svg style="stroke-linejoin:round;stroke-linecap:butt" ', 1)


def standalone(svg: str, label: str) -> str:
    """A file of its own."""
    head, rest = svg.split(">", 1)
    return f'{head} role="img">\n<title>{label}</title>\n<style>{SCHEMES}</style>{rest}'


def inline(svg: str, name: str, label: str) -> str:
    """A part of an HTML page, whose other figures have other ids."""
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg.replace("xlink:href", "href"))
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def ratio_axis(axes: Any, label: str = "time of a peer / fastseq's") -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color=INK, linewidth=1, zorder=1)
    axes.set_xlabel(label)
    axes.tick_params(which="both", length=0)


def names_of(axes: Any, names: Sequence[str]) -> None:
    """A row for each name, from top to bottom."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.tick_params(which="both", length=0)


def note(axes: Any, text: str, at: tuple[float, float], **options: Any) -> None:
    """A word just above a point."""
    axes.annotate(text, at, (3, 2), textcoords="offset points", fontsize=8, va="bottom", **options)


def log_axes(axes: Any, both: bool = True) -> None:
    axes.set_xscale("log")
    if both:
        axes.set_yscale("log")
    axes.minorticks_off()
    axes.tick_params(length=2)


def look(who: str) -> tuple[str, str]:
    """Color and marker."""
    return WHO.get(who, ("#808a94", "o"))


def dot(axes: Any, x: float, y: float, who: str, **options: Any) -> None:
    color, marker = look(who)
    style = {"markeredgewidth": 1.4 if marker in "x+" else 0, **options}
    axes.plot([x], [y], marker, color=color, zorder=3, **style)


def legend(fig: Any, whom: Sequence[str]) -> None:
    handles = []
    for who in whom:
        color, marker = look(who)
        handles.append(Line2D([], [], linestyle="", marker=marker, color=color, label=title(who)))
    fig.legend(handles=handles, loc="upper center", ncol=max(1, len(handles)), handletextpad=0.2, columnspacing=1.4)


def raced(races: Sequence[Race], whom: Sequence[str]) -> list[str]:
    return [who for who in whom if any(who in race.ratios for race in races)]


def margins(fig: Any, left: float, right: float, top: float, bottom: float, **options: float) -> None:
    """Margins in inches."""
    width, height = fig.get_size_inches()
    fig.subplots_adjust(
        left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height, **options
    )


@figure
def overview(run: Run) -> Any:
    """Geometric means by family and peer, hollow where they are of some of the cases only."""
    families, whom = run.families, raced(run.races, run.rivals)
    fig, panels = plt.subplots(1, 2, sharex=True, sharey=True, figsize=(8.6, 1.2 + 0.27 * len(families)), squeeze=False)
    margins(fig, 1.45, 0.25, 0.62, 0.48, wspace=0.08)
    for axes, mode in zip(panels[0], MODES, strict=True):
        for y, family in enumerate(families):
            for who in whom:
                if found := run.mean(run.of(family, mode), who):
                    in_part = found[1] < len(run.of(family, mode))
                    dot(axes, found[0], y, who, markersize=6, **HOLLOW if in_part else {})
        ratio_axis(axes)
        axes.set_title(mode, fontweight="bold")
    names_of(panels[0][0], families)
    legend(fig, whom)
    return fig


@figure
def ratios(run: Run) -> Any:
    """Every case against every peer, with quartiles."""
    rows: list[tuple[str, str | None]] = []
    for family in run.families:
        rows.append((family, None))
        rows += dict.fromkeys((race.name, family) for race in run.races if race.family == family)
    place = {row: y for y, row in enumerate(rows)}
    whom = raced(run.races, run.peers)
    fig, panels = plt.subplots(1, 2, sharex=True, sharey=True, figsize=(10, 1.45 + 0.2 * len(rows)), squeeze=False)
    margins(fig, 3.5, 0.2, 0.85, 0.48, wspace=0.06)
    for axes, mode in zip(panels[0], MODES, strict=True):
        for race in run.races:
            y = place[race.name, race.family]
            racing = [who for who in whom if who in race.ratios and race.mode == mode]
            for k, who in enumerate(racing):
                shifted = y + 0.13 * (k - (len(racing) - 1) / 2)
                low, high = race.quartiles[who]
                axes.plot([low, high], [shifted, shifted], color=look(who)[0], linewidth=1.2, zorder=2)
                dot(axes, race.ratios[who], shifted, who, markersize=4.5)
        ratio_axis(axes)
        axes.set_title(mode, fontweight="bold")
        for y, (_, family) in enumerate(rows):
            if family is None:
                axes.axhspan(y - 0.5, y + 0.5, color=FAINT, alpha=0.25, linewidth=0)
        axes.tick_params(labeltop=True)  # the figure is long
    names_of(panels[0][0], [name for name, _ in rows])
    for label, (_, family) in zip(panels[0][0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if family else "bold")
    legend(fig, whom)
    return fig


@figure
def roofline(run: Run) -> Any:
    """FLOP/s over FLOPs a byte, and the fraction of the least time."""
    rates, families = run.machine["roofline"], run.families
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, max(4.4, 1.2 + 0.27 * len(families))), width_ratios=(3, 2))
    margins(fig, 0.65, 0.3, 0.45, 0.5, wspace=0.42)
    hues = {family: HUES[k % len(HUES)] for k, family in enumerate(families)}
    for race in run.races:
        filled = dict(markerfacecolor=hues[race.family] if race.mode == "inference" else "none")
        style = dict(color=hues[race.family], markersize=4.5, markeredgewidth=1, alpha=0.9, **filled)
        if race.flops and race.bytes:
            left.plot([race.flops / race.bytes], [race.flops / race.seconds / 1e9], "o", **style)
        if race.roofline_fraction is not None:
            y = families.index(race.family) + (-0.14 if race.mode == "inference" else 0.14)
            right.plot([100 * race.roofline_fraction], [y], "o", **style)
    log_axes(left)
    if isinstance(rates, dict):
        (low, high), peak = left.get_xlim(), rates["gflops"]
        low /= 3  # room for the names of the roofs
        for level, rate in rates["gb_per_s"].items():
            left.plot([low, peak / rate], [low * rate, peak], color=FAINT, linewidth=1, zorder=0)
            note(left, level, (low, low * rate), ha="left")
        left.plot([low, high], [peak, peak], color=INK, linewidth=1, zorder=0)
        left.set_xlim(low, high)
        left.set_ylim(top=max(left.get_ylim()[1], peak) * 1.5)
        note(left, f"multiply-adds: {peak:.0f} GFLOP/s", (low, peak), ha="left")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_xlabel("FLOP / byte, at least")
    left.set_ylabel("GFLOP/s")
    left.set_title("fastseq under the machine's roof", fontweight="bold")
    right.set_title("share of the limit", fontweight="bold")
    right.set_xlim(0, max(100.0, *right.get_xlim()))  # a busy machine's rates come out too low
    right.axvline(60, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    right.set_xlabel("% of the limit (filled: inference, hollow: training)")
    names_of(right, families)
    for label, family in zip(right.get_yticklabels(), families, strict=True):
        label.set_color(hues[family])
    return fig


UNITS = {"T": "T, steps", "B": "B, rows", "H": "H, hidden size", "S": "S, sequence length"}


@figure
def scaling(run: Run) -> Any:
    """Milliseconds over a size, fastseq's and torch's."""
    races = run.series["scaling"]
    layers = list(dict.fromkeys(race.series["layer"] for race in races))
    panels = list(dict.fromkeys((race.series["layer"], race.series["axis"]) for race in races))
    columns = max(sum(layer == name for name, _ in panels) for layer in layers)
    fig, grid = plt.subplots(
        len(layers), columns, figsize=(max(4.5, 3.2 * columns), 0.9 + 2.5 * len(layers)), squeeze=False
    )
    margins(fig, 0.7, 0.15, 0.75, 0.5, wspace=0.28, hspace=0.55)
    for row, layer in zip(grid, layers, strict=True):
        axes_of = [axis for name, axis in panels if name == layer]
        for axes in row[len(axes_of) :]:
            axes.set_visible(False)
        for axes, axis in zip(row, axes_of, strict=False):
            chosen = [race for race in races if (race.series["layer"], race.series["axis"]) == (layer, axis)]
            for who in (OURS, "torch"):
                for mode, line in zip(MODES, ("-", "--"), strict=True):
                    points = sorted(
                        (race.series["value"], race.median_seconds[who] * 1e3)
                        for race in chosen
                        if race.mode == mode and who in race.median_seconds
                    )
                    color, marker = WHO[who]
                    values, times = [value for value, _ in points], [time for _, time in points]
                    axes.plot(values, times, line, marker=marker, color=color, markersize=4)
            log_axes(axes)
            values = sorted({race.series["value"] for race in chosen})
            axes.set_xticks(values, [str(value) for value in values])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.set_xlabel(UNITS.get(axis, axis))
            axes.set_ylabel("ms")
            axes.set_title(f"{layer}; {chosen[0].series['fixed']}")
    handles = [
        Line2D([], [], linestyle=line, marker=WHO[who][1], color=WHO[who][0], label=f"{who}, {mode}")
        for who in (OURS, "torch")
        for mode, line in zip(MODES, ("-", "--"), strict=True)
    ]
    fig.legend(handles=handles, loc="upper center", ncol=4 if columns > 1 else 2)
    return fig


@figure
def threads(run: Run) -> Any:
    """Speed with the most threads over speed with one."""
    races = run.series["threads"]
    most = max(race.threads for race in races)
    names = list(dict.fromkeys(race.case for race in races))
    fig, axes = plt.subplots(figsize=(7.6, 1.25 + 0.27 * len(names)))
    margins(fig, 3.3, 0.3, 0.42, 0.5)
    for y, name in enumerate(names):
        seconds = {race.threads: race.median_seconds for race in races if race.case == name}
        for who in (OURS, "torch"):
            if {1, most} <= seconds.keys() and who in seconds[1] and who in seconds[most]:
                dot(axes, seconds[1][who] / seconds[most][who], y, who, markersize=6)
    for x in (1, most):
        axes.axvline(x, color=INK, linewidth=1, linestyle="-" if x == most else (0, (4, 3)))
    axes.set_xlim(min(0.5, axes.get_xlim()[0]), max(most + 0.1, axes.get_xlim()[1]))
    axes.set_xlabel(f"speed of {most} threads over that of 1 (at best {most})")
    names_of(axes, names)
    legend(fig, (OURS, "torch"))
    return fig


@figure
def overhead(run: Run) -> Any:
    """Microseconds of a call of next to nothing."""
    races = run.series["overhead"]
    layers = list(dict.fromkeys(race.series["layer"] for race in races))
    fig, panels = plt.subplots(1, 2, sharey=True, figsize=(8.6, 1.25 + 0.27 * len(layers)), squeeze=False)
    margins(fig, 2.2, 0.3, 0.62, 0.5, wspace=0.1)
    for axes, mode in zip(panels[0], MODES, strict=True):
        for race in races:
            if race.mode == mode:
                for who, seconds in race.median_seconds.items():
                    dot(axes, seconds * 1e6, layers.index(race.series["layer"]), who, markersize=6)
        axes.set_xlim(
            0, 1.08 * max([s * 1e6 for r in races if r.mode == mode for s in r.median_seconds.values()], default=1)
        )
        axes.set_xlabel("µs a call")
        axes.set_title(mode, fontweight="bold")
        axes.tick_params(length=0)
    names_of(panels[0][0], layers)
    legend(fig, (OURS, "torch"))
    return fig


PARTS = {"import torch": "#808a94", "import fastseq": "#6f5fe0", "first call": "#e0662b"}


@figure
def first_calls(run: Run) -> Any:
    """Seconds until the first result, by what they go into."""
    rows = [
        (f"{call['layer']}: {call['how']}{', again' * k}", found)
        for call in run.first_calls
        for k, found in enumerate(call["runs"])
    ]
    fig, axes = plt.subplots(figsize=(7.6, 1.2 + 0.24 * len(rows)))
    margins(fig, 2.9, 0.5, 0.4, 0.5)
    for y, (_, found) in enumerate(rows):
        start = 0.0
        for part, color in PARTS.items():
            axes.barh(y, found.get(part, 0), left=start, height=0.62, color=color)
            start += found.get(part, 0)
        said = found.get("absent") or f"{start:.1f}"
        axes.annotate(said, (start, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlabel("seconds from the first import to the first result")
    names_of(axes, [name for name, _ in rows])
    handles = [Line2D([], [], linestyle="", marker="s", color=color, label=part) for part, color in PARTS.items()]
    fig.legend(handles=handles, loc="upper center", ncol=3, handletextpad=0.2)
    return fig
