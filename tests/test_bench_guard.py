"""What notices a loss of speed: counts of instructions, and races against an older version. No time matters here."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benches"))

import compare
import instructions
from compare import BASE, ROOT, THIS, Comparison

RECORD = json.loads(instructions.RECORD.read_text())
COUNTS = RECORD["instructions"]


def record_with(folder: Path, **counts: int) -> Path:
    path = folder / "record.json"
    path.write_text(json.dumps({**RECORD, "instructions": {**COUNTS, **counts}}))
    return path


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all cases had been counted, with what is on record."""
    monkeypatch.setattr(instructions, "check_machine", lambda: None)
    monkeypatch.setattr(instructions, "build", lambda: Path("instructions"))
    monkeypatch.setattr(instructions, "compiler_version", lambda: RECORD["compiler"])
    monkeypatch.setattr(instructions, "run", lambda command: SimpleNamespace(stdout="\n".join(COUNTS)))
    monkeypatch.setattr(instructions, "count", lambda program, case: COUNTS[case])


@pytest.mark.usefixtures("counted")
class TestInstructions:
    def test_counts_as_on_record_pass(self, capsys: pytest.CaptureFixture[str]) -> None:
        instructions.main()
        assert "No count is more than 20% above the one on record." in capsys.readouterr().out

    def test_a_rise_over_20_percent_fails_and_is_named(self, tmp_path: Path) -> None:
        record = record_with(tmp_path, **{"gru-inference": 1000})
        with pytest.raises(SystemExit) as failed:
            instructions.main(record=record)
        now = f"{COUNTS['gru-inference']:,}"
        assert str(failed.value).startswith(f"gru-inference takes {now} instructions, ")
        assert str(failed.value).endswith(" more than the 1,000 on record; 20% are allowed.")

    def test_a_rise_of_20_percent_is_allowed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(instructions, "count", lambda program, case: 1200)
        instructions.main(record=record_with(tmp_path, **dict.fromkeys(COUNTS, 1000)))

    def test_a_case_on_one_side_only_fails(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"^conv is not counted: --update writes the record anew\.$"):
            instructions.main(record=record_with(tmp_path, conv=1))
        only = tmp_path / "only.json"
        only.write_text(json.dumps({**RECORD, "instructions": {"gru-inference": COUNTS["gru-inference"]}}))
        with pytest.raises(SystemExit, match="lstm-training is not on record"):
            instructions.main(record=only)

    def test_update_writes_the_record(self, tmp_path: Path) -> None:
        record = record_with(tmp_path, **{"gru-inference": 1000})
        instructions.main(update=True, record=record)
        assert record.read_text() == instructions.RECORD.read_text()

    def test_another_compiler_is_named(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(instructions, "compiler_version", lambda: "c++ 99")
        instructions.main()
        assert f"The counts on record are of {RECORD['compiler']}, these of c++ 99." in capsys.readouterr().out


class TestWithoutValgrind:
    @pytest.fixture(autouse=True)
    def _missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(instructions.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(instructions.shutil, "which", lambda name: None if name == "valgrind" else name)
        monkeypatch.setattr(instructions, "torch_ratios", lambda: {"gru-inference": 0.5})

    def test_ratios_are_shown_and_fail_nothing(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("FASTSEQ_REQUIRE", "cpp,numba")
        instructions.main()
        said, instead = capsys.readouterr().out.splitlines()
        assert said == "No instructions were counted: valgrind is not installed."
        assert instead.endswith("which fails nothing: gru-inference 0.50")

    def test_it_can_be_required(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTSEQ_REQUIRE", "cpp,valgrind")
        with pytest.raises(SystemExit):
            instructions.main()

    def test_nothing_is_recorded(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit):
            instructions.main(update=True, record=tmp_path / "record.json")
        assert not list(tmp_path.iterdir())


def test_the_cases_are_the_same_everywhere() -> None:
    assert list(COUNTS) == list(instructions.cases_of_torch())


def test_flags_are_those_of_setup() -> None:
    assert "-O3" in instructions.flags_of_setup()


def test_a_count_is_made_by_valgrind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest case, in earnest: its count is that on record, and fails against half of it."""
    try:
        instructions.check_machine()
    except instructions.UncountableError as reason:
        pytest.skip(str(reason))
    kernels = instructions.built()
    if kernels is None:
        pytest.skip("the kernels are not built here, and take a minute to compile: make bench-guard does")
    monkeypatch.setattr(instructions, "built", lambda: kernels)
    monkeypatch.setattr(instructions, "OUT", tmp_path)
    program, count = instructions.build(), instructions.count
    assert instructions.run([str(program)]).stdout.split() == list(COUNTS)
    case = "gru-inference"
    assert count(program, case) == pytest.approx(COUNTS[case], rel=instructions.MARGIN)
    with pytest.raises(instructions.BrokenError, match="there is no case conv"):
        count(program, "conv")
    monkeypatch.setattr(instructions, "build", lambda: program)
    monkeypatch.setattr(instructions, "count", lambda program, name: count(program, name) if name == case else 1)
    record = record_with(tmp_path, **{**dict.fromkeys(COUNTS, 1), case: COUNTS[case] // 2})
    with pytest.raises(SystemExit, match=f"^{case} takes .* on record; 20% are allowed.$"):
        instructions.main(record=record)


LSTM, ATTENTION, FUSED = (
    "benches/bench_lstm.py::test_lstm[inference-T1_B1_H128]",
    "benches/bench_attention.py::test_attention[training-B32_H8_S64_D64]",
    "benches/bench_fused.py::test_fused[inference-gelu-1024x2048]",
)
# What is appended to a copy of fastseq/functional.py to make another version of it.
CHANGES = """
_right = scaled_dot_product_attention
def scaled_dot_product_attention(*arguments, **options):
    return 1.01 * _right(*arguments, **options)
del cross_entropy
"""


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[compare.Version, compare.Version]]:
    """This one and a changed one: attention is wrong, cross entropy is missing."""
    root = tmp_path_factory.mktemp("base")
    links = shutil.ignore_patterns("__pycache__", "triton", "numba")  # where there are any, to kernels/
    for name in ("fastseq", "kernels", "benches"):
        shutil.copytree(ROOT / name, root / name, ignore=links if name == "fastseq" else None)
    (root / "tests").mkdir()
    for name in ("pyproject.toml", "tests/twins.py"):
        shutil.copy(ROOT / name, root / name)
    with (root / "fastseq" / "functional.py").open("a") as file:
        file.write(CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "OUT", tmp_path_factory.mktemp("out"))
        this, base = (compare.Version(name, at, 1, []) for name, at in ((THIS, ROOT), (BASE, root)))
        yield this, base
        for version in (this, base):
            version.close()


class TestComparing:
    def test_both_run_a_case(self, versions: tuple[compare.Version, compare.Version]) -> None:
        found = compare.compare(LSTM, *versions, smoke=True)
        assert found.title == ("lstm", "inference", "T1_B1_H128")
        assert (found.note, found.is_wrong) == ("", False)
        assert all(len(found.seconds[name]) == 1 and found.seconds[name][0] > 0 for name in (THIS, BASE))

    def test_other_results_are_an_error(self, versions: tuple[compare.Version, compare.Version]) -> None:
        found = compare.compare(ATTENTION, *versions, smoke=True)
        assert found.is_wrong and not found.seconds
        assert found.note.startswith("results differ: y is not as in base.")

    def test_what_the_base_lacks_is_said(self, versions: tuple[compare.Version, compare.Version]) -> None:
        found = compare.compare(FUSED, *versions, smoke=True)
        assert not found.is_wrong and not found.seconds
        assert found.note.startswith("not in base: ImportError: cannot import name 'cross_entropy'")

    def test_the_handful_exists(self, versions: tuple[compare.Version, compare.Version]) -> None:
        assert not versions[0].failed
        assert set(compare.HANDFUL) <= set(versions[0].cases)

    def test_a_folder_without_fastseq_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever is installed does not stand in for it."""
        monkeypatch.setattr(compare, "OUT", tmp_path)
        with pytest.raises(SystemExit, match=r"No module named 'fastseq'|base is to be the fastseq in"):
            compare.Version(BASE, tmp_path, 1, [])


def comparison(*ratios: float) -> Comparison:
    return Comparison(("lstm", "inference", "T1"), {THIS: list(ratios), BASE: [1.0] * len(ratios)})


class TestVerdict:
    def test_nothing_lost(self) -> None:
        words, is_fine = compare.verdict([comparison(1.1, 1.15, 1.1), Comparison(("", "", ""))], 0.2, "main")
        assert words == "1 of 2 cases compared with main: 1.10 of its time in the mean, none lost over 20%"
        assert is_fine

    def test_a_loss_fails(self) -> None:
        words, is_fine = compare.verdict([comparison(1.3, 1.25, 1.2), comparison(1, 1, 1)], 0.2, "main")
        assert words.endswith(", 1 lost over 20%")
        assert not is_fine

    def test_the_threshold_counts(self) -> None:
        assert compare.verdict([comparison(1.3, 1.25, 1.2)], 0.3, "main")[1]

    def test_rounds_that_disagree_are_no_loss(self) -> None:
        assert compare.verdict([comparison(0.2, 0.3, 1.4, 1.5, 11.0)], 0.2, "main")[1]

    def test_what_went_wrong_fails(self) -> None:
        words, is_fine = compare.verdict([comparison(1.0), Comparison(("", "", ""), is_wrong=True)], 0.2, "main")
        assert words.endswith(", none lost over 20%; 1 went wrong")
        assert not is_fine

    def test_comparing_nothing_fails(self) -> None:
        assert compare.verdict([Comparison(("", "", ""), note="not in base")], 0.2, "main") == (
            "0 of 1 cases compared with main",
            False,
        )


def test_an_unknown_base_is_gits_to_tell() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git repository")
    with pytest.raises(SystemExit, match=r"^git: fatal: bad revision 'no-such-version'$"):
        compare.checked_out("no-such-version")


def test_a_base_that_cannot_be_built_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSEQ_NO_EXT", raising=False)
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "setup.py").write_text("raise SystemExit('the compiler is on strike')")
    with pytest.raises(SystemExit, match=r"(?s)^the base cannot be built: .*:\nthe compiler is on strike$"):
        compare.build(folder)


def test_what_is_built_is_used(tmp_path: Path) -> None:
    (tmp_path / "fastseq").mkdir()
    (tmp_path / "fastseq" / "_native.abi3.so").touch()
    compare.build(tmp_path)  # there is no setup.py
