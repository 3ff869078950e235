"""The page of a run with answers to each row: its numbers, its warnings, many classes, hostile names, several runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert

from kdcache.errors import DamageError, RecipeError
from kdcache.report.comparison import comparison, load_runs, same_but_seed, write_comparison
from kdcache.report.html import Page, Side, Table
from kdcache.report.loaded import load_baseline, load_run
from kdcache.report.metrics import calibration_error
from kdcache.report.page import page, write_page
from kdcache.report.predictions import Answers, read_predictions, write_predictions
from kdcache.report.rows import agreement, by_class, calibration, counted, disagreements, most_confused
from kdcache.runs import RunDirectory, mark_finished
from tests.report.made_runs import make_run


def specs(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    found: list[dict[str, Any]] = json.loads(text.split('id="charts">')[1].split("</script>")[0])
    return found


def contents(run: RunDirectory) -> Page:
    return page(load_run(run), load_baseline(run))


def tables(shown: Page, section: str) -> list[Table]:
    blocks = next(each for each in shown.sections if each.id == section).blocks
    return [block for block in blocks if isinstance(block, Table)]


def warnings(run: RunDirectory) -> str:
    return "\n".join(caution.text for caution in contents(run).warnings)


def test_numbers_on_the_page_are_those_of_the_results_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=3)
    make_run(run.baseline.root, classes=3, method="fine-tune", seed=5)
    results = json.loads(run.results.read_text())
    (table,) = tables(contents(run), "scores")
    by_model = {str(row[0]): [cell["text"] for cell in row[1:4] if isinstance(cell, dict)] for row in table.rows}

    def expected(scores: dict[str, Any]) -> list[str]:
        return [f"{scores['test'][metric]:.4f}" for metric in ("accuracy", "macro_f1", "matthews")]

    assert by_model["student, mt-bert"] == expected(results["scores"])
    assert by_model["teacher bert"] == expected(results["teachers"]["bert"]["scores"])
    assert by_model["mean of teachers"] == expected(results["teachers_mean"]["scores"])
    assert by_model["student without teachers"] == expected(json.loads(run.baseline.results.read_text())["scores"])
    points = specs(write_page(run))[0]["data"]["values"]
    assert {point["model"] for point in points} == by_model.keys()
    assert all(point["low"] <= point["value"] <= point["high"] for point in points)
    assert points[-1]["value"] == pytest.approx(results["scores"]["test"]["accuracy"], abs=1e-6)


@pytest.mark.parametrize("classes", [2, 14, 1500])
def test_every_chart_is_valid_and_many_classes_stay_small(tmp_path: Path, classes: int) -> None:
    run = make_run(tmp_path / "run", classes=classes, rows=200)
    written = write_page(run)
    assert written.stat().st_size < 2_000_000
    drawn = specs(written)
    assert len(drawn) >= 5
    for spec in drawn:
        assert vl_convert.vegalite_to_vega(spec)["marks"]
    (per_class,) = tables(contents(run), "errors")[-1:]
    assert len(per_class.rows) <= 40


def test_hostile_names_and_texts_stay_text(tmp_path: Path) -> None:
    names = ["</script><script>alert(1)</script>", 'it\'s "quoted" & <b>']
    run = make_run(tmp_path / "run", names=names)
    text = write_page(run).read_text()
    assert "<script>alert" not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text
    assert "it&#39;s &#34;quoted&#34; &amp; &lt;b&gt;" in text
    assert names[0] in str(specs(run.report))  # and whole again where the charts read it
    assert len(re.findall("<script", text)) == 3


def test_warnings_come_for_one_class_idle_terms_coverage_and_lacking_classes(tmp_path: Path) -> None:
    found = warnings(make_run(tmp_path / "run", classes=4, known=3, answer=1))
    assert "The student answers 'class 1' to all 60 rows of validation." in found
    assert "The loss term 'hidden' has hardly an effect" in found
    assert "Only 82.0% of the student's tokens have a hidden target of teacher mpnet." in found
    assert "Validation has no row of 1 of 4 classes: 'class 3'." in found


def test_a_teacher_below_the_student_alone_is_a_warning_and_answers_of_another_training_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    alone = make_run(run.baseline.root, method="fine-tune")
    document = json.loads(alone.results.read_text())
    document["scores"]["validation"]["accuracy"] = document["scores"]["test"]["accuracy"] = 0.99
    alone.results.write_text(json.dumps(document))
    found = warnings(run)
    assert "Teacher bert has a lower validation accuracy" in found
    assert "The kept answers of the student without teachers do not give its score" in found


def test_answers_of_a_student_that_diverged_have_a_page(tmp_path: Path) -> None:
    """Kdcache 0.2 saved a student whose last step made its logits NaN."""
    run = make_run(tmp_path / "run", classes=3)
    splits = {
        name: replace(split, logits=np.full_like(split.logits, np.nan))
        for name, split in read_predictions(run.predictions).items()
    }
    write_predictions(run.predictions, splits)
    assert splits["test"].student.predictions.tolist() == [0] * 120
    assert calibration(splits["test"].labels, splits["test"].student) is None
    assert write_page(run).exists()


def test_several_runs_are_compared_and_seeds_are_grouped(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"kd-{seed}", seed=seed, method="kd") for seed in (0, 1)]
    runs.append(make_run(tmp_path / "mt-bert", seed=0))
    loaded = load_runs(runs)
    assert same_but_seed(loaded) == [["kd-0", "kd-1"], ["mt-bert"]]
    shown = comparison(loaded)
    (seeds,) = tables(shown, "seeds")
    accuracies = [loaded[name].results["scores"]["test"]["accuracy"] for name in ("kd-0", "kd-1")]
    assert seeds.rows[0][:4] == [
        "kd-0, kd-1",
        "0, 1",
        f"{np.mean(accuracies):.4f}",
        f"{np.std(accuracies, ddof=1):.4f}",
    ]
    written = write_comparison(runs, tmp_path / "comparison.html")
    assert written.stat().st_size < 2_000_000
    for spec in specs(written):
        assert vl_convert.vegalite_to_vega(spec)["marks"]


def recorded(run: RunDirectory, **changes: str) -> RunDirectory:
    """The run, with a record of its student like that of ``kdcache distill``."""
    data = {"data.train": f"sha256:{'0' * 64}", "data.transfer_rows": "180", "student.layers": "3"}
    mark_finished(run, "student", data | {key.replace("__", "."): value for key, value in changes.items()}, 1.0)
    return run


def test_runs_on_other_data_or_of_other_blocks_are_no_seeds_of_one_another(tmp_path: Path) -> None:
    first = recorded(make_run(tmp_path / "first"))
    seed = recorded(make_run(tmp_path / "seed", seed=1), student__layers="[1, 2, 3]")  # the first three: no difference
    blocks = recorded(make_run(tmp_path / "blocks", seed=2), student__layers="[1, 3, 5]")
    file = recorded(make_run(tmp_path / "file", seed=3), data__train=f"sha256:{'1' * 64}")
    rows = recorded(make_run(tmp_path / "rows", seed=4))
    document = json.loads(rows.results.read_text())
    document["rows"]["transfer"] = 20
    rows.results.write_text(json.dumps(document))
    loaded = load_runs([first, seed, blocks, file, rows])
    assert same_but_seed(loaded) == [["first", "seed"], ["blocks"], ["file"], ["rows"]]
    (differing,) = tables(comparison(loaded), "settings")
    assert {row[0]: row[1:] for row in differing.rows} == {
        "distill.seed": ["0", "1", "2", "3", "4"],
        "student.layers": ["3", "3", "[1, 3, 5]", "3", "3"],
        "rows of transfer": ["", "", "", "", "20"],
        "data.train": [f"sha256:{digit * 12}" for digit in "00010"],
    }


def test_baselines_are_grouped_by_what_the_run_they_belong_to_records(tmp_path: Path) -> None:
    runs = [RunDirectory(tmp_path / name) for name in ("a", "b", "c")]
    for seed, (run, train) in enumerate(zip(runs, "001", strict=True)):
        make_run(run.baseline.root, seed=seed, method="fine-tune")
        mark_finished(run, "baseline", {"data.train": train}, 1.0)
    loaded = load_runs([run.baseline for run in runs])
    a, b, c = loaded
    assert same_but_seed(loaded) == [[a, b], [c]]


def test_two_runs_of_one_seed_are_both_in_the_table_of_seeds(tmp_path: Path) -> None:
    names = {"a-0": 0, "a-1": 1, "b-0": 0}
    loaded = load_runs([make_run(tmp_path / name, seed=seed, answer=seed) for name, seed in names.items()])
    (seeds,) = tables(comparison(loaded), "seeds")
    assert [row[:2] for row in seeds.rows] == [["a-0, a-1", "0, 1"], ["b-0", "0"]]


def test_answers_to_other_texts_are_not_compared_row_by_row(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", seed=1)
    shown = comparison(load_runs([first, second]))
    assert len(tables(shown, "agreement")[0].rows) == 2
    assert "against first" in [row[0] for row in differences(shown)]
    splits = read_predictions(second.predictions)  # the same labels, of other texts
    write_predictions(
        second.predictions, {name: replace(rows, text_ids=rows.text_ids[::-1]) for name, rows in splits.items()}
    )
    shown = comparison(load_runs([first, second]))
    assert len(tables(shown, "agreement")[0].rows) == 1
    assert differences(shown) == []


def differences(shown: Page) -> list[Any]:
    """Rows of the table of differences from the last run."""
    blocks = next(each for each in shown.sections if each.id == "scores").blocks
    inner = [part for block in blocks if isinstance(block, Side) for part in block.blocks if isinstance(part, Table)]
    return [row for table in inner for row in table.rows]


def test_runs_of_other_classes_are_not_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "two"), make_run(tmp_path / "three", classes=3)]
    with pytest.raises(RecipeError, match="has other classes"):
        load_runs(runs)


def test_answers_are_read_as_they_were_written_and_damage_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found = read_predictions(run.predictions)["test"]
    assert found.student.predictions.tolist() == found.logits.argmax(axis=1).tolist()
    assert list(found.teachers) == ["bert", "mpnet", "mean of teachers"]
    probabilities = np.exp(found.logits) / np.exp(found.logits).sum(axis=1, keepdims=True)
    assert found.student.confidence == pytest.approx(probabilities.max(axis=1), abs=1e-6)
    again = tmp_path / "again.safetensors"
    write_predictions(again, read_predictions(run.predictions))
    assert again.read_bytes() == run.predictions.read_bytes()
    run.predictions.write_bytes(run.predictions.read_bytes()[:-8])
    with pytest.raises(DamageError, match=r"predictions\.safetensors"):
        load_run(run)


def test_counts_of_errors_and_agreement_against_plain_loops() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 3, 80)
    models = {name: Answers(rng.integers(0, 3, 80), rng.random(80).astype(np.float32)) for name in ("a", "b", "c")}
    student, teachers = models["a"], [models["b"], models["c"]]
    counts = counted(labels, student.predictions, 4)
    for label in range(4):
        for answer in range(4):
            pairs = zip(labels, student.predictions, strict=True)
            assert counts[label, answer] == sum((one, two) == (label, answer) for one, two in pairs)
    assert by_class(counts)[3] == (3, 0, 0, None, None, None)
    assert by_class(counts)[1].recall == counts[1, 1] / counts[1].sum()
    worst = most_confused(counts, 1)[0]
    assert worst.rows == max(counts[one, two] for one in range(4) for two in range(4) if one != two)
    found = disagreements(labels, student, teachers, most=3)
    wrong = [
        row
        for row, label in enumerate(labels)
        if label >= 0 and student.predictions[row] != label and all(each.predictions[row] == label for each in teachers)
    ]
    assert found["student wrong"][0] == len(wrong)
    assert found["student wrong"][1] == sorted(wrong, key=lambda row: -student.confidence[row])[:3]
    same = sum(one == two for one, two in zip(models["a"].predictions, models["b"].predictions, strict=True))
    assert agreement(models)["a", "b"] == same / 80
    measured = calibration(labels, student)
    assert measured is not None
    known = labels >= 0
    spread = np.full((int(known.sum()), 3), -1.0)
    spread[np.arange(len(spread)), student.predictions[known]] = student.confidence[known]
    assert measured.error == pytest.approx(calibration_error(labels[known], spread))
    assert sum(each.rows for each in measured.bins) == known.sum()
