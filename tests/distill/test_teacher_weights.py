"""``distill.teacher_weights`` in a whole training: what is read, what is recorded, what is refused."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from kdcache.cache.reader import Cache
from kdcache.distill import teacher_weights
from kdcache.distill.setup import Training, prepare
from kdcache.distill.stage import DistillResult, distill
from kdcache.errors import DataError, MismatchError, RecipeError
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe, dump_toml, load_recipe
from kdcache.report.table import data_notes, result_rows
from kdcache.runs import stage_inputs
from tests.cli.commands import kdcache
from tests.conftest import TinyRun

FITTED = 'distill.teacher_weights="fitted"'
TWO = "distill.teacher_weights={bert=3, roberta=1, xlm=0}"


class Told(SilentProgress):
    """Keeps notes; Ctrl-C after so many steps."""

    def __init__(self, left: int = 1000) -> None:
        self.left, self.notes = left, list[str]()

    def note(self, message: str) -> None:
        self.notes.append(message)

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:  # noqa: ARG002
        self.left -= "loss" in values
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _fitted_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation split of the tiny task is too small for a fit."""
    monkeypatch.setattr(teacher_weights, "SPLIT", "train")


def made(recipe: Recipe, cache: Path, root: Path, live: Path | None = None) -> Training:
    return prepare(recipe, cache, root, live, SilentProgress())


def losses(training: Training) -> list[dict[str, float]]:
    """All terms of the first steps, without updates."""
    model = training.model().eval()
    found = []
    for batch, _ in zip(training.source.batches(0), range(3), strict=False):
        loss, terms = model(batch, model.counts([batch]))
        found.append({"loss": loss.item(), **{name: value.item() for name, value in terms.items()}})
    return found


def run(recipe: Recipe, cache: Path, root: Path, progress: SilentProgress | None = None) -> DistillResult:
    return distill(recipe, cache, root, progress=progress or SilentProgress())


