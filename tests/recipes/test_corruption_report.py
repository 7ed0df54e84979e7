"""The corruption benchmark's page holds the CSV's numbers, says what is solid, and survives what is missing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.corruption.benchmark import COLUMNS
from benchmarks.corruption.conditions import CONDITIONS
from benchmarks.corruption.report import (
    BIN_EDGES,
    PAGE_FILE,
    estimate,
    gap_share,
    paired,
    read_runs,
    write_corruption_report,
)
from benchmarks.corruption.report.findings import verdict
from benchmarks.corruption.report.presets import describe
from benchmarks.corruption.report.tables import gap_table, rare_table, sft_differences, spell, success_table
from benchmarks.corruption.report.variants import (
    ablation_table,
    search_table,
    sweep_points,
    sweep_table,
    variant_conditions,
)
from benchmarks.corruption.run import Cell, Setting
from benchmarks.corruption.write_report import main, severity
from benchmarks.grid import append, finished, read
from ptr_hf.presets import PRESETS
from ptr_hf.report.dynamics import DYNAMICS_FILE, DynamicsLog

SHIFT = {0: 0.02, 1: -0.03, 2: 0.00, 3: 0.01, 4: -0.01}
MEANS = {
    "clean": {"sft": 0.80, "ptr": 0.80, "ptr_consequence": 0.70, "small_loss": 0.795, "oracle": 0.80},
    "combined": {"sft": 0.50, "ptr": 0.50, "ptr_consequence": 0.65, "small_loss": 0.64, "oracle": 0.70},
    "zeroed": {"sft": 0.78, "ptr": 0.70, "ptr_consequence": 0.78, "small_loss": 0.78, "oracle": 0.78},
}
WOBBLE = {  # what a preset's seeds differ by beyond the seed's own shift; sums to 0
    "sft": (0.0, 0.0, 0.0, 0.0, 0.0),
    "ptr": (0.02, -0.02, 0.01, -0.01, 0.0),
    "ptr_consequence": (0.01, 0.0, -0.01, 0.02, -0.02),
    "small_loss": (0.0, 0.03, -0.02, -0.01, 0.0),
    "oracle": (0.01, -0.01, 0.0, -0.01, 0.01),
}


def row(name: str, condition: str, seed: int, success: float, base: str = "", **options: Any) -> dict[str, Any]:
    cell = Cell(base or name, condition, seed, options, name)
    measured: dict[str, Any] = {"success": success, "commit": "abc1234", "command": cell.command(Setting("state"))}
    measured["by_task"] = json.dumps({"push-left": success - 0.1, "reach-left": success + 0.1})
    if name != "sft":
        measured |= {"ess": 0.8, "weight_at_end": 0.5, "corr_length": -0.2, "corr_loss": math.nan}
        measured["histogram"] = json.dumps([0] * 15 + [10, 40, 10] + [0] * 2)
        measured["auc_by_kind"] = json.dumps({})
    if name != "sft" and condition != "clean":
        measured |= {"auc_chunk": 0.6, "auc_episode": 0.7 + 0.01 * seed, "auc_chunk_25": 0.55, "auc_episode_25": 0.58}
        kinds = {"noise": 0.9, "truncation": 0.5} if condition == "combined" else {"zeroed": 0.7}
        measured["auc_by_kind"] = json.dumps(kinds)
        measured["auc_by_score"] = json.dumps({"posterior": 0.61, "negated loss": 0.83})
    return {"preset": name, "condition": condition, "seed": seed} | measured


def write(path: Path, *, keep: Callable[[str, str, int], bool] = lambda name, condition, seed: True) -> Path:
    for condition, presets in MEANS.items():
        for name, mean in presets.items():
            for seed, shift in SHIFT.items():
                if keep(name, condition, seed):
                    append(path, [row(name, condition, seed, mean + shift + WOBBLE[name][seed])], COLUMNS)
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write(tmp_path / "corruption_state.csv")


def cell(table: Any, name: str, column: str) -> str:
    (found,) = (line for line in table.rows if line[0] == name)
    return found[table.header.index(column)]


def test_differences_are_paired_and_their_interval_is_students(results: Path) -> None:
    runs = read_runs(results)
    ours, sft = runs.success("ptr_consequence", "combined"), runs.success("sft", "combined")
    found = paired(ours, sft)
    assert found is not None
    expected = stats.ttest_rel(list(ours.values()), list(sft.values())).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), (expected.low, expected.high), rtol=1e-9)
    assert found.mean == pytest.approx(0.15)
    # by hand: differences .01, 0, -.01, .02, -.02 around the mean have variance .0010 / 4; t(4) at 97.5 % is 2.776
    assert found.high - found.mean == pytest.approx(2.7764 * math.sqrt(0.0010 / 4 / 5), rel=1e-4)
    assert found.above_zero
    assert found.seeds == (0, 1, 2, 3, 4)


def test_pairs_are_the_seeds_that_both_have() -> None:
    found = paired({0: 0.5, 1: 0.9, 7: 0.2}, {1: 0.6, 7: 0.1, 9: 0.0})
    assert found is not None
    assert found.seeds == (1, 7)
    assert found.mean == pytest.approx(0.2)
    assert paired({0: 0.5}, {1: 0.5}) is None
    alone = estimate({3: 0.5})
    assert alone is not None
    assert alone.mean == 0.5
    assert math.isnan(alone.low)
    assert alone.undecided


def test_share_of_the_gap(results: Path) -> None:
    runs = read_runs(results)
    sft, oracle = runs.success("sft", "combined"), runs.success("oracle", "combined")
    found = gap_share(runs.success("ptr_consequence", "combined"), sft, oracle)
    assert found.share == pytest.approx(0.75)
    # Fieller's bounds are the shares r at which the paired t test of (method - SFT) - r (oracle - SFT) is just at 5 %
    gain = [runs.success("ptr_consequence", "combined")[seed] - sft[seed] for seed in SHIFT]
    gap = [oracle[seed] - sft[seed] for seed in SHIFT]
    for bound in (found.low, found.high):
        assert stats.ttest_1samp(np.array(gain) - bound * np.array(gap), 0.0).pvalue == pytest.approx(0.05, rel=1e-6)
    whole = gap_share(oracle, sft, oracle)
    assert (whole.share, whole.low, whole.high) == pytest.approx((1.0, 1.0, 1.0))
    assert gap_share(oracle, runs.success("sft", "zeroed"), runs.success("oracle", "zeroed")).reason == (
        "gap too small to tell"
    )
    assert gap_share({0: 0.5}, {0: 0.4}, {0: 0.6}).reason == "one seed"
    assert gap_share({}, sft, oracle).reason == "missing"


def test_tables_hold_the_numbers(results: Path) -> None:
    runs = read_runs(results)
    assert runs.track == "state"
    assert runs.conditions == ("clean", "combined", "zeroed")
    se = np.std(list(SHIFT.values()), ddof=1) / math.sqrt(5) * 100
    sft_success = np.mean([0.5 + shift for shift in SHIFT.values()]) * 100
    assert cell(success_table(runs), "sft", "combined") == f"{sft_success:.1f} ± {se:.1f}"
    differences = sft_differences(runs)
    assert cell(differences, "ptr_consequence", "combined") == "+15.0 (+13.0 to +17.0)"
    assert cell(differences, "ptr_consequence", "clean").startswith("-10.0 (")
    # the mean over combined and zeroed, seed by seed
    assert cell(differences, "ptr_consequence", "mean of the corrupted").startswith("+7.5 (")
    gaps = gap_table(runs)
    assert cell(gaps, "ptr_consequence", "combined").startswith("75% (")
    assert cell(gaps, "ptr_consequence", "zeroed") == "gap too small to tell"
    rare = rare_table(runs, "combined", ["push-left"])
    assert rare.rows[0][1].startswith(f"{sft_success - 10:.1f} ± ")
    assert rare.rows[2][2] == "+15.0 (+13.0 to +17.0)"


def test_paragraphs_say_what_is_solid(results: Path) -> None:
    runs = read_runs(results)
    combined = " ".join(verdict(runs, "combined"))
    assert "Against clean data it loses 30.0 (30.0 to 30.0) pp, within the 10 to 40 pp" in combined
    assert "above SFT: ptr_consequence +15.0 (+13.0 to +17.0) pp, small_loss" in combined
    assert "Not solid: ptr 0.0" in combined
    assert "ptr_consequence is not told apart from small_loss (+1.0" in combined
    zeroed = " ".join(verdict(runs, "zeroed"))
    assert "outside the 10 to 40 pp" in zeroed
    assert "below SFT: ptr -8.0" in zeroed
    assert "is not clearly above SFT: there is little or nothing to win back" in zeroed
    clean = " ".join(verdict(runs, "clean"))
    assert "A cost is certain for ptr_consequence." in clean
    assert "Whether the cost is above 1 pp is open for ptr, small_loss" in clean


@pytest.mark.full
def test_what_is_missing_is_said(tmp_path: Path) -> None:
    def keep(name: str, condition: str, seed: int) -> bool:
        gone = (name, condition) in (("oracle", "combined"), ("sft", "zeroed"), ("ptr", "clean"))
        return not gone and not (name == "ptr" and seed > 2)

    path = write(tmp_path / "corruption_pixels.csv", keep=keep)
    runs = read_runs(path)
    assert runs.missing()["ptr"] == {"clean": (0, 1, 2, 3, 4), "combined": (3, 4), "zeroed": (3, 4)}
    assert cell(success_table(runs), "ptr", "clean") == "missing"
    assert cell(success_table(runs), "ptr", "combined").endswith("[seeds 0–2]")
    assert cell(gap_table(runs), "ptr", "combined") == "missing"
    assert "SFT has not been run here" in verdict(runs, "zeroed")[0]
    assert "The oracle is missing" in " ".join(verdict(runs, "combined"))
    assert "Missing here: ptr." in " ".join(verdict(runs, "clean"))
    page = write_corruption_report([runs], tmp_path / "out", tmp_path / "out.md").read_text()
    assert "Not run: sft on zeroed; ptr on clean; oracle on combined." in page
    assert "ptr on combined (seeds 3, 4)" in page
    assert "From more than one commit" not in page
    assert "Missing: no ablation was run on this track." in page
    assert "Missing: no run measured it." in page  # corr_motion is in no row


def test_a_single_run_makes_a_page(tmp_path: Path) -> None:
    path = tmp_path / "corruption_state.csv"
    append(path, [{"preset": "ptr", "condition": "combined", "seed": 4, "success": 0.25}], COLUMNS)
    page = write_corruption_report([read_runs(path)], tmp_path, tmp_path / "page.md").read_text()
    assert "no run has weights that could be compared" in page
    assert "25.0" in page


def test_unusable_files_are_refused(tmp_path: Path, results: Path) -> None:
    with pytest.raises(FileNotFoundError, match="corruption/benchmark"):
        read_runs(tmp_path / "corruption_none.csv")
    append(results, [row("sft", "clean", 0, 0.5)], COLUMNS)
    with pytest.raises(ValueError, match="there twice"):
        read_runs(results)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns"):
        read_runs(other)
    other.write_text("preset,condition,seed,success\nsft,clean,0,high\n")
    with pytest.raises(ValueError, match="line 2"):
        read_runs(other)
    other.write_text("preset,condition,seed,success\n")
    with pytest.raises(ValueError, match="nothing to report"):
        write_corruption_report([read_runs(other)], tmp_path, tmp_path / "page.md")


def test_ablations_and_sweeps_stand_beside_their_preset(results: Path) -> None:
    for seed, shift in SHIFT.items():
        append(
            results, [row("ablation:no_controller", "combined", seed, 0.46 + shift, "ptr", controller=False)], COLUMNS
        )
        for value in (0.03, 0.2):
            name = f"sweep:temperature={value}"
            append(results, [row(name, "combined", seed, 0.4 + value + shift, "ptr", temperature=value)], COLUMNS)
        tried = {"aggregation": "segment"}
        append(results, [row("search:segment", "combined", seed, 0.62 + shift, "ptr_consequence", **tried)], COLUMNS)
        append(results, [row("ptr_no_belief", "combined", seed, 0.55 + shift, "ptr", num_belief_tokens=0)], COLUMNS)
        both = {"num_belief_tokens": 0, "frozen_encoder": True}
        append(results, [row("ablation:frozen_encoder", "combined", seed, 0.50 + shift, "ptr", **both)], COLUMNS)
        append(results, [row("my_map", "combined", seed, 0.6, "ptr_consequence", weight_map="calibrated")], COLUMNS)
    append(results, [row("sft_belief", "clean", 0, 0.7)], COLUMNS)
    runs = read_runs(results)
    assert variant_conditions(runs, "ablation:") == ("clean", "combined")
    assert variant_conditions(runs, "sweep:") == ("combined",)
    assert {line[0]: line[2] for line in ablation_table(runs, "clean").rows}["alpha_0 (sft_belief)"] == "ptr"
    assert runs.presets == (
        "sft",
        "ptr",
        "ptr_no_belief",
        "sft_belief",
        "ptr_consequence",
        "my_map",
        "small_loss",
        "oracle",
    )
    assert "ablation:no_controller" not in runs.presets
    assert describe(runs, "my_map") == ("ours", "ptr_consequence with weight_map=calibrated")
    table = {line[0]: line[1:] for line in ablation_table(runs, "combined").rows}
    assert table["no_controller"][1] == "ptr"
    assert table["no_controller"][2].startswith("-4.0 (")
    assert table["no_controller"][3:] == ("97.1 (-0.7)", "51.9 (-3.7)")
    # what the grid ran under another name, and an ablation of that
    assert table["no_belief (ptr_no_belief)"][2].startswith("+5.0 (")
    assert table["frozen_encoder"][1:3] == ("ptr_no_belief", "-5.0 (-5.0 to -5.0)")
    assert table["full: ptr"][3:] == ("97.8", "55.6")
    assert table["no_clipping"][:3] == ("missing", "", "missing")
    (tried,) = search_table(runs, "combined").rows
    assert tried[2].startswith("+12.0 (")
    assert tried[3] == "ptr_consequence"
    assert tried[4].startswith("-3.0 (")
    swept = sweep_points(runs, "combined")
    assert [(point.value, point.run) for point in swept] == [
        (0.03, "sweep:temperature=0.03"),
        (0.12, "ptr"),
        (0.2, "sweep:temperature=0.2"),
    ]
    assert sweep_table(runs, "combined").rows[0][2].startswith("-7.0 (")


def test_histograms_count_all_seeds(results: Path) -> None:
    runs = read_runs(results)
    share = runs.histogram("ptr", "clean")
    assert share is not None
    assert len(share) == len(BIN_EDGES) - 1
    np.testing.assert_allclose(share[15:18], (1 / 6, 2 / 3, 1 / 6))
    assert runs.histogram("sft", "clean") is None


@pytest.mark.full
def test_the_recipe_writes_page_figures_and_markdown(tmp_path: Path, results: Path) -> None:
    dynamics = tmp_path / "ptr_combined_0" / DYNAMICS_FILE
    log = DynamicsLog(dynamics)
    log.append(*[{"step": step, "temperature": 0.12 - 0.001 * step, "score": 1.5} for step in range(0, 60, 10)])
    out, text_file = tmp_path / "results", tmp_path / "docs" / "corruption.md"
    options = ["--results", str(results), str(tmp_path / "none.csv"), "--dynamics", str(dynamics)]
    main([*options, "--output_dir", str(out), "--markdown", str(text_file), "--notes", "Nothing was tuned <here>."])
    page, text = (out / PAGE_FILE).read_text(encoding="utf-8"), text_file.read_text(encoding="utf-8")
    for name in ("success", "difference", "auc", "weights"):
        assert (out / "figures" / f"corruption_state_{name}.png").is_file()
        assert f"(../results/figures/corruption_state_{name}.png)" in text
    assert page.count("data:image/png;base64,") == 5
    for content in (page, text):
        assert "+15.0 (+13.0 to +17.0)" in content
        assert "0.58 → 0.72 ± 0.01" in content  # episode AUC at a quarter and at the end
        assert severity(CONDITIONS["combined"]) in content
        assert "abc1234 (75)" in content
        assert "Nothing was tuned &lt;here&gt;." in content
        assert "0.12 → 0.07" in content  # τ
    assert "| ptr_consequence | -10.0" in text
    assert "http" not in page.replace("http-equiv", "")


def test_the_recipe_names_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"corruption/benchmark\.py first"):
        main(["--results", str(tmp_path / "none.csv")])


def test_rows_that_name_the_scripts_former_path_are_finished_runs() -> None:
    path = Path(__file__).parents[2] / "results" / "corruption_state.csv"
    former = [run for run in read_runs(path).items if "recipes/benchmark_corruption.py" in run.command]
    assert {(run.preset, run.condition, run.seed) for run in former} == finished(read(path))
    assert {run.base for run in former} <= set(PRESETS)
    (clipped,) = {str(run.options) for run in former if run.preset == "ablation:no_clipping"}
    assert "'weight_max': 1000000.0" in clipped


def test_severity_in_words() -> None:
    assert severity(CONDITIONS["delay"]) == "30 %: actions written down 8 steps late; delay: steps 8"


@pytest.mark.parametrize(
    ("seeds", "words"), [((0, 1, 2, 3), "seeds 0–3"), ((0, 2), "seeds 0, 2"), ((3,), "seed 3"), ((), "no seed")]
)
def test_seeds_in_words(seeds: tuple[int, ...], words: str) -> None:
    assert spell(seeds) == words
