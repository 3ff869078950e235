"""A sweep of made-up students: what is trained, in which processes, what a kill, a failure and a search leave."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdcache.cli.guard import explain
from kdcache.distill.sweep.cells import SweepCell, SweepStudent, resolve_cells, value_of
from kdcache.distill.sweep.costs import cost_document, texts_read
from kdcache.distill.sweep.running import Failure, Worker, run_all, threads_each
from kdcache.distill.sweep.search import Trial, check_search, propose, score_of
from kdcache.distill.sweep.stage import SweepJob, sweep
from kdcache.errors import LockedError, MismatchError, RecipeError
from kdcache.locks import exclusive
from kdcache.progress import SilentProgress
from kdcache.recipe import SearchSection, load_recipe
from kdcache.report.sweep import varying_keys
from kdcache.runs import RunDirectory

RECIPE = """
name = "made-up"
[data]
train = "train.tsv"
validation = "dev.tsv"
text = ["sentence"]
label = "label"
[[teachers]]
name = "bert"
model = "google-bert/bert-base-uncased"
[student]
init_from = "teacher:bert"
"""
GRID = """
[sweep]
seeds = [0, 1]
[sweep.grid]
distill.method = ["kd", "mt-bert"]
distill.weights.hidden = [0.01, 0.1, 1]
"""
HIDDEN = "distill.weights.hidden"


def train(student: SweepStudent) -> None:
    """Writes results that are a function of the settings, and a line for each call."""
    section = student.recipe.distill
    student.run.create()
    with (student.run.root.parent / "trained.txt").open("a") as log:
        log.write(f"{student.name}\n")
    if section.weights.hidden == 7:
        raise MismatchError("the cache lacks layer 7", "Dump it.")
    score = round(
        random.Random(f"{section.method} {section.weights} {section.learning_rate} {section.seed}").random(), 4
    )
    scores = {"validation": {"accuracy": score}, "test": {"accuracy": score / 2}}
    results = {"scores": scores, "method": section.method, "teachers": {}, "seconds": time.time(), "targets": "cache"}
    student.run.results.write_text(json.dumps(results))


def dying(student: SweepStudent) -> None:
    if student.recipe.distill.weights.hidden == 0.1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(student)


def make_job(
    directory: Path, section: str = GRID, *, work: Callable[[SweepStudent], None] = train, **changes: Any
) -> SweepJob:
    directory.mkdir(exist_ok=True)
    path = directory / "recipe.toml"
    path.write_text(RECIPE + section)
    for name in ("train.tsv", "dev.tsv"):
        (directory / name).write_text("sentence\tlabel\ngood\t1\n")
    values: dict[str, Any] = {
        "load": functools.partial(load_recipe, path, []),
        "identity": lambda named: f"identity of {named}",
        "provenance": lambda _: {},
        "finished": lambda student: student.run.results.exists(),
        "worker": Worker(work, explain),
        "progress": SilentProgress(),
    }
    return SweepJob(load_recipe(path), RunDirectory(directory / "runs" / "made-up"), **(values | changes))


def trained(job: SweepJob) -> list[str]:
    return (job.run.sweep / "trained.txt").read_text().split()


def table(document: dict[str, Any]) -> dict[str, Any]:
    """All but times."""
    return {key: value for key, value in document.items() if key != "cost"}


def test_every_cell_is_trained_once_per_seed_and_never_again(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    first = sweep(job)
    assert len(first["cells"]) == 6
    assert all(cell["seeds"] == 2 for cell in first["cells"])
    assert len(trained(job)) == len(set(trained(job))) == 12
    best = max(first["cells"], key=lambda cell: cell["mean"])
    assert first["chosen"] == best["cell"]
    assert sweep(job) == first
    assert len(trained(job)) == 12
    assert json.loads((job.run.sweep / "sweep.json").read_text()) == first
    assert 'class="chart"' in (job.run.sweep / "sweep.html").read_text()


def test_the_order_of_the_recipe_and_new_cells_leave_students_where_they_are(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    sweep(job)
    other = GRID.replace('["kd", "mt-bert"]', '["mt-bert", "fine-tune", "kd"]').replace("[0, 1]", "[1, 0, 2]")
    job = make_job(tmp_path, other)
    document = sweep(job)
    assert len(trained(job)) == len(set(trained(job))) == 27
    assert document["cells"][0]["settings"] == {"distill.method": "mt-bert", HIDDEN: 0.01}


def test_equal_settings_are_one_cell_however_they_are_written(tmp_path: Path) -> None:
    section = """
