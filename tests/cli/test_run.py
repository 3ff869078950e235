"""The whole pipeline through the command line, on tiny models: made, skipped, refused, damaged, repaired."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kdcache.cache.reader import open_cache
from kdcache.report.metrics import accuracy
from kdcache.report.predictions import read_predictions
from kdcache.runs import RunDirectory
from tests.cli.commands import kdcache
from tests.cli.conftest import FinishedRun


def test_a_run_leaves_all_that_the_design_names(finished: FinishedRun) -> None:
    run = RunDirectory(finished.root)
    for made in (
        run.recipe_file,
        run.record,
        run.metrics,
        run.results,
        run.report,
        run.cache / "manifest.json",
        run.baseline.results,
    ):
        assert made.is_file(), made
    for made in (run.teachers / "bert", run.student):
        assert (made / "config.json").is_file(), made
    assert (run.teachers / "shared_head.safetensors").is_file()
    assert kdcache("pipelines", "validate", run.recipe_file).code == 0


def test_a_run_prints_the_table_and_the_verdict_on_stdout(finished: FinishedRun) -> None:
    lines = finished.said.out.splitlines()
    assert lines[0].split()[:3] == ["model", "parameters", "ms/text"]
    models = [line.split("  ")[0] for line in lines[2:7]]
    assert models == ["teacher bert", "teacher roberta", "teacher xlm", "student without teachers", "student, mt-bert"]
    assert "student without teachers" in lines[-1]
    for stage in ("teachers: co-finetuning", "cache: each teacher", "baseline: the student", "student: the student"):
        assert stage in finished.said.err
    assert "model shards" not in finished.said.err  # progress bars of libraries stay out


def test_the_baseline_is_the_same_student_without_teachers(finished: FinishedRun) -> None:
    ours, alone = (
        json.loads(path.read_text())
        for path in (finished.root / "results.json", finished.root / "baseline" / "results.json")
    )
    assert (ours["method"], alone["method"]) == ("mt-bert", "fine-tune")
    assert alone["teachers"] == {}
    for key in ("parameters", "layers", "width", "init_from"):
        assert ours["student"][key] == alone["student"][key]
    assert ours["seed"] == alone["seed"]


def test_the_same_command_again_skips_everything(finished: FinishedRun) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.root.rglob("*") if path.name != "report.html"}
    again = finished.call("run")
    assert again.code == 0
    assert again.out == finished.said.out
    assert again.err.count("finished already, skipped") == 4
    assert {path: path.stat().st_mtime_ns for path in finished.root.rglob("*") if path.name != "report.html"} == before


def test_json_is_one_document(finished: FinishedRun) -> None:
    document = finished.call("run", "--json").document
    assert document["results"]["scores"]["test"].keys() >= {"accuracy", "macro_f1", "matthews"}
    assert document["baseline"]["method"] == "fine-tune"


def test_changed_teacher_settings_are_refused(finished: FinishedRun) -> None:
    said = finished.call("run", "--set", "cofinetune.epochs=2")
    assert said.code == 4
    assert "cofinetune.epochs" in said.err


def test_changed_dump_settings_are_refused(finished: FinishedRun) -> None:
    said = finished.call("run", "--set", "dump.dtype=float16")
    assert said.code == 4
    assert "int8" in said.err
    assert "float16" in said.err


def test_a_student_made_with_other_settings_is_kept(finished: FinishedRun) -> None:
    recipe = (finished.root / "recipe.toml").read_bytes()
    said = finished.call("distill", "--set", "distill.temperature=2.0")
    assert said.code == 4
    assert "distill.temperature: 1.0 -> 2.0" in said.err
    assert "--replace" in said.err
    assert (finished.root / "recipe.toml").read_bytes() == recipe


def test_replace_makes_the_student_anew_and_leaves_the_rest(copied: FinishedRun) -> None:
    said = copied.call("run", "--replace", "--set", "distill.temperature=2.0", "--set", "distill.method=kd", "--json")
    assert said.code == 0, said.err
    assert said.document["results"]["method"] == "kd"
    assert (
        said.err.count("finished already, skipped") == 3
    )  # teachers, cache, baseline: none depends on the temperature


def test_the_baseline_is_made_again_where_the_teachers_that_it_starts_from_were(copied: FinishedRun) -> None:
    for made in ("teachers", "cache"):
        shutil.rmtree(copied.root / made)
    others = ("--set", "cofinetune.epochs=2")
    refused = copied.call("run", *others)
    assert refused.code == 4
    assert "baseline' holds a student made with other settings: teachers/bert: contents differ" in refused.err
    assert copied.call("distill", *others, "--replace").code == 0
    assert "(teachers/bert)" in said_of_both(copied)
    record = (copied.root / "run.json").read_text()
    said = copied.call("run", *others, "--replace")
    assert said.code == 0, said.err
    assert said.err.count("finished already, skipped") == 3
    assert "baseline: the student without teachers" in said.err
    assert "(teachers/bert)" not in said_of_both(copied)

    document = json.loads(record)  # a record of 0.1.0: nobody knows which teachers the baseline started from
    del document["stages"]["baseline"]["inputs"]["teachers/bert"]
    (copied.root / "run.json").write_text(json.dumps(document))
    assert copied.call("run", *others).err.count("finished already, skipped") == 4


def said_of_both(finished: FinishedRun) -> str:
    """The last line of the report: the verdict, or why there is none."""
    return kdcache("report", finished.root).out.splitlines()[-1]


def test_no_verdict_where_the_student_alone_was_made_again_with_other_layers(copied: FinishedRun) -> None:
    said = copied.call("distill", "--replace", "--set", "student.layers=1")
    line = "The student without teachers was made with other settings (student.layers)"
    assert line in said.out
    assert said_of_both(copied).startswith(line)
    assert line in (copied.root / "report.html").read_text()


@pytest.mark.parametrize("place", ["student", "baseline/student"])
def test_a_student_that_was_deleted_is_trained_again(copied: FinishedRun, place: str) -> None:
    shutil.rmtree(copied.root / place)
    said = copied.call("run")
    assert said.code == 0, said.err
    assert said.err.count("finished already, skipped") == 3
    assert (copied.root / place / "model.safetensors").is_file()


def test_replace_where_there_is_nothing_to_replace(copied: FinishedRun) -> None:
    arguments = ("--cache", copied.root / "cache", "--set", "name=fresh", "--replace", "--json")
    said = copied.call("distill", *arguments)
    assert said.code == 0, said.err
    assert (copied.runs / "fresh" / "student" / "model.safetensors").is_file()
    assert copied.call("distill", *arguments, "--set", "distill.seed=3").document["seed"] == 3  # and now there is


def test_a_second_student_from_the_same_cache_has_a_run_of_its_own(copied: FinishedRun) -> None:
    said = copied.call(
        "distill", "--cache", copied.root / "cache", "--set", "name=second", "--set", "distill.seed=1", "--json"
    )
    assert said.code == 0, said.err
    assert said.document["seed"] == 1
    assert (copied.runs / "second" / "student" / "model.safetensors").is_file()
    again = copied.call(
        "distill", "--cache", copied.root / "cache", "--set", "name=second", "--set", "distill.seed=1", "--json"
    )
    assert again.document == said.document
    assert "skipped" in again.err


def test_evaluate_finds_what_results_say(finished: FinishedRun) -> None:
    results = json.loads((finished.root / "results.json").read_text())
    data = finished.recipe.parent / "test.tsv"
    found = kdcache("evaluate", finished.root / "student", "--data", data, "--json").document
    assert found.pop("rows") == 32
    assert found == pytest.approx(results["scores"]["test"], rel=1e-6)
    assert "accuracy" in kdcache("evaluate", finished.root / "student", "--data", data).out


def test_cache_info_and_verify(finished: FinishedRun) -> None:
    info = kdcache("cache", "info", finished.root / "cache", "--json").document
    assert info["texts"] == 184
    assert info["identity"] == open_cache(finished.root / "cache").identity
    shown = kdcache("cache", "info", finished.root / "cache")
    assert info["identity"] in shown.out
    assert "layer 4: pca 8 int8" in shown.out
    verified = kdcache("cache", "verify", finished.root / "cache", "--json")
    assert (verified.code, verified.document["damaged"], verified.document["unreferenced"]) == (0, [], [])


def test_damage_is_found_refused_and_repaired(copied: FinishedRun) -> None:
    cache = copied.root / "cache"
    identity = open_cache(cache).identity
    file = sorted((cache / "teachers" / "roberta" / "outputs").glob("*.arrow"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    name = file.relative_to(cache).as_posix()

    verified = kdcache("cache", "verify", cache)
    assert verified.code == 3
    assert name in verified.out
    assert "--repair" in verified.err
    distilled = copied.call("distill", "--replace", "--set", "distill.seed=5")
    assert distilled.code == 3
    assert name in distilled.err

    repaired = copied.call("dump-teachers", "--repair", "--json")
    assert repaired.code == 0, repaired.err
    assert repaired.document["identity"] == identity
    assert list(repaired.document["teachers"]) == ["roberta"]
    assert kdcache("cache", "verify", cache).code == 0


def test_a_dry_run_writes_nothing(finished: FinishedRun, tmp_path: Path) -> None:
    cache = tmp_path / "new-cache"
    arguments = ("--dry-run", "--cache", cache, "--teachers", finished.root / "teachers")
    said = finished.call("dump-teachers", *arguments, "--json")
    assert said.code == 0, said.err
    assert said.document["texts"] == {"full": 120, "logits_only": 64, "in_cache": 0}
    assert set(said.document["teachers"]) == {"bert", "roberta", "xlm"}
    assert said.document["free_bytes"] > 0
    assert not cache.exists()
    assert "about" in finished.call("dump-teachers", *arguments).out


def test_a_teacher_that_comes_later(copied: FinishedRun, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "more.toml"
    text = copied.recipe.read_text().replace(
        "[cofinetune]", f'[[teachers]]\nname = "late"\nmodel = "{tiny_models["bert"]}"\n[cofinetune]'
    )
    for name in ("train", "dev", "test", "more"):
        shutil.copy(copied.recipe.parent / f"{name}.tsv", tmp_path)
    recipe.write_text(text)
    before = open_cache(copied.root / "cache")
    grown = FinishedRun(recipe, copied.runs, copied.said)

    added = grown.call("cofinetune", "--add", "late", "--json")
    assert added.code == 0, added.err
    dumped = grown.call("dump-teachers", "--json")
    assert dumped.code == 0, dumped.err
    assert list(dumped.document["teachers"]) == ["late"]  # the others were not run again
    after = open_cache(copied.root / "cache")
    assert set(after.teachers) == {"bert", "roberta", "xlm", "late"}
    assert after.teachers["bert"] == before.teachers["bert"]


def test_a_recipe_without_teachers_trains_the_student_alone(
    review_recipe: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    said = kdcache(
        "run",
        review_recipe,
        "--output-dir",
        tmp_path,
        "--json",
        "--set",
        "teachers=[]",
        "--set",
        "distill.method=fine-tune",
        "--set",
        f'student.init_from="{tiny_models["bert"]}"',
    )
    assert said.code == 0, said.err
    assert said.document["results"]["method"] == "fine-tune"
    assert said.document["baseline"] is None
    assert not (tmp_path / "reviews" / "cache").exists()


def test_report_again(finished: FinishedRun) -> None:
    said = kdcache("report", finished.root)
    assert said.code == 0
    assert said.out == finished.said.out
    assert 'class="chart"' in (finished.root / "report.html").read_text()


def test_a_run_keeps_its_answers_and_makes_them_again(copied: FinishedRun) -> None:
    kept = {name: copied.root / name / "predictions.safetensors" for name in (".", "baseline")}
    before = {name: path.read_bytes() for name, path in kept.items()}
    rows = read_predictions(kept["."])["test"]
    scores = json.loads((copied.root / "results.json").read_text())["scores"]["test"]
    assert accuracy(rows.labels, rows.student.predictions) == scores["accuracy"]
    for path in kept.values():
        path.unlink()  # as in a run of kdcache 0.1.0
    page = copied.root / "report.html"
    assert kdcache("report", copied.root).code == 0
    assert f"kdcache report {copied.root} --predict" in page.read_text()
    said = kdcache("report", copied.root, "--predict")
    assert said.code == 0, said.err
    assert {name: path.read_bytes() for name, path in kept.items()} == before
    assert "--predict" not in page.read_text()
    assert "Where is it wrong?" in page.read_text()


def test_report_compares_runs_and_writes_where_it_is_told(copied: FinishedRun, tmp_path: Path) -> None:
    written = tmp_path / "compared.html"
    said = kdcache("report", copied.root, copied.root / "baseline", "--page", written)
    assert said.code == 0, said.err
    assert "What differs between the runs?" in written.read_text()
    assert [line.split()[0] for line in said.out.splitlines()[2:]] == ["reviews", "baseline"]