def test_a_teacher_of_weight_0_is_not_read(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is that of the other teachers alone, value by value."""
    read: set[str] = set()
    outputs, hidden = Cache.outputs, Cache.hidden
    monkeypatch.setattr(Cache, "outputs", lambda self, name, part: (read.add(name), outputs(self, name, part))[1])
    monkeypatch.setattr(Cache, "hidden", lambda self, name, *rest: (read.add(name), hidden(self, name, *rest))[1])
    equal = tiny_run.recipe("distill.teacher_weights={bert=1, roberta=1, xlm=0}")
    found = losses(made(equal, tiny_run.cache, tmp_path))
    assert read == {"bert", "roberta"}
    alone = tiny_run.recipe('distill.teachers=["bert", "roberta"]')
    assert found == losses(made(alone, tiny_run.cache, tmp_path))
    layers = tiny_run.recipe("distill.teacher_layers={xlm=[1, 2]}", TWO)
    assert made(layers, tiny_run.cache, tmp_path).source.teachers == ("bert", "roberta")


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("mt-bert", [FITTED]),
        ("kd", [TWO, "distill.teacher_temperatures={bert=2, roberta=0.5, xlm=1}"]),
        ("rkd", [TWO]),
    ],
)
def test_cached_and_live_teachers_give_the_same_losses(
    tiny_run: TinyRun, tmp_path: Path, overrides: list[str], method: str
) -> None:
    recipe = tiny_run.recipe(*overrides, f"distill.method={method}", "distill.dropout=0.0")
    cached = losses(made(recipe, tiny_run.exact, tmp_path))
    live = losses(made(recipe, tiny_run.exact, tmp_path, tiny_run.teachers))
    for ours, theirs in zip(cached, live, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    plain = tiny_run.recipe(f"distill.method={method}", "distill.dropout=0.0")
    assert cached != losses(made(plain, tiny_run.exact, tmp_path))


def test_what_weigh_writes_is_what_fitted_does(tiny_run: TinyRun, tmp_path: Path) -> None:
    written = tmp_path / "weights.toml"
    said = kdcache("weigh", tiny_run.cache, "--split", "train", "--output", written, "--json")
    assert said.code == 0, said.err
    keys = tomllib.loads(written.read_text())["distill"]
    assert keys == said.document["distill"]
    overrides = [f"distill.{key}={json.dumps(value).replace(': ', ' = ')}" for key, value in keys.items()]
    given = made(load_recipe(tiny_run.recipe_file, overrides), tiny_run.cache, tmp_path)
    fitted = made(tiny_run.recipe(FITTED), tiny_run.cache, tmp_path)
    assert fitted.weights is not None
    assert {key: value for key, value in fitted.weights.record().items() if key != "fitted_rows"} == keys
    for ours, theirs in zip(losses(given), losses(fitted), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert sum(keys["teacher_weights"].values()) == pytest.approx(1)


def test_results_and_table_show_the_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    told = Told()
    results = run(tiny_run.recipe(TWO), tiny_run.cache, tmp_path, told).results
    mixture = results["teacher_mixture"]
    assert mixture["teacher_weights"] == {"bert": 0.75, "roberta": 0.25, "xlm": 0.0}
    assert set(mixture["scores"]) == {"validation", "test"}
    assert list(results["teachers"]) == ["bert", "roberta"]
    assert "weighted mean of teachers" in [row.model for row in result_rows(results)]
    (line,) = [line for line in data_notes(results) if line.startswith("Weights of the teachers")]
    assert "bert 0.75 (temperature 1), roberta 0.25 (temperature 1), xlm 0 (not read)" in line
    assert any(note.startswith("weights of the teachers: bert 0.75") for note in told.notes)


def test_a_training_goes_on_with_the_same_weights_and_with_no_others(tiny_run: TinyRun, tmp_path: Path) -> None:
    overrides = (FITTED, "distill.checkpoint_steps=2")
    whole = run(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path / "cut", Told(5))
    with pytest.raises(MismatchError, match="teacher_weights"):
        run(tiny_run.recipe(TWO, overrides[1]), tiny_run.cache, tmp_path / "cut")
    with pytest.raises(MismatchError, match="teacher_weights"):
        run(tiny_run.recipe(overrides[1]), tiny_run.cache, tmp_path / "cut")
    told = Told()
    again = run(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path / "cut", told)
    assert any(note.startswith("resumed at step") for note in told.notes)
    weights = [(result.student / "model.safetensors").read_bytes() for result in (whole, again)]
    assert weights[0] == weights[1]
    assert again.results["teacher_mixture"] == whole.results["teacher_mixture"]
    assert whole.results["teacher_mixture"]["fitted_rows"] == 96


def test_the_identity_has_no_new_keys_without_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Checkpoints and run records of 0.1.0 go on as before."""
    for overrides in ([], ['distill.teacher_weights="equal"']):
        recipe = tiny_run.recipe(*overrides)
        training = made(recipe, tiny_run.cache, tmp_path)
        assert training.weights is None
        new = ("teacher_weights", "teacher_temperatures", "teacher_class_weights", "teacher mixture")
        assert not [key for key in training.identity(training.model()) if any(name in key for name in new)]
        assert not [key for key in stage_inputs(recipe, "student") if any(name in key for name in new)]
    weighted = tiny_run.recipe(FITTED)
    assert stage_inputs(weighted, "student")["distill.teacher_weights"] == '"fitted"'
    assert stage_inputs(weighted, "baseline") == stage_inputs(tiny_run.recipe(), "baseline")
    training = made(weighted, tiny_run.cache, tmp_path)
    assert {"teacher mixture", "distill.teacher_weights"} <= training.identity(training.model()).keys()


def test_other_labels_in_validation_are_another_training(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny_run.recipe(FITTED, "distill.checkpoint_steps=2"), tiny_run.cache, tmp_path / "cut", Told(5))
    lines = Path(tiny_run.recipe().data.validation or "").read_text().splitlines()
    text, label = lines[1].split("\t")
    (tmp_path / "dev.tsv").write_text("\n".join([lines[0], f"{text}\t{1 - int(label)}", *lines[2:]]) + "\n")
    other = tiny_run.recipe(FITTED, "distill.checkpoint_steps=2", f"data.validation={tmp_path / 'dev.tsv'}")
    with pytest.raises(MismatchError, match="data"):
        run(other, tiny_run.cache, tmp_path / "cut")


def test_a_recipe_with_weights_is_read_back(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(TWO, "distill.teacher_class_weights={bert=[1, 0.5], roberta=[0, 0.5], xlm=[0, 0]}")
    (tmp_path / "again.toml").write_text(dump_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe


BAD: dict[str, tuple[list[str], type[Exception], str]] = {
    "another word": (['distill.teacher_weights="best"'], RecipeError, "is .best.; 'equal', 'fitted' or a table"),
    "negative": (["distill.teacher_weights={bert=-1}"], RecipeError, r"-1.* 0 or more was expected"),
    "none": (["distill.teacher_weights={}"], RecipeError, "teacher_weights"),
    "all zero": (["distill.teacher_weights={bert=0}"], RecipeError, "gives every teacher the weight 0"),
    "no such": (["distill.teacher_weights={bert=1, t5=1}"], RecipeError, "names teacher 't5', which is not used"),
    "one lacks": (["distill.teacher_weights={bert=1, xlm=1}"], RecipeError, "no value for teacher 'roberta'"),
    "a lacking temperature": (["distill.teacher_temperatures={bert=1}"], RecipeError, "no value for teacher 'robe"),
    "temperature 0": (["distill.teacher_temperatures={bert=0}"], RecipeError, "more than 0 was expected"),
    "fitted with temperatures": ([FITTED, "distill.teacher_temperatures={bert=1}"], RecipeError, "fits temperatures"),
    "classes alone": (["distill.teacher_class_weights={bert=[1, 1]}"], RecipeError, "needs teacher_weights"),
    "classes": (
        [TWO, "distill.teacher_class_weights={bert=[1, 1], roberta=[1], xlm=[0, 0]}"],
        RecipeError, "gives 1 weights for teacher 'roberta'; the task has 2 classes",
    ),
    "a class without": (
        [TWO, "distill.teacher_class_weights={bert=[1, 0], roberta=[1, 0], xlm=[0, 0]}"],
        RecipeError, "gives class 1 no teacher",
    ),
    "not the same zeros": (
        [TWO, "distill.teacher_class_weights={bert=[1, 1], roberta=[0, 0], xlm=[0, 0]}"],
        RecipeError, "do not give weight 0 to the same teachers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(case: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    overrides, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        made(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path)
    assert "\n" not in str(caught.value)


def test_too_few_labelled_texts_are_refused(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_weights, "SPLIT", "validation")
    with pytest.raises(DataError, match=r"has 32 labelled texts \(32 rows\); .* at least 50") as caught:
        made(tiny_run.recipe(FITTED), tiny_run.cache, tmp_path)
    assert "distill.teacher_weights" in caught.value.hint


def test_the_baseline_has_no_teachers_to_weigh(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(FITTED, "distill.method=fine-tune")
    assert made(recipe, tiny_run.cache, tmp_path).weights is None