[sweep]
baseline = { distill = { method = "mt-bert", weights = { hidden = 0.1 } } }
cells = [ {}, { distill.method = "mt-bert" }, { distill.weights.hidden = 0.1, distill.epochs = 3 } ]
seeds = [0]
"""
    assert len(sweep(make_job(tmp_path, section))["cells"]) == 1


def test_keys_of_stages_are_shown_by_their_number(tmp_path: Path) -> None:
    section = """
[[distill.stages]]
[[distill.stages]]
epochs = 2
[sweep]
seeds = [0]
grid = { distill.stages.2.epochs = [4, 5], distill.stages.1.weights.hidden = [0.5] }
"""
    document = sweep(make_job(tmp_path, section))
    hidden = {"distill.stages.1.weights.hidden": 0.5}
    assert [cell["settings"] for cell in document["cells"]] == [
        {"distill.stages.2.epochs": epochs, **hidden} for epochs in (4, 5)
    ]
    assert varying_keys(document) == ["distill.stages.2.epochs"]


def test_values_of_teachers_are_found_by_names_with_dots(tmp_path: Path) -> None:
    teacher = '[[teachers]]\nname = "bert.v1.5"\nmodel = "other"\nhead = "own"\n'
    cell = SweepCell("0" * 64, make_job(tmp_path, teacher).recipe, None)
    found = {name: value_of(cell, f"teachers.{name}.model") for name in ("bert", "bert.v1.5", "bert.v1")}
    assert found == {"bert": "google-bert/bert-base-uncased", "bert.v1.5": "other", "bert.v1": None}


def test_a_method_of_a_cell_counts_in_every_stage_or_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    stages = [{"method": "mt-bert"}, {"method": "kd", "weights": {"task": 0.0}}]

    def cells(method: str) -> list[SweepCell]:
        return resolve_cells([{"distill.method": method, "distill.stages": stages}], job.load, job.identity)

    (alone,) = cells("fine-tune")
    assert [(one.method, one.weights.task) for one in alone.recipe.distill.in_stages()] == [("fine-tune", 1.0)] * 2
    with pytest.raises(RecipeError, match=r"distill\.method = 'dkd' of a sweep's cell changes nothing: each of the 2"):
        cells("dkd")


def test_another_cache_is_another_cell(tmp_path: Path) -> None:
    document = sweep(make_job(tmp_path, '[sweep]\nseeds = [0]\ngrid = { cache = ["a", "b"] }'))
    assert [cell["settings"] for cell in document["cells"]] == [{"cache": "a"}, {"cache": "b"}]


def test_a_student_that_fails_is_recorded_and_tried_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, GRID.replace("0.1, 1]", "7, 1]"))
    document = sweep(job)
    failed = [cell for cell in document["cells"] if cell["failed"]]
    assert [cell["settings"][HIDDEN] for cell in failed] == [7, 7]
    assert failed[0]["failed"] == {"0": "the cache lacks layer 7", "1": "the cache lacks layer 7"}
    assert [cell["seeds"] for cell in document["cells"]] == [2, 0, 2, 2, 0, 2]
    assert table(sweep(job)) == table(document)
    assert len(trained(job)) == 12 + 4
    assert table(sweep(job, train=False)) == table(document)
    cured = make_job(tmp_path, GRID.replace("0.1, 1]", "7, 1]"), work=functools.partial(finish, 0.25))
    after = sweep(cured)
    assert not any(cell["failed"] for cell in after["cells"])
    assert after["cells"][1]["mean"] == 0.25


def finish(score: float, student: SweepStudent) -> None:
    results = {
        "scores": {"validation": {"accuracy": score}},
        "method": "kd",
        "teachers": {},
        "seconds": 1.0,
        "targets": "none",
    }
    student.run.results.write_text(json.dumps(results))


class Killed(BaseException):
    """What no sweep catches."""


def killed_after(count: int) -> Callable[[SweepStudent], None]:
    left = count

    def work(student: SweepStudent) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        train(student)

    return work


SEARCH = """
[sweep.search]
trials = 4
batch = 2
sampler = "random"
[sweep.search.space]
distill.learning_rate = { low = 1e-5, high = 1e-3, log = true }
"""


@pytest.mark.parametrize("section", [GRID, GRID + SEARCH])
def test_killed_anywhere_it_ends_with_the_same_table(tmp_path: Path, section: str) -> None:
    whole = sweep(make_job(tmp_path / "whole", section))
    for count in (0, 3, 1, 4):
        with pytest.raises(Killed):
            sweep(make_job(tmp_path / "cut", section, work=killed_after(count)))
        assert not (tmp_path / "cut" / "runs" / "made-up" / "sweep" / "sweep.json").exists()
    last = make_job(tmp_path / "cut", section)
    assert table(sweep(last)) == table(whole)
    assert len(trained(last)) == len(set(trained(last)))


def test_show_trains_nothing_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        sweep(make_job(tmp_path, work=killed_after(5)))
    job = make_job(tmp_path, work=killed_after(0))
    files = sorted(tmp_path.rglob("*"))
    document = sweep(job, train=False)
    assert sum(cell["seeds"] for cell in document["cells"]) == 5
    assert sorted(tmp_path.rglob("*")) == files


def test_two_sweeps_do_not_work_in_one_directory(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    job.run.sweep.mkdir(parents=True)
    with (
        exclusive(job.run.sweep / ".lock", busy=lambda: "held"),
        pytest.raises(LockedError, match="another process works on the sweep"),
    ):
        sweep(job)


def test_a_sweep_needs_its_section_and_a_validation_split(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no \[sweep\] section"):
        sweep(make_job(tmp_path, ""))
    job = make_job(tmp_path)
    data = job.recipe.data.model_copy(update={"validation": None})
    with pytest.raises(RecipeError, match="a sweep chooses on validation"):
        sweep(replace(job, recipe=job.recipe.model_copy(update={"data": data})))


def test_a_misspelled_key_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    job = make_job(tmp_path, "[sweep]\ngrid = { distill.method = ['kd'], distill.weights.hiden = [1] }")
    with pytest.raises(RecipeError, match=r"unknown key 'distill\.weights\.hiden'"):
        sweep(job)
    assert not job.run.root.exists()


# Processes


def test_two_processes_give_the_table_of_one(tmp_path: Path) -> None:
    one = sweep(make_job(tmp_path / "one"))
    two = make_job(tmp_path / "two", jobs=2, threads=1)
    assert table(sweep(two)) == table(one)
    assert sorted(trained(two)) == sorted(set(trained(two)))


def test_a_process_that_dies_fails_its_student_alone(tmp_path: Path) -> None:
    document = sweep(make_job(tmp_path, GRID.replace("seeds = [0, 1]", "seeds = [0]"), work=dying, jobs=2, threads=1))
    assert [cell["seeds"] for cell in document["cells"]] == [1, 0, 1, 1, 0, 1]
    (message,) = {text for cell in document["cells"] for text in cell["failed"].values()}
    assert message == "the process of this student ended with signal SIGKILL"


def sleep_and_write(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(60)


def two_sleepers(places: list[Path]) -> None:
    run_all(places, Worker(sleep_and_write, explain), jobs=2, threads=1, done=lambda *_: None)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    parent = multiprocessing.get_context("spawn").Process(target=two_sleepers, args=(places,))
    parent.start()
    deadline = time.monotonic() + 60
    while not all(place.exists() and place.read_text() for place in places) and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.join()
    for place in places:
        while Path(f"/proc/{place.read_text()}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not Path(f"/proc/{place.read_text()}").exists()


def failing(value: int) -> None:
    if value == 1:
        raise ValueError("odd")
    os.environ["SEEN"] = os.environ.get("OMP_NUM_THREADS", "")


def test_failures_are_put_into_the_words_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Failure | None]] = []
    run_all([0, 1, 2], Worker(failing, explain), done=lambda value, failure: seen.append((value, failure)))
    hint = "See where it happened with KDCACHE_DEBUG=1."
    assert seen == [(0, None), (1, Failure("unexpected: ValueError: odd", hint, 1)), (2, None)]
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert [threads_each(jobs) for jobs in (1, 2, 4, 9)] == [6, 3, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert threads_each(1) == len(os.sched_getaffinity(0))


# Searches

PROPOSED = [[0.0003135, 3, [3, 4], 29], [0.0001196, 2, [3, 4], 29]]
SPACE: dict[str, Any] = {
    "distill.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
    "distill.epochs": {"low": 1, "high": 4},
    "student.layers": [[1, 2], [3, 4]],
}


def search(section: SearchSection) -> list[Trial]:
    """Run a search for the learning rate 2e-4 with layers 3 and 4."""
    trials: list[Trial] = []
    while batch := propose(section, trials):
        assert len(batch) <= section.batch
        for cell in batch:
            score = -abs(cell["distill.learning_rate"] - 2e-4) * 1e4 - (cell["student.layers"] == [1, 2])
            trials.append(Trial(cell, score))
    return trials


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_proposes_within_its_space_and_the_same_again(sampler: str) -> None:
    section = SearchSection.model_validate({"trials": 11, "batch": 3, "sampler": sampler, "space": SPACE})
    if sampler == "tpe" and importlib.util.find_spec("optuna") is None:
        with pytest.raises(RecipeError, match="needs the package 'optuna', and it is not installed") as caught:
            search(section)
        assert "kdcache[search]" in caught.value.hint
        return
    trials = search(section)
    assert len(trials) == 11
    assert trials == search(section)
    for trial in trials:
        assert 1e-5 <= trial.cell["distill.learning_rate"] <= 1e-3
        assert trial.cell["distill.epochs"] in (1, 2, 3, 4)
        assert trial.cell["student.layers"] in ([1, 2], [3, 4])
        assert len(f"{trial.cell['distill.learning_rate']:.6e}".rstrip("0").split("e")[0].rstrip("0")) <= 5
    assert len({str(trial.cell) for trial in trials}) > 8
    other = search(section.model_copy(update={"seed": 1}))
    assert [trial.cell for trial in other] != [trial.cell for trial in trials]
    after_a_failure = [Trial(trials[0].cell, None), *trials[1:3]]
    assert len(propose(section, after_a_failure)) == 3


def test_a_search_is_compared_with_the_cells_of_the_recipe(tmp_path: Path) -> None:
    section = """
