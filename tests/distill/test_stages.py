"""Trainings in stages: what each stage trains on and with, exact resume in any of them, and one identity."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.distill.setup import prepare
from kdcache.distill.stage import DistillResult, distill
from kdcache.errors import MismatchError, RecipeError
from kdcache.progress import SilentProgress
from kdcache.recipe import dump_toml, load_recipe
from kdcache.runs import stage_inputs
from tests.conftest import TinyRun
from tests.distill.test_resume import DRIVER, Interrupting, metrics

STAGES = [
    'distill.stages=[{ weights = { task = 0.0, soft = 0.0 } }, { epochs = 2, rows = "labelled", method = "kd", '
    "learning_rate = 5e-4, weights = { hidden = 0.0 }, evaluate_steps = 4 }]",
    "distill.checkpoint_steps=3",
    "distill.ema=0.9",
    "distill.schedule=cosine",
]  # 8 steps of hidden states alone, then 2 x 6 steps of labelled rows


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "student" / "model.safetensors")


def assert_same(root: Path, other: Path) -> None:
    found, expected = weights(root), weights(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert metrics(root) == metrics(other)
    ours, theirs = (json.loads((place / "results.json").read_text()) for place in (root, other))
    for key in ("scores", "best_epoch", "stages", "scales"):
        assert ours.get(key) == theirs.get(key), key


@pytest.fixture(scope="module")
def staged(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    root = tmp_path_factory.mktemp("staged")
    return distill(tiny_run.recipe(*STAGES), tiny_run.cache, root, progress=SilentProgress())


def test_each_stage_has_its_own_terms_rows_and_rates(staged: DistillResult) -> None:
    lines = metrics(staged.student.parent)
    first, second = ([line for line in lines if line["stage"] == f"distill {number}"] for number in (1, 2))
    assert len(first) + len(second) == len(lines)
    steps = [[line for line in own if line["event"] == "steps"] for own in (first, second)]
    assert [[line["step"] for line in own] for own in steps] == [list(range(1, 9)), list(range(1, 13))]
    assert all("hidden" in line and "soft" not in line for line in steps[0])
    assert all("soft" in line and "hidden" not in line for line in steps[1])
    assert max(line["learning_rate"] for line in steps[0]) == pytest.approx(1e-3)
    assert max(line["learning_rate"] for line in steps[1]) == pytest.approx(5e-4)
    assert [line["step"] for line in second if line["event"] != "steps"] == [4, 6, 8, 12]
    found = staged.results["stages"]
    assert [(stage["method"], stage["rows"], stage["steps"]) for stage in found] == [
        ("mt-bert", "all", 8),
        ("kd", "labelled", 12),
    ]
    assert staged.results["best_epoch"] in (2, 3), "of all epochs; the best weights are those of the last stage"
    assert staged.results["method"] == "mt-bert"


def test_a_stage_starts_where_the_one_before_ended(tiny_run: TinyRun, tmp_path: Path) -> None:
    """The projections too, where the method is the same; the order of rows goes on."""
    recipe = tiny_run.recipe("distill.stages=[{}, { epochs = 2 }]")
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, tiny_run.cache, tmp_path, progress=Interrupting(17))
    place = tmp_path / "checkpoints" / "distill"
    (last,) = place.glob("step-*")
    state = torch.load(last / "model.pt", weights_only=True)
    stages = prepare(recipe, tiny_run.cache, tmp_path, None, progress=SilentProgress()).stages
    model = stages[0].model()
    model.load_state_dict(state)
    carried = stages[1].model(model)
    assert any(name.startswith("projections.") and tensor.any() for name, tensor in carried.state_dict().items())
    (begun,) = (place / "stage-2").glob("step-*")
    identity = json.loads((begun / "checkpoint.json").read_text())["identity"]
    assert identity == {**identity, **json.loads(json.dumps(stages[1].identity(carried)))}


def test_one_stage_without_keys_is_the_training_without_stages(tiny_run: TinyRun, tmp_path: Path) -> None:
    plain = distill(tiny_run.recipe(), tiny_run.cache, tmp_path / "plain", progress=SilentProgress())
    one = distill(tiny_run.recipe("distill.stages=[{}]"), tiny_run.cache, tmp_path / "one", progress=SilentProgress())
    assert all(
        torch.equal(tensor, weights(tmp_path / "one")[name]) for name, tensor in weights(tmp_path / "plain").items()
    )
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "one")
    assert plain.scores == one.scores and "stages" not in plain.results


def test_killed_in_any_stage_it_ends_the_same(tiny_run: TinyRun, staged: DistillResult, tmp_path: Path) -> None:
    points = ["step:5", "saved:1", "step:9", "save:2", "step:2", "end"]
    command = [
        *(sys.executable, str(DRIVER), str(tiny_run.recipe_file), str(tiny_run.cache), json.dumps(STAGES)),
        json.dumps({str(tmp_path): points}),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=DRIVER.parent.parent.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {str(tmp_path): [signal.SIGKILL] * 5 + [0]}
    assert_same(tmp_path, staged.student.parent)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("distill.stages.2.learning_rate=1e-4", "distill.stages"),
        ("distill.stages=[{}]", "distill.stages"),
        ("distill.ema=0.5", "distill.ema"),
    ],
)
def test_a_change_in_any_stage_is_another_training(tiny_run: TinyRun, tmp_path: Path, change: str, named: str) -> None:
    """Also while the first stage runs: the list is one training."""
    with pytest.raises(KeyboardInterrupt):
        distill(tiny_run.recipe(*STAGES), tiny_run.cache, tmp_path, progress=Interrupting(5))
    with pytest.raises(MismatchError, match=f"another training: {named}"):
        distill(tiny_run.recipe(*STAGES, change), tiny_run.cache, tmp_path, progress=SilentProgress())
    with pytest.raises(MismatchError, match=r"another training: distill\.stages: .* then, null now"):
        distill(tiny_run.recipe(*STAGES[1:]), tiny_run.cache, tmp_path, progress=SilentProgress())


def test_a_stage_that_stops_early_hands_on_its_best_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe("distill.stages=[{ epochs = 6, patience = 1, learning_rate = 1e-9 }, {}]")
    found = distill(recipe, tiny_run.cache, tmp_path, progress=SilentProgress()).results["stages"]
    assert [(stage["stopped_early"], stage["steps"]) for stage in found] == [(True, 16), (False, 8)]
    assert found[0]["best_epoch"] == 1


@pytest.mark.parametrize(("rows", "steps"), [("all", 8), ("train", 6), ("labelled", 6)])
def test_rows_of_a_training(tiny_run: TinyRun, tmp_path: Path, rows: str, steps: int) -> None:
    training = prepare(
        tiny_run.recipe(f"distill.rows={rows}"), tiny_run.cache, tmp_path, None, progress=SilentProgress()
    )
    assert training.source.steps_per_epoch == steps
    labels = torch.cat([batch.labels for batch in training.source.batches(0)])
    assert (labels < 0).sum() == (24 if rows == "all" else 0)


def test_stages_take_what_they_do_not_name_from_the_section(tiny_run: TinyRun) -> None:
    recipe = tiny_run.recipe(
        *STAGES, "distill.rows=train", "distill.temperature=3.0", "distill.stages.1.temperature=2.0"
    )
    first, second = recipe.distill.in_stages()
    assert (first.temperature, second.temperature) == (2.0, 3.0)
    assert (first.rows, second.rows) == ("train", "labelled")
    assert (first.weights.soft, first.weights.hidden, second.weights.task) == (0.0, 0.1, 1.0)
    linear = tiny_run.recipe(
        "distill.schedule=cosine", "distill.rows=train", 'distill.stages=[{schedule="linear",rows="all"}]'
    )
    assert [(one.schedule, one.rows) for one in linear.distill.in_stages()] == [(None, None)]


def test_defaults_written_out_are_the_defaults(tiny_run: TinyRun) -> None:
    """A finished student of 0.1.0 stays finished."""
    plain, spelled = tiny_run.recipe(), tiny_run.recipe("distill.schedule=linear", "distill.rows=all")
    assert plain == spelled
    for stage in ("student", "baseline", "teachers", "cache"):
        inputs = stage_inputs(plain, stage)  # type: ignore[arg-type]
        new = ("schedule", "patience", "evaluate_steps", "ema", "rows", "stages", "hidden_transfer")
        assert not [key for key in inputs if key.split(".")[-1] in new]


def test_the_baseline_has_the_stages_without_their_methods(tiny_run: TinyRun) -> None:
    recipe = tiny_run.recipe(*STAGES)
    alone = recipe.distill.without_teachers()
    assert [(one.method, one.epochs, one.rows) for one in alone.in_stages()] == [
        ("fine-tune", 1, None),
        ("fine-tune", 2, "labelled"),
    ]
    assert all(one.weights == recipe.distill.weights for one in alone.in_stages())
    other = recipe.model_copy(update={"distill": tiny_run.recipe(*STAGES, "distill.stages.2.temperature=4.0").distill})
    assert stage_inputs(recipe, "baseline") == stage_inputs(other, "baseline")


def test_the_baseline_can_have_settings_of_its_own(tiny_run: TinyRun, tmp_path: Path) -> None:
    own = ("baseline.epochs=9", "baseline.batch_size=4", "baseline.learning_rate=3e-4", "baseline.schedule=linear")
    usual, recipe = tiny_run.recipe(*STAGES), tiny_run.recipe(*STAGES, *own)
    alone = recipe.without_teachers()
    assert (alone.method, alone.epochs, alone.batch_size, alone.learning_rate) == ("fine-tune", 9, 4, 3e-4)
    assert alone.in_stages() == (alone,)
    assert alone.seed == usual.distill.seed
    for stage in ("teachers", "cache", "student"):
        assert stage_inputs(recipe, stage) == stage_inputs(usual, stage)  # type: ignore[arg-type]
    assert (
        stage_inputs(recipe, "baseline")
        == stage_inputs(usual.model_copy(update={"distill": alone}), "baseline")
        != stage_inputs(usual, "baseline")
    )
    (tmp_path / "again.toml").write_text(dump_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    with pytest.raises(RecipeError, match=r"\[baseline\] has batches of 2 rows in 4 micro-batches"):
        tiny_run.recipe("baseline.batch_size=2", "baseline.accumulation=4")


def test_a_recipe_with_stages_survives_its_file(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(*STAGES)
    (tmp_path / "again.toml").write_text(dump_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.stages.3.epochs=1", r"there is no stage '3'; there are 2, counted from 1"),
        ("distill.stages.2.epochs=0", r"distill\.stages\.2\.epochs is 0; 1 or more was expected"),
        ("distill.stages.2.epoch=1", r"unknown key 'distill\.stages\.2\.epoch'"),
        ("distill.stages=[]", r"distill\.stages is \[\]; a list of at least 1 was expected"),
        ("distill.accumulation=17", "accumulation 17 cuts a batch of 16"),
        ('distill.stages.1.schedule="step"', r"'linear', 'cosine' or 'constant' was expected"),
    ],
)
def test_stages_that_are_not_possible(tiny_run: TinyRun, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_run.recipe(*STAGES, override)


def test_a_method_of_a_stage_is_checked_before_the_first_step(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe('distill.stages=[{}, { method = "no-such" }]')
    with pytest.raises(RecipeError, match="no-such"):
        distill(recipe, tiny_run.cache, tmp_path, progress=SilentProgress())
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "override",
    [
        "distill.weights={task=0, soft=0, hidden=0}",
        'distill.stages=[{}, { method = "kd", weights = { task = 0.0, soft = 0.0 } }]',
    ],
)
def test_a_loss_of_zero_is_refused(tiny_run: TinyRun, tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=r"nothing would be learned: method '.*' has the loss 0 with task = 0 and"):
        distill(tiny_run.recipe(override), tiny_run.cache, tmp_path, progress=SilentProgress())


def test_patience_begins_where_the_classifier_is_trained(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Hidden states alone leave the scores where they are: in a stage of theirs, and in the first half of TinyBERT."""
    stages = "distill.stages=[{ epochs = 4, weights = { task = 0.0, soft = 0.0 } }, {}]"
    halves = ("distill.method=tinybert", "distill.epochs=6", "distill.learning_rate=1e-9")
    for name, overrides in (("stages", (stages,)), ("halves", halves)):
        recipe = tiny_run.recipe(*overrides, "distill.patience=2")
        found = distill(recipe, tiny_run.cache, tmp_path / name, progress=SilentProgress()).results
        if name == "stages":
            first = found["stages"][0]
            assert (first["stopped_early"], first["steps"], first["best_epoch"]) == (False, 4 * 8, 4)
            assert first["best_score"] is None
        else:
            assert found["best_epoch"] == 4  # the first of the second half, which nothing after it beats


def test_fine_tuning_reads_gold_labels_alone_in_every_stage(tiny_run: TinyRun) -> None:
    """Weights of the recipe are for its method: gold labels may count little there, or nothing in a first stage."""
    small = tiny_run.recipe("distill.weights.task=0").distill.without_teachers()
    assert small.weights.task == 1.0
    recipe = tiny_run.recipe(*STAGES, "distill.method=fine-tune")
    assert [(one.method, one.weights.task) for one in recipe.distill.plain().in_stages()] == [("fine-tune", 1.0)] * 2
    assert tiny_run.recipe(*STAGES).distill.plain() == tiny_run.recipe(*STAGES).distill


def test_it_stops_by_validation_only_where_there_is_one(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe("distill.patience=2")
    data: Any = recipe.data.model_copy(update={"validation": None})
    with pytest.raises(RecipeError, match=r"distill\.patience = 2 needs labelled validation rows"):
        distill(recipe.model_copy(update={"data": data}), tiny_run.cache, tmp_path, progress=SilentProgress())
