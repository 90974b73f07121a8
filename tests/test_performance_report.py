"""The report on a run of the benches: what it says of invented results, and that the benches write what it reads."""

import copy
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the report's figures need matplotlib, of the extra bench")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benches"))
import performance  # noqa: E402
import plots  # noqa: E402
from results import LEFT_OUT, UnreadableError, load  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PEERS = {"torch": 1.5, "numba": 1.2, "plain": 0.9, "torch.compile": 1.3, "onnxruntime": 0.8}
Results = dict[str, Any]


def race(op: str, mode: str, case: str, ours: float, peers: dict[str, float], **more: Any) -> Results:
    """One benchmark of the JSON: seconds of fastseq, and others' as multiples of them."""
    info = dict(
        op=op,
        mode=mode,
        case=case,
        threads=2,
        served_by="cpp",
        median_seconds={"fastseq": ours, **{name: ours * ratio for name, ratio in peers.items()}},
        ratios=dict(peers),
        quartiles={name: [ratio * 0.95, ratio * 1.1] for name, ratio in peers.items()},
        absent={"openvino": "not installed", "transformers": "-"},
        flops=10**9,
        bytes=10**7,
        roofline_fraction=0.4,
    )
    return {"name": case, "extra_info": {**info, **more}, "stats": {"rounds": 9 if ours < 1e-2 else 5}}


def series(kind: str, mode: str, case: str, ours: float, **more: Any) -> Results:
    threads = more.pop("threads", 2)
    return race(kind, mode, case, ours, {"torch": 2.0}, threads=threads, series=dict(kind=kind, **more), absent={})


@pytest.fixture
def results() -> Results:
    rates = {"gflops": 500.0, "gb_per_s": {"L1": 500.0, "L2": 200.0, "DRAM": 40.0}, "capacity": {"L1": 1, "L2": 2}}
    machine = dict(
        cpu="A CPU",
        instruction_set="avx2",
        threads=2,
        commit="abc1234",
        versions={"fastseq": "0.1.0", "torch": "2.13.0", "numba": "0.68", "onnxruntime": "1.32", "openvino": None},
        run="representative",
        roofline=rates,
        peers=[
            {"name": name, "modes": modes, "ours": name == "numba"}
            for name, modes in {
                **{name: ["inference", "training"] for name in PEERS if name != "onnxruntime"},
                "transformers": ["inference", "training"],
                "onnxruntime": ["inference"],
                "openvino": ["inference"],
            }.items()
        ],
    )
    both, case = ("inference", "training"), "T{}_B1_H128"
    benchmarks = [
        *(race("lstm", "inference", case.format(T), T * 1e-4, PEERS) for T in (9, 10, 100)),
        *(race("lstm", "training", case.format(T), T * 3e-4, {"torch": 1.4}) for T in (9, 10, 100)),
        race("option", "inference", "lengths", 2e-3, {"plain": 0.9}, absent={}),
        race("fused pieces", "training", "gelu", 1e-3, {"torch": 3.0}, flops=0, absent={"torch.compile": "> 15 s"}),
        race("something new", "training", "<b>", 1e-3, {"torch": 0.5}, roofline_fraction=None),
        *(
            series("scaling", mode, case.format(T), T * 1e-4, layer="LSTM", axis="T", value=T, fixed="B 1, H 128")
            for mode in both
            for T in (1, 10)
        ),
        *(series("threads", "inference", "LSTM", 2e-3 / n, layer="LSTM", threads=n) for n in (1, 2)),
        *(series("overhead", mode, "LSTM", 1e-5, layer="LSTM") for mode in both),
        series("memory", "training", "long", 0.1, layer="attention", peak_mib={"fastseq": 76.4, "torch": 830.2}),
    ]
    seconds = {"import torch": 1.5, "import fastseq": 0.5, "first call": 4.25, "second call": 1e-4}
    runs = {"numba": [seconds, seconds], "torch.compile": [{"absent": "> 60 s"}]}
    for way, found in runs.items():
        call = dict(kind="first call", layer="LSTM", how=way, runs=found)
        benchmarks.append({"name": way, "extra_info": {"series": call}})
    return {"fastseq": machine, "datetime": "2026-01-02T03:04:05", "benchmarks": benchmarks}


