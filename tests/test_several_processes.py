"""Commands in two processes against the same commands in one: every number, errors, kills, interrupts.

The processes are those of torchrun, without its agent: gloo on this machine. Dropout is off, because each process draws
its own.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.dump.stage import dump_teachers
from kdcache.progress import SilentProgress
from kdcache.teachers.bundle import parameters_on_disk
from kdcache.training import checkpoints
from tests.conftest import TinyRun
from tests.several import Ended, Scenario, run_all

pytestmark = pytest.mark.timeout(1200)  # a fixture runs ten trainings

# Of 120 rows: 7 steps of 17 rows, and one of a single row, of which the first process has none.
STEPS = ["distill.batch_size=17", "distill.checkpoint_steps=3"]
EQUAL = {
    "mt-bert": [*STEPS, "distill.epochs=2"],
    "kd, micro-batches": [*STEPS, "distill.method=kd", "distill.accumulation=3"],
    "hidden states of a code": [*STEPS, "distill.method=tiny-newsrec"],
    "in stages": [
        *STEPS,
        "distill.stages=[{method='skdbert', patience=1, evaluate_steps=3}, {method='mt-bert', rows='labelled'}]",
        "distill.layer_map=random",
        "distill.ema=0.8",
    ],
}
WORLDS = {"hidden states of a code": 3}  # else 2

# Of 96 rows: 5 steps of 19 rows, and one of a single row. Every step is clipped; one teacher has a rate of its own; the
# best weights are not the last ones.
TEACHERS = [
    *("cofinetune.batch_size=19", "cofinetune.accumulation=2", "cofinetune.epochs=2", "cofinetune.checkpoint_steps=3"),
    *("cofinetune.max_grad_norm=0.1", "cofinetune.ema=0.8", "teachers.roberta.learning_rate=3e-3"),
    *("cofinetune.evaluate_steps=4", "cofinetune.select_by=loss"),
]
APART = [*TEACHERS, "cofinetune.placement=teacher"]


@dataclass(frozen=True)
class Done:
    """How the processes of a scenario ended, and the run directory that they left."""

    ended: list[Ended]
    root: Path

    @property
    def codes(self) -> list[int]:
        return [ended.code for ended in self.ended]

    @property
    def errors(self) -> list[str]:
        """The error lines of all processes."""
        return [line for ended in self.ended for line in ended.err.splitlines() if line.startswith("error:")]


@dataclass(frozen=True)
class Bench:
    """Where scenarios run, and on what."""

    root: Path
    run: TinyRun
    student: Path  # to start from
    teachers: Path  # a recipe for co-finetuning
    coded: Path  # a cache in trellis codes

    def scenario(
        self, place: str, stage: str, *overrides: str, world: int = 2, at: dict[str, str] | None = None
    ) -> tuple[Path, Scenario]:
        """The run directory, and the command in it."""
        words = [str(self.teachers if stage == "cofinetune" else self.run.recipe_file)]
        if stage == "distill":
            cache = self.coded if "distill.method=tiny-newsrec" in overrides else self.run.cache
            words += ["--cache", str(cache)]
            overrides = (f"student.init_from={self.student}", "distill.dropout=0.0", *overrides)
        settings = [word for override in overrides for word in ("--set", override)]
        command = [stage, *words, "--output-dir", str(self.root / place), *settings]
        return self.root / place / "reviews", Scenario(command, world, at or {})


@pytest.fixture(scope="module")
def bench(tiny_run: TinyRun, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("several")
    recipe, text = tiny_run.recipe_file.with_name("without_dropout.toml"), tiny_run.recipe_file.read_text()
    models = {name: without_dropout(path, root / name) for name, path in tiny_models.items()}
    for name, path in tiny_models.items():
        text = text.replace(f'"{path}"', f'"{models[name]}"')
    recipe.write_text(text)
    coded = tiny_run.recipe("dump.dtype=trellis", "dump.bytes=4")
    dump_teachers(coded, tiny_run.teachers, root / "coded", progress=SilentProgress())
    return Bench(root, tiny_run, models["bert"], recipe, root / "coded")


def run_scenarios(scenarios: Mapping[str, tuple[Path, Scenario]]) -> dict[str, Done]:
    ended = run_all([scenario for _, scenario in scenarios.values()])
    places = [place for place, _ in scenarios.values()]
    return {name: Done(*found) for name, *found in zip(scenarios, ended, places, strict=True)}


@pytest.fixture(scope="module")
def done(bench: Bench) -> dict[str, Done]:
    """The trainings that end undisturbed, run by one interpreter."""
    scenarios = {}
    for name, overrides in EQUAL.items():
        for world in (1, WORLDS.get(name, 2)):
            given = bench.scenario(f"{name} {world}", "distill", *overrides, world=world)
            scenarios[f"{name} in {world}"] = given
    for world in (1, 2):
        given = bench.scenario(f"cofinetune {world}", "cofinetune", *TEACHERS, world=world)
        scenarios[f"cofinetune in {world}"] = given
    counting = {"0": "count:2", "1": "count:2"}
    scenarios["cofinetune apart"] = bench.scenario("cofinetune apart", "cofinetune", *APART, at=counting)
    return run_scenarios(scenarios)


@pytest.fixture(scope="module")
def disturbed(bench: Bench) -> dict[str, Done]:
    """The trainings that do not, run by another one."""

    def distilled(place: str, world: int = 2, **at: str) -> tuple[Path, Scenario]:
        ranks = {rank.removeprefix("rank"): point for rank, point in at.items()}
        return bench.scenario(place, "distill", *EQUAL["mt-bert"], world=world, at=ranks)

    def cofinetuned(place: str, *more: str, world: int = 2, at: dict[str, str] | None = None) -> tuple[Path, Scenario]:
        return bench.scenario(place, "cofinetune", *APART, *more, world=world, at=at)

    return run_scenarios(
        {
            "killed": distilled("other number", rank1="kill:5"),
            "killed alone": distilled("other number", world=1, rank0="kill:5"),
            "continued": distilled("other number"),
            "cofinetune killed": bench.scenario("cofinetune killed", "cofinetune", at={"0": "kill:3"}),
            "error in 0": distilled("error 0", rank0="raise:4"),
            "error in 1": distilled("error 1", rank1="raise:4"),
            "interrupt of 1": distilled("interrupt 1", rank1="interrupt:5"),
            "interrupt of all": distilled("interrupt all", rank0="interrupt:5", rank1="interrupt:5"),
            "over the batch": bench.scenario("batch", "distill", "distill.method=rkd"),
            "too few rows": bench.scenario("rows", "distill", "distill.batch_size=1"),
            "run": bench.scenario("run", "run"),
            "apart, killed in a write": cofinetuned("moved", at={"0": "write:6"}),
            "apart, killed in three": cofinetuned("moved", world=3, at={"2": "kill:5"}),
            "apart, killed alone": cofinetuned("moved", world=1, at={"0": "kill:5"}),
            "apart, continued": cofinetuned("moved"),
            "apart, error in 1": cofinetuned("apart error", at={"1": "raise:2"}),
            "apart, not finite": cofinetuned("not finite", "teachers.xlm.learning_rate=1e30"),
            "apart, too many": cofinetuned("too many", world=4),
            "apart, folds": cofinetuned("folds", "cofinetune.folds=2"),
        }
    )


def without_dropout(model: Path, copy: Path) -> Path:
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    changed = {key: 0.0 for key in config if "dropout" in key and isinstance(config[key], float)}
    (copy / "config.json").write_text(json.dumps(config | changed))
    return copy


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def assert_close(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (key, expected)
        else:
            assert found[key] == value, (key, expected)


@pytest.mark.parametrize("name", EQUAL)
def test_several_processes_train_the_student_of_one(done: dict[str, Done], name: str) -> None:
    """Every term of every step, the scores after each epoch, the weights and the results."""
    world = WORLDS.get(name, 2)
    one, two = done[f"{name} in 1"], done[f"{name} in {world}"]
    assert (one.codes, two.codes) == ([0], [0] * world)
    assert two.ended[1].out + two.ended[1].err == ""  # only the first process says anything
    assert two.ended[0].out.splitlines()[0].startswith("model ")
    expected, found = metrics(one.root), metrics(two.root)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 2e-4)
    ours, theirs = (load_file(each.root / "student" / "model.safetensors") for each in (two, one))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    results = [json.loads((each.root / "results.json").read_text()) for each in (two, one)]
    assert results[0]["processes"] == world
    assert "processes" not in results[1]
    for key in ("best_epoch", "truncated", "layer_map", "settings"):
        assert results[0][key] == results[1][key], key
    assert results[0]["coverage"] == pytest.approx(results[1]["coverage"])
    for split, scores in results[1]["scores"].items():
        assert_close(results[0]["scores"][split], scores, 2e-4)
    assert not list((two.root / "checkpoints").glob("distill*"))


def test_two_processes_train_the_teachers_of_one(done: dict[str, Done]) -> None:
    one, several = done["cofinetune in 1"], done["cofinetune in 2"]
    assert (one.codes, several.codes) == ([0], [0, 0])
    assert several.ended[1].out + several.ended[1].err == ""
    assert_same_teachers(several, one)


def assert_same_teachers(found: Done, one: Done) -> None:
    for ours, theirs in zip(metrics(found.root), metrics(one.root), strict=True):
        assert_close(ours, theirs, 2e-4)
    files = sorted(path.relative_to(one.root) for path in (one.root / "teachers").rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(found.root) for path in (found.root / "teachers").rglob("*") if path.is_file()
    )
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 6  # three teachers, the adapters of two, and the shared head
    for file in weights:
        torch.testing.assert_close(load_file(found.root / file), load_file(one.root / file), rtol=1e-4, atol=5e-5)
    ours, theirs = (json.loads((each.root / "teachers" / "teachers.json").read_text()) for each in (found, one))
    assert list(ours["teachers"]) == list(theirs["teachers"])
    assert ours["training"]["identity"] == theirs["training"]["identity"]
    assert ours["training"]["best_epoch"] == theirs["training"]["best_epoch"]
    for name, record in theirs["teachers"].items():
        assert_close(ours["teachers"][name].pop("scores"), record.pop("scores"), 2e-4)
        assert {key: ours["teachers"][name][key] for key in record if key != "fingerprints"} == {
            key: record[key] for key in record if key != "fingerprints"
        }
    assert not (found.root / "checkpoints" / "cofinetune" / "joint").exists()


def test_processes_with_their_own_teachers_train_those_of_one(done: dict[str, Done]) -> None:
    """And have parameters of their own teachers and the shared head alone."""
    one, apart = done["cofinetune in 1"], done["cofinetune apart"]
    assert apart.codes == [0, 0]
    assert apart.ended[1].err == ""
    assert_same_teachers(apart, one)
    said = [line for line in apart.ended[0].err.splitlines() if "whole batches" in line]
    assert said == ["whole batches for each teacher: process 0 has roberta; process 1 has bert, xlm"]
    directory = apart.root / "teachers"
    head = sum(tensor.numel() for tensor in load_file(directory / "shared_head.safetensors").values())
    own = {name: parameters_on_disk(directory, name) - head for name in ("bert", "roberta", "xlm")}
    expected = [own["roberta"] + head, own["bert"] + own["xlm"] + head]
    for ended, count in zip(apart.ended, expected, strict=True):
        assert f"parameters: {count}" in ended.out.splitlines()


def test_teachers_held_apart_continue_anywhere(done: dict[str, Done], disturbed: dict[str, Done]) -> None:
    """Killed in the write of a checkpoint, killed in three, killed alone with all teachers, ended in two."""
    assert disturbed["apart, killed in a write"].codes == [-signal.SIGKILL, 1]
    assert disturbed["apart, killed in three"].codes == [1, 1, -signal.SIGKILL]
    assert disturbed["apart, killed alone"].codes == [-signal.SIGKILL]
    resumed = ["resumed at step 3", "resumed at step 6", "resumed at step 9"]
    for line, name in zip(resumed, ("killed in three", "killed alone", "continued"), strict=True):
        assert line in disturbed[f"apart, {name}"].ended[0].err
    assert disturbed["apart, continued"].codes == [0, 0]
    assert_same_teachers(disturbed["apart, continued"], done["cofinetune in 1"])


def test_what_goes_wrong_with_one_teacher_ends_all_with_one_message(disturbed: dict[str, Done]) -> None:
    assert disturbed["apart, error in 1"].codes == [1, 1]
    assert disturbed["apart, error in 1"].errors == ["error: unexpected: ValueError: no luck"]
    assert disturbed["apart, not finite"].codes == [1, 1]
    (line,) = disturbed["apart, not finite"].errors
    assert "training is not finite at step 2 (epoch 1): ce.xlm = nan" in line


def test_a_training_continues_with_another_number(done: dict[str, Done], disturbed: dict[str, Done]) -> None:
    """Killed in two, killed in one, ended in two: the student of an undisturbed training."""
    assert disturbed["killed"].codes == [1, -signal.SIGKILL]
    assert disturbed["killed"].errors == ["error: another process of this training ended without a message"]
    assert disturbed["killed alone"].codes == [-signal.SIGKILL]
    assert "the number of processes is 1 now, and was 2 when the checkpoint" in disturbed["killed alone"].ended[0].err
    assert "resumed at step 3" in disturbed["killed alone"].ended[0].err
    assert disturbed["continued"].codes == [0, 0]
    assert "the number of processes is 2 now, and was 1 when the checkpoint" in disturbed["continued"].ended[0].err
    assert "resumed at step 6" in disturbed["continued"].ended[0].err
    whole = done["mt-bert in 2"]
    for ours, theirs in zip(metrics(disturbed["continued"].root), metrics(whole.root), strict=True):
        assert_close(ours, theirs, 2e-4)
    ours, theirs = (load_file(each.root / "student" / "model.safetensors") for each in (disturbed["continued"], whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    found, expected = (json.loads((each.root / "results.json").read_text()) for each in (disturbed["continued"], whole))
    assert (found["coverage"], found["truncated"]) == (expected["coverage"], expected["truncated"])


def test_the_first_process_killed_ends_the_others(disturbed: dict[str, Done]) -> None:
    """It holds the store of the group here, as where no agent of torchrun holds it."""
    assert disturbed["cofinetune killed"].codes == [-signal.SIGKILL, 1]
    assert disturbed["cofinetune killed"].errors == ["error: another process of this training ended without a message"]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all_with_its_message(disturbed: dict[str, Done], rank: int) -> None:
    found = disturbed[f"error in {rank}"]
    assert found.codes == [1, 1]
    assert found.errors == ["error: unexpected: ValueError: no luck"]
    assert "no luck" in found.ended[rank].err
    assert "error" not in found.ended[1 - rank].err
    assert found.ended[1].out + found.ended[0].out == ""


@pytest.mark.parametrize("who", ["1", "all"])
def test_an_interrupt_ends_all_with_one_message(disturbed: dict[str, Done], who: str) -> None:
    found = disturbed[f"interrupt of {who}"]
    assert found.codes == [130, 130]
    assert found.errors == ["error: interrupted"]
    assert sum("as many processes as you like" in ended.err for ended in found.ended) == 1
    (checkpoint,) = (found.root / "checkpoints" / "distill").glob("step-*")
    assert len(checkpoints.load(checkpoint)["rest"]["processes"]) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("over the batch", "compares the rows of a batch with each other, and the training was started in 2 processes"),
        ("too few rows", "a batch of 1 rows cannot be shared by process"),
        ("run", "kdcache run runs in one process; it was started in 2"),
        ("apart, too many", "cofinetune.placement is 'teacher', and there are 4 processes for 3 teachers to train"),
        ("apart, folds", "cofinetune.folds is 2, and folds are trained in one process; there are 2"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_once(disturbed: dict[str, Done], name: str, said: str) -> None:
    found = disturbed[name]
    assert set(found.codes) == {2}
    (line,) = found.errors
    assert said in line
    assert not (found.root / "student").exists()
    assert not (found.root / "teachers").exists()