[sweep]
cells = [ {} ]
seeds = [0, 1]
[sweep.search]
trials = 5
sampler = "random"
[sweep.search.space]
distill.learning_rate = { low = 1e-5, high = 1e-3, log = true }
distill.weights.hidden = [0.01, 7]
"""
    document = sweep(make_job(tmp_path, section))
    assert [cell["proposed"] for cell in document["cells"]] == [False] + [True] * 5
    assert document["baseline"] == document["cells"][0]["cell"]
    assert {cell["seeds"] for cell in document["cells"] if cell["settings"][HIDDEN] == 7} == {0}
    assert document["cells"][0]["settings"] == {"distill.learning_rate": 5e-5, HIDDEN: 0.1}


REFUSED = """
[sweep]
seeds = [0, 1]
[sweep.search]
trials = 24
sampler = "random"
seed = SEED
[sweep.search.space]
distill.batch_size = [8, 32]
distill.accumulation = [1, 16]
"""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_proposal_that_no_recipe_may_have_is_a_failed_cell_and_the_search_goes_on(tmp_path: Path, seed: int) -> None:
    job = make_job(tmp_path, REFUSED.replace("SEED", str(seed)))
    document = sweep(job)
    cells = {tuple(cell["settings"].values()): cell for cell in document["cells"]}
    assert cells.keys() == {(8, 1), (8, 16), (32, 1), (32, 16)}
    refused = cells.pop((8, 16))
    assert (refused["seeds"], refused["mean"], refused["proposed"]) == (0, None, True)
    assert refused["failed"].keys() == {"0", "1"}
    assert all("accumulation 16 cuts a batch of 8" in reason for reason in refused["failed"].values())
    assert all(cell["seeds"] == 2 and not cell["failed"] for cell in cells.values())
    assert document["baseline"] != refused["cell"]
    assert sweep(job) == sweep(job, train=False) == document
    assert len(trained(job)) == 6


def test_a_search_of_refused_proposals_ends_with_their_reasons(tmp_path: Path) -> None:
    document = sweep(make_job(tmp_path, REFUSED.replace("SEED", "0").replace("[8, 32]", "[8]").replace("[1, ", "[")))
    (cell,) = document["cells"]
    assert cell["failed"].keys() == {"0", "1"}
    assert document["chosen"] is None


def test_a_grid_with_a_cell_that_no_recipe_may_have_and_an_unknown_key_are_refused_at_the_start(tmp_path: Path) -> None:
    grid = "[sweep]\ngrid = { distill.batch_size = [8, 32], distill.accumulation = [1, 16] }"
    unknown = "[sweep]\ncells = [{}]\n[sweep.search]\ntrials = 2\nsampler = 'random'\nspace = { distill.epoch = [1] }"
    for section, message in ((grid, "accumulation 16 cuts a batch of 8"), (unknown, r"unknown key 'distill\.epoch'")):
        job = make_job(tmp_path, section)
        with pytest.raises(RecipeError, match=message):
            sweep(job)
        assert not job.run.root.exists()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_range_gives_the_numbers_that_its_key_takes(sampler: str) -> None:
    space = {HIDDEN: {"low": 0, "high": 1}, "distill.epochs": {"low": 1.0, "high": 4.0}}
    section = SearchSection.model_validate({"trials": 12, "sampler": sampler, "space": space})
    trials: list[Trial] = []
    while batch := propose(section, trials):
        trials += [Trial(cell, cell[HIDDEN]) for cell in batch]
    hidden, epochs = ([trial.cell[key] for trial in trials] for key in (HIDDEN, "distill.epochs"))
    assert sum(0 < value < 1 for value in hidden) > 8
    assert set(epochs) <= {1, 2, 3, 4}
    assert all(isinstance(value, int) for value in epochs)
    fractions = SearchSection.model_validate({"trials": 1, "space": {"distill.epochs": {"low": 1.5, "high": 4}}})
    with pytest.raises(RecipeError, match=r"has low = 1\.5, and distill\.epochs takes whole numbers"):
        check_search(fractions)


def test_the_proposals_of_a_search_stay_what_they_were() -> None:
    """Students of earlier versions are found again. Ranges over keys of either kind, and of a key without a type."""
    space = SPACE | {"student.config.hidden_size": {"low": 16, "high": 64}}
    section = SearchSection.model_validate({"trials": 2, "batch": 2, "sampler": "random", "space": space})
    assert [list(cell.values()) for cell in propose(section, [])] == PROPOSED


def test_a_score_that_is_not_finite_is_none() -> None:
    assert score_of({0: 0.5, 1: math.nan}, [0, 1], lower_is_better=True) is None
    assert score_of({0: 0.5, 1: math.inf}, [0, 1], lower_is_better=False) is None
    assert score_of({0: 0.5, 1: 0.25, 2: math.nan}, [0, 1], lower_is_better=True) == -0.375


# Costs


def test_costs_are_those_of_the_texts_that_live_teachers_would_have_read(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    sweep(job)
    cell = sweep(job)["cells"][0]["cell"]
    lines = [{"event": "steps", "step": 4}, {"event": "steps", "step": 10}, {"event": "epoch", "step": 10}]
    place = job.run.sweep / f"{cell}-s0"
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')
    assert texts_read(place / "metrics.jsonl", 32) == 320
    assert texts_read(place / "none.jsonl", 32) == 0
    student = SweepStudent(job.recipe, RunDirectory(place), None)
    result = {"seconds": 5.0, "targets": "cache", "teachers": {"bert": {}, "mpnet": {}}}
    rates = {
        "bert": {"texts_per_second": "64.0", "seconds": "10"},
        "mpnet": {"texts_per_second": "16", "seconds": "40"},
    }
    found = cost_document({cell: [student]}, {student.name: result}, lambda _: {"teachers": rates})
    assert found["live_seconds"] == 320 / 64 + 320 / 16
    assert (found["students"], found["seconds"], found["live_texts"], found["dump_seconds"]) == (1, 5.0, 320, 50)
    for forged in ({}, {"teachers": {"bert": {"texts_per_second": "nan"}}}, {"teachers": [1]}):
        assert cost_document({cell: [student]}, {student.name: result}, lambda _, f=forged: f)["live_seconds"] is None


def test_stages_cost_the_texts_of_each_and_live_teachers_those_of_stages_with_a_method_for_them(tmp_path: Path) -> None:
    section = """
[distill]
batch_size = 8
[[distill.stages]]
batch_size = 32
[[distill.stages]]
[[distill.stages]]
method = "fine-tune"
batch_size = 2
"""
    student = SweepStudent(make_job(tmp_path, section).recipe, RunDirectory(tmp_path), None)
    (tmp_path / "metrics.jsonl").write_text('{"event": "steps", "step": 7}\n')
    result = {"seconds": 5.0, "targets": "cache", "teachers": {"bert": {}}}
    result["stages"] = [{"steps": steps} for steps in (10, 100, 1000)]
    rates = {"teachers": {"bert": {"texts_per_second": 10, "seconds": 1}}}
    found = cost_document({"cell": [student]}, {student.name: result}, lambda _: rates)
    assert found["cells"]["cell"]["texts"] == 320 + 800 + 2000
    assert (found["live_texts"], found["live_seconds"]) == (1120, 112)