@pytest.fixture
def report(tmp_path: Path) -> Callable[[Results], Path]:
    """Writes the report on results, and returns its folder."""

    def written(results: Results) -> Path:
        (tmp_path / "bench.json").write_text(json.dumps(results))
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{performance.BEGIN}\nold\n{performance.END}\nafter\n")
        performance.write(load(tmp_path / "bench.json"), tmp_path / "docs", readme)
        return tmp_path / "docs"

    return written


def table_after(heading: str, markdown: str) -> dict[tuple[str, ...], dict[str, str]]:
    """The first table of a section: cells by column, by the first two cells of a row."""
    lines = iter(markdown.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {tuple(row[:2]): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_all_of_it_and_every_figure_says_what_it_was_measured_on(report: Any, results: Results) -> None:
    docs = report(results)
    markdown, page = ((docs / f"performance.{kind}").read_text() for kind in ("md", "html"))
    for section in (
        *("At a glance", "Every case", "Where fastseq is behind", "The machine's limit", "How cost grows", "Threads"),
        *("Calls of next to nothing", "First calls", "Memory", "How it was measured"),
    ):
        assert f"## {section}\n" in markdown
        assert f"<h2>{section.replace(chr(39), '&#x27;')}</h2>" in page
    figures = {path.stem for path in (docs / "performance").glob("*.svg")}
    assert figures == {"overview", "ratios", "roofline", "scaling", "threads", "overhead", "first-calls"}
    of = "Commit abc1234 on A CPU (avx2), 2 threads; fastseq 0.1.0, torch 2.13.0"
    captions = re.findall(r"!\[.*?\]\(performance/(.*?)\.svg\)\n\n\*(.*?)\*\n", markdown)
    assert {name for name, _ in captions} == figures and all(of in text for _, text in captions)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == len(figures) and all(of in text for text in captions)
    assert "on 2026-01-02" in markdown
    memory = table_after("Memory", markdown)
    assert memory["long", "76"]["torch MiB"] == "830"
    assert "> 60 s" in table_after("First calls", markdown)["LSTM", "torch.compile"]["first call s"]


def test_means_are_geometric(report: Any, results: Results) -> None:
    for benchmark, ratio in zip(results["benchmarks"][:3], (1.0, 2.0, 4.0), strict=True):
        benchmark["extra_info"]["ratios"] = {"torch": ratio}
        benchmark["extra_info"]["quartiles"] = {"torch": [ratio, ratio]}
    means = table_after("At a glance", (report(results) / "performance.md").read_text())
    assert means["LSTM", "inference"]["torch"] == "2.00"


def test_a_mean_of_some_cases_says_of_how_many(report: Any, results: Results) -> None:
    docs = report(copy.deepcopy(results))
    hollow = re.compile("fill-opacity: 0; stroke: " + plots.WHO["torch.compile"][0])
    whole = (docs / "performance" / "overview.svg").read_text()
    del results["benchmarks"][0]["extra_info"]["ratios"]["torch.compile"]
    docs = report(results)
    means = table_after("At a glance", (docs / "performance.md").read_text())
    assert means["LSTM", "inference"]["torch.compile"] == "1.30 (2 of 3)"
    assert means["LSTM", "inference"]["torch"] == "1.50"
    assert "| 1.30 (2 of 3) |" in (docs.parent / "README.md").read_text()
    part = (docs / "performance" / "overview.svg").read_text()
    assert len(hollow.findall(part)) > len(hollow.findall(whole))


def test_a_peer_that_is_not_installed_is_shown_so(report: Any, results: Results) -> None:
    docs = report(results)
    markdown = (docs / "performance.md").read_text()
    means, cases = (table_after(heading, markdown) for heading in ("At a glance", "Every case"))
    for table, row in ((means, ("LSTM", "inference")), (cases, ("LSTM", "T9_B1_H128"))):
        assert table[row]["OpenVINO"] == "not installed"
        assert table[row]["Hugging Face"] == "-"
    assert means["fused pieces", "training"]["torch.compile"] == "> 15 s"
    assert "OpenVINO is not installed" in markdown
    readme = (docs.parent / "README.md").read_text()
    assert re.search(r"\| LSTM \|.* not installed \|", readme)
    assert not re.search(r"\| 0\.00 \|", markdown + readme)
    assert '<td class="number">not installed</td>' in (docs / "performance.html").read_text()


def test_who_was_left_out_of_most_cases_is_not_in_the_readme(report: Any, results: Results) -> None:
    for benchmark, left_out in zip(results["benchmarks"][:3], (False, True, True), strict=True):
        if left_out:
            del benchmark["extra_info"]["ratios"]["torch.compile"]
            benchmark["extra_info"]["absent"]["torch.compile"] = LEFT_OUT
    docs = report(results)
    assert table_after("At a glance", (docs / "performance.md").read_text())["LSTM", "inference"]["torch.compile"]
    assert "torch.compile" not in (docs.parent / "README.md").read_text()
    results["benchmarks"][1]["extra_info"]["ratios"]["torch.compile"] = 1.3
    del results["benchmarks"][1]["extra_info"]["absent"]["torch.compile"]
    assert "inference: torch.compile" in (report(results).parent / "README.md").read_text()


def test_a_peer_that_nobody_asked_for_was_not_run(report: Any, results: Results) -> None:
    for benchmark in results["benchmarks"]:
        for of_peers in ("ratios", "quartiles", "median_seconds", "absent"):
            benchmark["extra_info"].get(of_peers, {}).pop("onnxruntime", None)
    markdown = (report(results) / "performance.md").read_text()
    assert table_after("At a glance", markdown)["LSTM", "inference"]["ONNX Runtime"] == "not run"
    assert "ONNX Runtime was not run" in markdown


def test_cases_behind_a_peer_are_listed_worst_first(report: Any, results: Results) -> None:
    section = (report(results) / "performance.md").read_text().partition("## Where fastseq is behind\n")[2]
    section = section.partition("\n## ")[0]
    assert "In 4 of 9 races somebody is faster than fastseq: torch in 1 of them;" in section
    assert "In none of these 4 comparisons the quartiles lie on both sides of 1." in section
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert rows[0].startswith("| something new |") and len(rows) == 4
    assert "plain" not in section


def test_the_number_of_rounds_is_told(report: Any, results: Results) -> None:
    markdown = (report(results) / "performance.md").read_text()
    cases = table_after("Every case", markdown)
    assert [cases["LSTM", f"T{T}_B1_H128"]["rounds"] for T in (9, 100)] == ["9", "5"]
    assert "Races have 5 to 9 rounds of turns, 9 in the median" in markdown


def test_nobody_ahead_is_said(report: Any, results: Results) -> None:
    results["benchmarks"] = [b for b in results["benchmarks"] if b["name"] == "gelu"]
    assert "Nobody is faster than fastseq in any case." in (report(results) / "performance.md").read_text()


def test_figures_are_xml_for_both_schemes(report: Any, results: Results) -> None:
    for path in (report(results) / "performance").glob("*.svg"):
        root = ET.fromstring(path.read_text())
        assert (
            root.tag == "{http://www.w3.org/2000/svg}svg" and root.find("{http://www.w3.org/2000/svg}title") is not None
        )
        text = path.read_text()
        assert "prefers-color-scheme" in text and "var(--ink)" in text and "#010203" not in text
        assert "<metadata" not in text and "2026" not in text


def test_the_same_results_give_the_same_files(report: Any, results: Results) -> None:
    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in report(results).rglob("*") if path.is_file()}

    assert files() == files()


class Links(HTMLParser):
    """What a page would load or lead to, and its ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [
            given[name] or "" for name in ("src", "href", "xlink:href", "srcset", "action", "data") if name in given
        ]
        self.ids += [given["id"] or ""] if "id" in given else []


def test_the_page_asks_nobody_for_anything(report: Any, results: Results) -> None:
    page = (report(results) / "performance.html").read_text()
    found = Links(page)
    assert found.links and all(link.startswith("#") for link in found.links)
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert "://" not in page and "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "<b>" not in page  # a case's name


@pytest.mark.parametrize(
    "kept", ["lstm", "fused pieces", "something new", "scaling", "threads", "first call", "memory"]
)
def test_a_run_of_a_part(report: Any, results: Results, kept: str) -> None:
    def kind(info: Results) -> str:
        return info["series"]["kind"] if "series" in info else info["op"]

    results["benchmarks"] = [b for b in results["benchmarks"] if kind(b["extra_info"]) == kept]
    results["fastseq"]["roofline"] = "not measured: no C++ compiler"
    for benchmark in results["benchmarks"]:
        if "roofline_fraction" in benchmark["extra_info"]:
            benchmark["extra_info"]["roofline_fraction"] = None
    docs = report(results)
    readme = (docs.parent / "README.md").read_text()
    if kept in ("lstm", "fused pieces", "something new"):
        assert "not measured: no C++ compiler" in (docs / "performance.md").read_text()
        assert "overview.svg" in readme
    else:
        assert readme == f"before\n{performance.BEGIN}\nold\n{performance.END}\nafter\n"


def test_figures_of_an_earlier_run_do_not_stay(report: Any, results: Results) -> None:
    docs = report(copy.deepcopy(results))
    results["benchmarks"] = [b for b in results["benchmarks"] if b["extra_info"].get("op") == "lstm"]
    report(results)
    assert {path.stem for path in (docs / "performance").iterdir()} == {"overview", "ratios", "roofline"}


def test_the_rest_of_the_readme_stays(report: Any, results: Results) -> None:
    readme = (report(results).parent / "README.md").read_text()
    assert readme.startswith(f"before\n{performance.BEGIN}\n![") and readme.endswith(f"\n{performance.END}\nafter\n")
    assert "old" not in readme and "docs/performance/overview.svg" in readme and "`make bench report`" in readme


def test_the_repositorys_readme_has_the_markers() -> None:
    readme = (ROOT / "README.md").read_text()
    assert 0 < readme.find(performance.BEGIN) < readme.find(performance.END) < readme.find("## Try it")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "make bench writes it"),
        ("{", "is not JSON"),
        ("[]", "it lacks fastseq"),
        ('{"machine_info": {}, "benchmarks": []}', "it lacks fastseq"),
    ],
)
def test_a_file_of_something_else(tmp_path: Path, capsys: Any, content: str | None, said: str) -> None:
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UnreadableError, match=re.escape(said)):
        load(path)
    with pytest.raises(performance.typer.Exit):
        performance.main(path, tmp_path, tmp_path / "README.md")
    assert said in capsys.readouterr().err and [*tmp_path.iterdir()] == [path] * path.exists()


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        (lambda results: results["fastseq"].pop("peers"), "its fastseq lacks peers"),
        (lambda results: results.pop("benchmarks"), "KeyError: 'benchmarks'"),
        (lambda results: results["benchmarks"][0].pop("stats"), "KeyError: 'stats'"),
        (lambda results: results["benchmarks"][0]["extra_info"].pop("quartiles"), "argument: 'quartiles'"),
        (lambda results: results["benchmarks"][0]["extra_info"].update(new=1), "argument 'new'"),
        (lambda results: results["benchmarks"].insert(0, []), "TypeError: "),
    ],
)
def test_a_file_of_other_benches(tmp_path: Path, results: Results, lacking: Any, said: str) -> None:
    lacking(results)
    (tmp_path / "bench.json").write_text(json.dumps(results))
    with pytest.raises(UnreadableError, match=f"is of other benches than these: .*{said}"):
        load(tmp_path / "bench.json")


def test_as_many_threads_as_asked_for() -> None:
    """Of 1, 2, 4 and so on."""
    pytest.importorskip("pytest_benchmark", reason="the benches need pytest-benchmark, of the extra bench")
    for threads, counts in ((1, {"1"}), (4, {"1", "2", "4"})):
        collected = run_benches("--collect-only", "-k", "test_threads", f"--threads={threads}")
        assert set(re.findall(r"test_threads\[(\d+)-", collected)) == counts


def test_a_readme_without_markers(report: Any, results: Results, tmp_path: Path, capsys: Any) -> None:
    docs = report(results)
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(performance.typer.Exit):
        performance.main(tmp_path / "bench.json", docs, tmp_path / "README.md")
    assert "lacks the markers" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "nothing"


class Rows(HTMLParser):
    """The texts of a table's cells, and the sorted column's order."""

    def __init__(self, page: str, table: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.order: dict[int, str] = {}
        self.columns = 0
        self.feed(page.partition(f'<table id="{table}-table">')[2].partition("</table>")[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "th":
            if "aria-sort" in dict(attrs):
                self.order[self.columns] = dict(attrs)["aria-sort"] or ""
            self.columns += 1
        elif tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip() + " "

    def column(self, k: int) -> list[str]:
        return [row[k].split(" ")[0] for row in self.rows if row]


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., str]:
    """Opens a page and returns its DOM, once its scripts have run."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser on PATH: {', '.join(BROWSERS)}")

    def opened(page: Path, fragment: str = "") -> str:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=5000", "--dump-dom", f"{page.as_uri()}{fragment}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return opened


