"""The stages as functions: the same runs as those of the commands, and what a notebook shows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kdcache
from kdcache import api
from kdcache.cli import stages
from kdcache.errors import MismatchError, RecipeError
from kdcache.progress import NotebookProgress, RichProgress, SilentProgress, default_progress
from kdcache.recipe.loading import with_values
from kdcache.runs import mark_finished, stage_inputs
from tests.conftest import TinyRun

QUIET = SilentProgress()


@pytest.fixture(scope="module")
def run(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> kdcache.Run:
    place = tmp_path_factory.mktemp("api")
    made: kdcache.Run = kdcache.distill(tiny_run.recipe_file, output_dir=place, cache=tiny_run.cache, progress=QUIET)
    return made


def test_a_run_shows_its_scores(run: kdcache.Run) -> None:
    assert run.name == "reviews"
    assert 0 <= run.scores["test"]["accuracy"] <= 1
    assert repr(run).startswith(f"Run('{run.paths.root}': method mt-bert; ")
    assert f"test accuracy {run.scores['test']['accuracy']:.4f}" in repr(run)
    shown = run._repr_html_()
    assert "<td>teacher bert</td>" in shown
    assert "student, mt-bert" in shown
    assert [line["step"] for line in run.metrics() if line["event"] == "steps"] == list(range(1, 9))
    assert (run.student / "config.json").exists()


def test_a_finished_student_is_not_trained_again_and_another_is_not_replaced(
    tiny_run: TinyRun, run: kdcache.Run
) -> None:
    place, before = run.paths.root.parent, run.paths.results.stat().st_mtime_ns
    cache = kdcache.open_cache(tiny_run.cache)
    again = kdcache.distill(kdcache.load_recipe(tiny_run.recipe_file), output_dir=place, cache=cache, progress=QUIET)
    assert again == run == kdcache.open_run(run.paths.root)
    assert run.paths.results.stat().st_mtime_ns == before
    with pytest.raises(MismatchError, match=r"made with other settings: distill\.seed"):
        kdcache.distill(
            tiny_run.recipe_file, {"distill.seed": 5}, output_dir=place, cache=tiny_run.cache, progress=QUIET
        )


def test_the_student_is_evaluated_and_the_teachers_are_weighed(tiny_run: TinyRun, run: kdcache.Run) -> None:
    data = tiny_run.recipe().data.test
    assert data is not None
    scores = kdcache.evaluate(run, data)
    assert scores["accuracy"] == pytest.approx(run.scores["test"]["accuracy"])
    weights = kdcache.weigh(tiny_run.cache, "train").settings()["teacher_weights"]
    assert weights.keys() == {"bert", "roberta", "xlm"}


def test_overrides_of_a_recipe_are_those_of_its_file(tiny_run: TinyRun) -> None:
    values = {"distill.seed": 3, "teachers.bert.max_length": 16, "distill.weights.hidden": 0.5}
    of_file = kdcache.load_recipe(tiny_run.recipe_file, values=values)
    assert with_values(kdcache.load_recipe(tiny_run.recipe_file), values) == of_file
    with pytest.raises(RecipeError, match=r"unknown key 'distill\.sead'"):
        with_values(of_file, {"distill.sead": 3})
    with pytest.raises(RecipeError, match="the recipe is of type int"):
        kdcache.dump_teachers(3)  # type: ignore[arg-type]


def test_run_does_all_stages_and_skips_what_is_finished(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Teachers and cache are there; the two students are left."""
    values = {"distill.temperature": 2.0, "student.layers": 1}
    place = tmp_path / "reviews"
    shutil.copytree(tiny_run.teachers, place / "teachers")
    shutil.copytree(tiny_run.cache, place / "cache")
    job = api._job(tiny_run.recipe_file, values, tmp_path, QUIET)
    mark_finished(job.run, "teachers", stage_inputs(job.recipe, "teachers"), 1.0)
    mark_finished(job.run, "cache", stages._cache_inputs(job), 1.0)
    made = kdcache.run(tiny_run.recipe_file, values, output_dir=tmp_path, progress=QUIET)
    assert made == kdcache.open_run(place)
    assert made.baseline is not None
    assert (made.results["method"], made.baseline["method"]) == ("mt-bert", "fine-tune")
    assert made.paths.report.is_file()
    assert all(stages.is_finished(job, stage) for stage in ("teachers", "cache", "baseline", "student"))
    before = made.paths.results.stat().st_mtime_ns
    assert kdcache.run(tiny_run.recipe_file, values, output_dir=tmp_path, progress=QUIET) == made
    assert made.paths.results.stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""  # the table is the result, and the command prints it
    with pytest.raises(MismatchError, match=r"made with other settings: distill\.seed"):
        kdcache.run(tiny_run.recipe_file, {**values, "distill.seed": 7}, output_dir=tmp_path, progress=QUIET)


def test_run_refuses_before_anything_is_trained(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'mtbert'"):
        kdcache.run(tiny_run.recipe_file, {"distill.method": "mtbert"}, output_dir=tmp_path, progress=QUIET)
    assert not list(tmp_path.iterdir())


def test_a_directory_without_results_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no results"):
        kdcache.open_run(tmp_path)


@pytest.mark.parametrize("first", ["import kdcache", "import kdcache.distill.stage, kdcache"])
def test_distill_is_a_function_whatever_was_imported_before(first: str) -> None:
    code = (
        f"{first}; import sys; assert callable(kdcache.distill); "
        "from kdcache.distill.weigh import weigh; kdcache.distill.weigh\n"
        "try: kdcache.distill('nowhere.toml')\n"
        "except kdcache.errors.RecipeError as error: print(error.message)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "there is no recipe" in done.stdout


class Area:
    """The display of a notebook: what the text of a cell was, one after the other."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def display(self, data: dict[str, str], **options: Any) -> Area:
        assert options == {"raw": True, "display_id": True}
        self.update(data, raw=True)
        return self

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.texts.append(data["text/plain"])


def test_progress_of_a_notebook_is_one_text_that_changes() -> None:
    area, now = Area(), [0.0]
    progress = NotebookProgress(area.display, clock=lambda: now[0])
    progress.note("train has 96 rows")
    progress.start("train", 100, "steps")
    for step in range(1, 101):
        now[0] = step / 100
        progress.advance(1, loss=1 / step)
    progress.finish()
    assert area.texts[0] == "train has 96 rows"
    assert area.texts[1] == "train has 96 rows\ntrain: 0/100 steps (0%)"
    assert area.texts[-1] == "train has 96 rows\ntrain: 100/100 steps (100%) · 100 steps/s · loss 0.01 · took 0:01"
    assert 5 <= len(area.texts) <= 9  # a text that changes at every step would slow down the browser


def test_progress_depends_on_where_the_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert isinstance(default_progress(), RichProgress)

    class Shell:
        kernel: Any = None

    class IPython:
        get_ipython = staticmethod(lambda: shell)

    shell = Shell()
    monkeypatch.setitem(sys.modules, "IPython", IPython)
    assert isinstance(default_progress(), RichProgress)
    shell.kernel = object()
    monkeypatch.setitem(sys.modules, "IPython.display", type("display", (), {"display": Area().display}))
    assert isinstance(default_progress(), NotebookProgress)
