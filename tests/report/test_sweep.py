"""The table of a sweep: means, paired differences with intervals, the choice on validation, the page."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.report.intervals import paired_difference, spread, t_quantile, t_within
from kdcache.report.sweep import CellResults, sweep_document, sweep_lines, sweep_table
from kdcache.report.sweep_page import sweep_page


def result(validation: float, test: float, method: str = "kd", teacher: float = 0.9) -> dict[str, Any]:
    scores = {"validation": {"accuracy": validation, "loss": -validation}, "test": {"accuracy": test, "loss": -test}}
    own = {"validation": {"accuracy": teacher, "loss": 1.0}, "test": {"accuracy": teacher - 0.01, "loss": 1.0}}
    return {"scores": scores, "method": method, "teachers": {"mpnet": {"scores": own}}}


def cell(name: str, scores: dict[int, tuple[float, float]], method: str = "kd", **settings: Any) -> CellResults:
    return CellResults(name, settings, {seed: result(*pair, method=method) for seed, pair in scores.items()})


ALONE = cell("alone", {0: (0.80, 0.70), 1: (0.82, 0.71)}, "fine-tune", hidden=None)
BETTER = cell("better", {0: (0.85, 0.76), 1: (0.87, 0.75)}, hidden=0.1)
LUCKY_ON_TEST = cell("lucky", {0: (0.84, 0.99), 1: (0.86, 0.99)}, hidden=1.0)


def document(*cells: CellResults, metric: str = "accuracy", **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"seeds": [0, 1], "baseline": cells[0].name, "cost": {}} | changes
    return sweep_document("made-up", cells, metric=metric, **values)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (29, 2.045)]
)
def test_quantiles_are_those_of_the_printed_tables(freedom: int, expected: float) -> None:
    assert round(t_quantile(0.95, freedom), 3) == expected


@pytest.mark.parametrize("freedom", [1, 2, 3, 6, 11])
def test_the_distribution_is_the_integral_of_its_density(freedom: int) -> None:
    def density(t: float) -> float:
        factor = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        return factor * (1 + t * t / freedom) ** (-(freedom + 1) / 2)

    for t in (0.3, 1.7, 4.0):
        steps = 4000
        whole = sum(density(-t + (number + 0.5) * 2 * t / steps) for number in range(steps)) * 2 * t / steps
        assert t_within(t, freedom) == pytest.approx(whole, abs=1e-6)


SCORES = st.dictionaries(st.integers(0, 9), st.floats(0, 1), min_size=1, max_size=6)


@given(SCORES, SCORES)
def test_differences_are_paired_by_seed(ours: dict[int, float], theirs: dict[int, float]) -> None:
    found = paired_difference(ours, theirs)
    common = [seed for seed in range(10) if seed in ours and seed in theirs]
    if not common:
        assert found is None
        return
    pairs = [ours[seed] - theirs[seed] for seed in common]
    assert found is not None
    assert found.seeds == len(common)
    assert found.mean == pytest.approx(sum(pairs) / len(pairs))
    if len(common) == 1:
        assert (found.low, found.high) == (None, None)
        return
    assert found.low is not None
    assert found.high is not None
    half = t_quantile(0.95, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    assert (found.low, found.high) == (pytest.approx(found.mean - half), pytest.approx(found.mean + half))


def test_a_single_value_has_no_spread() -> None:
    assert spread([0.5]) is None
    assert spread([0.5, 0.7]) == pytest.approx(statistics.stdev([0.5, 0.7]))


def test_the_choice_is_made_on_validation_and_test_is_shown_for_it_and_the_baseline_alone() -> None:
    made = document(ALONE, BETTER, LUCKY_ON_TEST)
    assert (made["chosen"], made["baseline"]) == ("better", "alone")
    assert set(made["test"]) == {"better", "alone"}
    assert made["test"]["better"]["mean"] == pytest.approx(0.755)
    everything = [*itertools.chain(*sweep_table(made)[1]), *sweep_lines(made), sweep_page(made), str(made)]
    assert not [shown for shown in everything if "0.99" in str(shown)]


def test_a_smaller_loss_is_the_better_one() -> None:
    assert document(ALONE, BETTER, metric="loss")["chosen"] == "better"


def test_a_cell_that_lacks_a_seed_is_not_chosen() -> None:
    half = cell("half", {0: (0.99, 0.99)}, hidden=0.3)
    made = document(ALONE, BETTER, half)
    assert made["chosen"] == "better"
    assert made["cells"][2]["seeds"] == 1
    assert made["cells"][2]["difference"] == {"mean": pytest.approx(0.19), "low": None, "high": None, "seeds": 1}


def test_the_gap_is_measured_from_the_student_alone_to_the_best_teacher() -> None:
    made = document(ALONE, BETTER)
    assert made["best_teacher"] == {"name": "mpnet", "validation": 0.9, "test": pytest.approx(0.89)}
    assert made["cells"][1]["gap_closed"] == pytest.approx((0.86 - 0.81) / (0.9 - 0.81))
    assert made["test"]["better"]["gap_closed"] == pytest.approx((0.755 - 0.705) / (0.89 - 0.705))
    assert made["cells"][0]["gap_closed"] == 0
    assert document(BETTER, LUCKY_ON_TEST)["cells"][1]["gap_closed"] is None  # the baseline is not the student alone


def test_a_teacher_that_is_not_better_than_the_student_alone_leaves_no_gap() -> None:
    alone = CellResults("alone", {}, {seed: result(0.85, 0.85, "fine-tune", teacher=0.8) for seed in (0, 1)})
    worse = CellResults("worse", {}, {seed: result(0.82, 0.82, teacher=0.8) for seed in (0, 1)})
    made = document(alone, worse)
    assert [cell["gap_closed"] for cell in made["cells"]] == [None, None]
    assert made["test"]["alone"]["gap_closed"] is None
    assert "gap closed" not in sweep_table(made)[0]
    assert "of the gap" not in " ".join(sweep_lines(made))


def test_a_gap_of_losses_is_closed_downwards_and_no_share_is_minus_zero() -> None:
    alone, half, more = (
        CellResults(name, {}, {0: {"method": method, "scores": {"validation": {"loss": loss}}}})
        for name, method, loss in (("alone", "fine-tune", 0.5), ("half", "kd", 0.4), ("more", "kd", 0.5001))
    )
    half.results[0]["teachers"] = {"bert": {"scores": {"validation": {"loss": 0.3}}}}
    made = document(alone, half, more, metric="loss", seeds=[0])
    assert [row[-1] for row in sweep_table(made)[1]] == ["0.00", "0.50", "0.00"]
    half.results[0]["teachers"]["bert"]["scores"]["validation"]["loss"] = 0.6
    assert document(alone, half, metric="loss", seeds=[0])["cells"][1]["gap_closed"] is None


def test_an_interval_of_one_seed_is_not_named() -> None:
    text = " ".join(sweep_lines(document(cell("a", {0: (0.8, 0.7)}), cell("b", {0: (0.9, 0.8)}), seeds=[0])))
    assert "difference +0.1000." in text
    assert "()" not in text
    assert "difference +0.0500 (-" in " ".join(sweep_lines(document(ALONE, BETTER)))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("first", [True, False])
def test_a_student_whose_loss_is_not_finite_is_missing(metric: str, first: bool) -> None:
    """A student of kdcache 0.2 that diverged in its last step has an accuracy, that of class 0, and a loss of NaN."""
    broken = cell("broken", {0: (0.9, 0.9), 1: (0.91, 0.9)}, hidden=7)
    for scores in broken.results[1]["scores"].values():
        scores["loss"] = math.nan
    made = document(*([broken, ALONE, BETTER] if first else [ALONE, BETTER, broken]), metric=metric)
    found = {each["cell"]: each for each in made["cells"]}["broken"]
    assert list(found["scores"]) == ["0"]
    assert found["seeds"] == 1
    assert made["chosen"] == "better"
    assert any("broken, seed 1: loss on validation is not finite" in line for line in made["warnings"])
    assert json.dumps([made, specs_of(sweep_page(made))], allow_nan=False)


def test_a_validation_split_without_labels_has_no_scores() -> None:
    cells = [cell(name, {0: (math.nan, 0.7), 1: (math.nan, 0.7)}) for name in ("a", "b")]
    for result_of in (cells[0].results[0], cells[1].results[0]):
        result_of["teachers"]["mpnet"]["scores"]["validation"]["accuracy"] = math.nan
    made = document(*cells)
    assert (made["chosen"], [each["mean"] for each in made["cells"]]) == (None, [None, None])
    assert made["best_teacher"]["validation"] == 0.9  # of the students whose teachers have a score


def test_failures_are_named_and_empty_cells_have_no_score() -> None:
    broken = CellResults("broken", {"hidden": 7}, {}, {0: "no such layer", 1: "no such layer"})
    made = document(ALONE, broken)
    assert made["cells"][1]["mean"] is None
    assert made["cells"][1]["failed"] == {"0": "no such layer", "1": "no such layer"}
    assert "Failed: broken, seed 0: no such layer" in sweep_lines(made)
    nothing = document(broken)
    assert (nothing["chosen"], nothing["test"], nothing["best_teacher"]) == (None, {}, None)
    assert sweep_table(nothing)[1]
    assert "<h1>" in sweep_page(nothing)


def test_columns_are_the_keys_that_vary() -> None:
    cells = [
        cell("a", {0: (0.8, 0.7)}, **{"distill.method": "kd", "distill.epochs": 3}),
        cell("b", {0: (0.9, 0.7)}, **{"distill.method": "mt-bert", "distill.epochs": 3}),
    ]
    columns, rows = sweep_table(document(*cells, seeds=[0]))
    assert columns == ["cell", "method", "seeds", "mean", "spread", "difference", "95%"]
    assert rows[1] == ["b*", "mt-bert", 1, "0.9000", "", "+0.1000", ""]


def test_the_page_holds_the_table_and_a_plot_for_each_key_and_nothing_from_outside() -> None:
    cells = [
        cell(f"c{number}", {0: (score, 0.7), 1: (score, 0.7)}, **{"distill.weights.hidden": hidden, "student.x": name})
        for number, (score, hidden, name) in enumerate([(0.8, 0.001, "<a>"), (0.9, 1.0, "<a>"), (0.85, 0.1, "b&c")])
    ]
    page = sweep_page(document(*cells))
    assert "&lt;a&gt;" in page
    assert "<a>" not in page
    specs = json.loads(page.split('id="charts">')[1].split("</script>")[0])
    by_key = {spec["layer"][-1]["encoding"]["x"]["title"]: spec for spec in specs}
    assert {"distill.weights.hidden", "student.x"} <= by_key.keys()
    hidden = by_key["distill.weights.hidden"]
    assert hidden["layer"][-1]["encoding"]["x"]["scale"]["type"] == "log"
    assert [(row["at"], row["value"]) for row in hidden["data"]["values"]] == [(0.001, 0.8), (1.0, 0.9), (0.1, 0.85)]


def specs_of(page: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(page.split('id="charts">')[1].split("</script>")[0])
    return found


def test_charts_of_settings_show_cells_that_lack_the_key_and_leave_out_single_values() -> None:
    keys = ("distill.method", "distill.teachers", "distill.epochs", "data.transfer")
    settings = [
        ("fine-tune", None, 10, []),
        ("kd", None, 4, ["/far/rest.tsv"]),
        ("kd", ["mpnet"], 4, ["/far/rest.tsv"]),
    ]
    cells = [
        cell(f"c{number}", {0: (0.8 + number / 100, 0.7)}, **dict(zip(keys, each, strict=True)))
        for number, each in enumerate(settings)
    ]
    made = document(*cells, seeds=[0])
    specs = {spec["layer"][-1]["encoding"]["x"]["title"]: spec for spec in specs_of(sweep_page(made))}
    assert [row["at"] for row in specs["distill.teachers"]["data"]["values"]] == ["not set", "not set", "[mpnet]"]
    assert [row["at"] for row in specs["data.transfer"]["data"]["values"]] == ["[]", "[rest.tsv]", "[rest.tsv]"]
    epochs = specs["distill.epochs"]["layer"][-1]["encoding"]["x"]["axis"]
    assert (epochs["values"], epochs["format"]) == ([4, 10], ".6~g")  # "~g" writes 1e+1 where there are two ticks
    # points stand beside each other only where several groups share a value
    assert "xOffset" not in specs["data.transfer"]["layer"][-1]["encoding"]
    assert "xOffset" in specs["distill.teachers"]["layer"][-1]["encoding"]
    assert "(distill.method = kd, distill.teachers = [mpnet]," in " ".join(sweep_lines(made))
    once = [cell("a", {0: (0.8, 0.7)}, weight=None), cell("b", {0: (0.9, 0.7)}, weight=0.5)]
    assert "weight" not in {
        spec["layer"][-1]["encoding"]["x"]["title"] for spec in specs_of(sweep_page(document(*once, seeds=[0])))
    }


def test_an_interval_stands_below_its_difference() -> None:
    columns, rows = sweep_table(document(ALONE, BETTER))
    page = sweep_page(document(ALONE, BETTER))
    at = columns.index("95%")
    assert f"<td>{rows[1][at - 1]} <small>{rows[1][at]}</small></td>" in page
    assert "<th>95%</th>" not in page


def test_warnings_of_a_sweep_name_teachers_below_the_student_alone_and_students_that_learned_nothing() -> None:
    idle = CellResults("idle", {}, {0: result(0.5, 0.5) | {"rows": {"test": 500}}})
    idle.results[0]["scores"]["test"]["matthews"] = 0.0
    weak = CellResults("weak", {}, {0: result(0.85, 0.8, teacher=0.7)})
    warnings = document(ALONE, idle, weak)["warnings"]
    assert any(line.startswith("idle, seed 0: The student, kd learned nothing") for line in warnings)
    assert any("Teacher mpnet has a lower validation accuracy (0.700)" in line for line in warnings)
    assert "learned nothing" in sweep_page(document(ALONE, idle, weak))