def test_tables_sort_in_a_browser(report: Any, results: Results, browser: Callable[..., str]) -> None:
    page = report(results) / "performance.html"
    head = re.findall(r"<button[^>]*>(.*?)</button>", page.read_text().partition('id="cases-table"')[2])
    ours, onnxruntime = head.index("fastseq ms"), head.index("ONNX Runtime")  # who is not in every race

    unsorted = Rows(browser(page), "cases")
    assert not unsorted.order and len(unsorted.column(ours)) == 9
    ascending = Rows(browser(page, f"#sort=cases,{ours}"), "cases")
    assert ascending.order == {ours: "ascending"}
    times = [float(text) for text in ascending.column(ours)]
    assert times == sorted(times) and times != [float(text) for text in unsorted.column(ours)]
    descending = Rows(browser(page, f"#sort=cases,{onnxruntime},descending"), "cases")
    found = descending.column(onnxruntime)
    assert descending.order == {onnxruntime: "descending"} and found[:3] == ["0.80"] * 3 and "0.80" not in found[3:]
    assert not Rows(browser(page, "#sort=cases,99"), "cases").order

    # Twice on the header of names: numbers in them count as such, and the second time turns the order around.
    clicks = "const button = document.querySelectorAll('#cases-table th button')[1]; button.click();"
    for count, order in ((1, "ascending"), (2, "descending")):
        page.write_text(page.read_text().replace("</body>", f"<script>{{{clicks}}}</script></body>"))
        clicked = Rows(browser(page), "cases")
        assert clicked.order == {1: order}, count
        steps = [name for name in clicked.column(1) if name.startswith("T")]
        assert list(dict.fromkeys(steps)) == [f"T{T}_B1_H128" for T in ((9, 10, 100) if count == 1 else (100, 10, 9))]


def run_benches(*options: str) -> str:
    command = [sys.executable, "-m", "pytest", "benches", "-p", "no:cacheprovider", "-q", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_benches_write_what_the_report_reads(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="the benches need pytest-benchmark, of the extra bench")
    path = tmp_path / "bench.json"
    chosen = "test_lstm and T1_B1_H128 or test_overhead and SwiGLU"
    run_benches(
        "--cases", "1", "-k", chosen, "--representative", "--peers", "torch,openvino", f"--benchmark-json={path}"
    )
    run = load(path)
    assert [(race.op, race.mode) for race in run.races] == [("lstm", "inference"), ("lstm", "training")]
    assert [race.mode for race in run.series["overhead"]] == ["inference", "training"]
    for race in run.races:
        low, high = race.quartiles["torch"]
        assert 0 < low <= race.ratios["torch"] <= high
        assert race.flops > 0 and race.bytes > 0 and race.seconds > 0
        assert (race.roofline_fraction is not None) == isinstance(run.machine["roofline"], dict)
    (tmp_path / "README.md").write_text(f"{performance.BEGIN}{performance.END}")
    performance.main(path, tmp_path / "docs", tmp_path / "README.md")
    assert "| LSTM | inference |" in (tmp_path / "docs" / "performance.md").read_text()


def test_runs_are_compared_without_a_word_on_the_machine(tmp_path: Path) -> None:
    """Wherever they are kept: pytest-benchmark fails to warn about a folder outside of the current one."""
    pytest.importorskip("pytest_benchmark", reason="the benches need pytest-benchmark, of the extra bench")
    options = ("--smoke", "-k", "test_overhead and inference", "--peers", "torch", f"--benchmark-storage={tmp_path}")
    run_benches(*options, "--benchmark-save=one")
    said = run_benches(*options, "--benchmark-compare=0001")
    assert "0001_one" in said and "machine_info" not in said


def test_representative_cases_exist() -> None:
    pytest.importorskip("pytest_benchmark", reason="the benches need pytest-benchmark, of the extra bench")
    from representative import EVERY, MODES, REPRESENTATIVE

    collected: dict[str, set[str]] = {}
    for test, name in re.findall(r"benches/(\S+?)\[(.*)\]", run_benches("--collect-only", "--representative")):
        for mode in MODES:
            name = name.removeprefix(f"{mode}-")
        collected.setdefault(test, set()).add(name)
    for test, names in REPRESENTATIVE.items():
        if test in collected or not test.startswith("bench_huggingface"):  # which needs transformers
            assert names is EVERY or collected[test] == set(names), test
