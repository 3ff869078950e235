"""What the loop takes from a recipe, what it tells, and which epoch it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.errors import LockedError, MismatchError, NonFiniteError, RecipeError
from kdcache.files import use_disk
from kdcache.locks import exclusive
from kdcache.progress import SilentProgress
from kdcache.recipe import DistillSection
from kdcache.testing.faults import UnsyncedDisk
from kdcache.training import checkpoints
from kdcache.training.device import check_precision, default_device, make_accelerator
from kdcache.training.loop import Outcome, train
from kdcache.training.metrics_log import MetricsLog
from kdcache.training.settings import LoopSettings
from tests.training.test_loop import Regression

SETTINGS = LoopSettings(epochs=3, learning_rate=0.05, checkpoint_steps=2, log_steps=2, seed=3)
NAN = float("nan")


@pytest.fixture(autouse=True)
def _fast_disk() -> object:
    with use_disk(UnsyncedDisk()):
        yield


class Told(SilentProgress):
    """What a bar would show."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.notes: list[str] = []

    def start(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        self.calls.append(("start", title, total, unit, done))

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:  # noqa: ARG002
        self.calls.append(("advance", count, *values))

    def note(self, message: str) -> None:
        self.notes.append(message)

    def finish(self) -> None:
        self.calls.append(("finish",))


class Keeping(Regression):
    """With the metrics of the epochs that were kept; a score of None is absent."""

    def __init__(self, *scores: float | None, **options: Any) -> None:
        super().__init__(**options)
        self.said, self.metrics = scores, list[tuple[int, dict[str, float]]]()

    def evaluate(self, epoch: int) -> dict[str, float]:
        score = self.said[epoch]
        return {"validation": float(epoch)} | ({} if score is None else {"score": score})

    def keep_best(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.metrics.append((epoch, dict(metrics)))


def run(
    trainee: Regression, place: Path, told: Told | None = None, settings: LoopSettings = SETTINGS
) -> tuple[Outcome, list[Any]]:
    lines: list[Any] = []
    outcome = train(trainee, settings, checkpoints=place, progress=told or SilentProgress(), on_metrics=lines.append)
    return outcome, lines


def test_settings_are_those_of_the_section() -> None:
    given = {
        "epochs": 7, "learning_rate": 0.25, "warmup": 0.375, "weight_decay": 0.125, "max_grad_norm": 2.5,
        "precision": "bf16",
        "checkpoint_steps": 11, "checkpoint_minutes": 2.5, "seed": 13,
    }  # fmt: skip
    section = DistillSection.model_validate(given)
    settings = LoopSettings.from_section(section, {"data": "a"})
    assert {name: value for name, value in vars(settings).items() if name in given} == given
    assert settings.identity == {"data": "a"}
    assert settings.newer_keys == frozenset()
    assert LoopSettings.from_section(section, {"data": "a"}, ["data"]).newer_keys == frozenset({"data"})


def test_the_identity_names_all_that_the_weights_depend_on_and_nothing_else() -> None:
    known = SETTINGS.full_identity(5)
    free = (
        "checkpoint_steps",
        "checkpoint_minutes",
        "write_in_thread",
        "identity",
        "newer_keys",
        "lr_by_prefix",
        "decay_by_prefix",
        "read_steps",
        "tf32",
        "fused_adamw",
        "compile",
    )  # fmt: skip; the last three belong to ``identity`` where they are given
    assert replace(SETTINGS, decay_by_prefix=True).full_identity(5) == known  # each stage always gives the same
    settings = {name for name in vars(SETTINGS) if name not in free}
    assert known.keys() == settings | {"steps_per_epoch", "own_rates"}  # the name that checkpoints of 0.1.0 have
    assert known["steps_per_epoch"] == 5
    other = LoopSettings(epochs=3, learning_rate=0.05, identity={"data": "a", "model": "b"}).full_identity(5)
    assert other.items() >= {"data": "a", "model": "b", "epochs": 3, "learning_rate": 0.05}.items()


@pytest.mark.parametrize(
    ("scores", "kept", "notes"),
    [
        ((0.5, 0.9, 0.7), [0, 1], [", score 0.5000 (best so far: epoch 1)", ", score 0.9000 (best so far: epoch 2)",
                                   ", score 0.7000 (best so far: epoch 2)"]),
        ((0.5, 0.5, 0.4), [0], [", score 0.5000 (best so far: epoch 1)"] * 1 + [", score 0.5000 (best so far: epoch 1)",
                                                                              ", score 0.4000 (best so far: epoch 1)"]),
        ((-2.0, -1.0, -3.0), [0, 1], None),
        ((None, None, None), [0, 1, 2], ["", "", ""]),
        ((NAN, 0.1, 0.2), [0, 1, 2], None),
        ((0.5, NAN, 0.1), [0, 1, 2], None),
        ((float("-inf"), float("-inf"), 0.0), [0, 2], None),
    ],
)  # fmt: skip
def test_the_best_epoch_is_kept_with_its_metrics(
    scores: tuple[float | None, ...], kept: list[int], notes: list[str] | None, tmp_path: Path
) -> None:
    trainee, told = Keeping(*scores), Told()
    outcome, lines = run(trainee, tmp_path, told)
    assert [epoch for epoch, _ in trainee.metrics] == kept
    assert outcome == Outcome(best_epoch=kept[-1], steps=15, best_mark=kept[-1], best_score=outcome.best_score)
    epochs = [line for line in lines if line["event"] == "epoch"]
    assert [(line["epoch"], line["step"], line["validation"]) for line in epochs] == [
        (1, 5, 0.0),
        (2, 10, 1.0),
        (3, 15, 2.0),
    ]
    for epoch, metrics in trainee.metrics:
        assert metrics["validation"] == epoch and ("score" in metrics) == (scores[epoch] is not None)
    if notes is not None:
        assert told.notes == [f"epoch {epoch + 1} of 3 done{note}" for epoch, note in enumerate(notes)]


def test_progress_and_lines_go_on_where_the_training_stopped(tmp_path: Path) -> None:
    first, second = Told(), Told()
    with pytest.raises(KeyboardInterrupt):
        run(Regression(die_at=8), tmp_path, first)
    _, lines = run(Regression(), tmp_path, second)
    assert first.calls == [("start", "train", 15, "steps", 0), *[("advance", 1, "loss")] * 8]
    assert second.calls == [("start", "train", 15, "steps", 8), *[("advance", 1, "loss")] * 7, ("finish",)]
    assert second.notes[0] == "resumed at step 8 (epoch 2)"
    assert lines[0] == {"event": "start", "step": 8, "epoch": 2}
    steps = [line for line in lines if line["event"] == "steps"]
    assert [(line["step"], line["epoch"], line["steps"]) for line in steps] == [
        (9, 2, 2),
        (10, 2, 1),
        (12, 3, 2),
        (14, 3, 2),
        (15, 3, 1),
    ]


def test_a_line_holds_the_means_of_its_steps(tmp_path: Path) -> None:
    """Against a line for each step; the learning rate is that of the last one."""
    _, coarse = run(Regression(), tmp_path / "coarse", settings=replace(SETTINGS, log_steps=3))
    _, fine = run(Regression(), tmp_path / "fine", settings=replace(SETTINGS, log_steps=1))
    single = {line["step"]: line for line in fine if line["event"] == "steps"}
    assert sorted(single) == list(range(1, 16))
    done = 0
    for line in (line for line in coarse if line["event"] == "steps"):
        mine = [single[step] for step in range(done + 1, line["step"] + 1)]
        assert line["steps"] == len(mine)
        for name in ("loss", "squares", "one", "grad_norm"):
            assert line[name] == pytest.approx(sum(one[name] for one in mine) / len(mine))
        assert line["one"] == pytest.approx(1.0)  # as the task gives it
        assert line["squares"] < line["loss"] < 1.02 * line["squares"]
        assert line["learning_rate"] == mine[-1]["learning_rate"]
        done = line["step"]
    assert done == 15


def test_terms_that_have_a_gradient_are_logged_as_numbers(tmp_path: Path) -> None:
    class Attached(Regression):
        def losses(self, batch: Any) -> Any:
            for loss, parts in super().losses(batch):
                yield loss, {**parts, "attached": loss}

    _, lines = run(Attached(micro=2), tmp_path)
    steps = [line for line in lines if line["event"] == "steps"]
    assert [line["attached"] for line in steps] == pytest.approx([line["loss"] for line in steps])


def test_the_bar_shows_the_loss_of_each_step(tmp_path: Path) -> None:
    class Losses(SilentProgress):
        def __init__(self) -> None:
            self.shown: list[float] = []

        def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:  # noqa: ARG002
            self.shown += [values["loss"]] if count else []

    bar, lines = Losses(), list[Any]()
    train(Regression(), replace(SETTINGS, log_steps=1), checkpoints=tmp_path, progress=bar, on_metrics=lines.append)
    assert bar.shown == [line["loss"] for line in lines if line["event"] == "steps"]


def test_checkpoints_are_written_within_epochs_and_once_at_their_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[int, int]] = []
    save = checkpoints.save

    def recorded(directory: Path, state: Any, *, step: int, identity: Any) -> None:
        saved.append((step, state["rest"]["place"]["step_in_epoch"]))
        save(directory, state, step=step, identity=identity)

    monkeypatch.setattr(checkpoints, "save", recorded)
    run(Regression(), tmp_path)
    assert saved == [(2, 2), (4, 4), (5, 0), (6, 1), (8, 3), (10, 0), (12, 2), (14, 4), (15, 0)]


def test_a_second_training_in_one_place_is_refused(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / ".lock", busy=lambda: "another process is training"),
        pytest.raises(LockedError, match="another process is training in "),
    ):
        run(Regression(), tmp_path)


def test_a_trainee_with_too_few_batches_is_told_so(tmp_path: Path) -> None:
    class Short(Regression):
        def batches(self, epoch: int, first_step: int) -> Any:
            return list(super().batches(epoch, first_step))[:-1]

    with pytest.raises(RuntimeError, match=r"^the task gave 4 batches, not 5$"):
        run(Short(), tmp_path)


def test_every_term_that_is_not_finite_is_named_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(Regression(poison_at=6), tmp_path)
    assert caught.value.message == "training is not finite at step 7 (epoch 2): squares = nan"
    assert caught.value.hint == "Lower learning_rate, raise warmup, or use precision bf16 or float32 instead of fp16."


@pytest.mark.parametrize(
    ("loss", "terms", "named"),
    [
        (NAN, {"squares": 1.0}, "loss = nan"),
        (1.0, {"squares": NAN, "fine": 2.0, "other": float("inf")}, "squares = nan, other = inf"),
        (NAN, {"squares": NAN}, "squares = nan"),
    ],
)
def test_what_is_not_finite_is_named(loss: float, terms: dict[str, float], named: str, tmp_path: Path) -> None:
    class Poisoned(Regression):
        def losses(self, batch: Any) -> Any:
            for found, _ in super().losses(batch):
                yield found * loss, terms

    with pytest.raises(NonFiniteError) as caught:
        run(Poisoned(), tmp_path)
    assert caught.value.message == f"training is not finite at step 1 (epoch 1): {named}"


def test_a_parameter_that_a_step_does_not_use_stays_as_it_is(tmp_path: Path) -> None:
    """Neither weight decay nor the moments of earlier steps move it."""

    class Seldom(Regression):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.model.register_parameter("seldom", torch.nn.Parameter(torch.ones(2, 2)))
            self.values: list[float] = []

        def losses(self, batch: Any) -> Any:
            seldom = self.model.get_parameter("seldom")
            self.values.append(float(seldom.detach().sum()))
            for loss, parts in super().losses(batch):
                yield loss + (seldom.square().sum() if self.seen == 1 else 0.0), parts

    task = Seldom()
    run(task, tmp_path)
    assert task.values[0] == 4.0
    assert set(task.values[1:]) == {task.values[1]} != {4.0}


@pytest.mark.parametrize(("there", "name"), [(True, "cuda"), (False, "cpu")])
def test_models_run_on_cuda_where_it_is(there: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert default_device() == torch.device(name)


def test_a_training_of_other_length_does_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Regression(die_at=7), tmp_path)
    with pytest.raises(MismatchError, match="steps_per_epoch: 5 then, 4 now"):
        run(Regression(steps_per_epoch=4), tmp_path)


def test_a_checkpoint_may_lack_a_newer_key_and_no_other(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Regression(die_at=7), tmp_path)
    more = replace(SETTINGS, identity={"data": "a"})
    with pytest.raises(MismatchError, match='data: null then, "a" now'):
        run(Regression(), tmp_path, settings=more)
    with pytest.raises(MismatchError, match='data: null then, "a" now'):
        run(Regression(), tmp_path, settings=replace(more, newer_keys=frozenset({"model"})))
    resumed = Regression()
    run(resumed, tmp_path, settings=replace(more, newer_keys=frozenset({"data"})))
    assert resumed.seen == 9  # from the checkpoint at step 6


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero_over_all_epochs(tmp_path: Path) -> None:
    _, lines = run(Regression(), tmp_path, settings=replace(SETTINGS, log_steps=1, warmup=0.2))
    found = [line["learning_rate"] for line in lines if line["event"] == "steps"]
    rising = [0.05 * step / 4 for step in (1, 2, 3)]  # a fifth of 15 steps
    falling = [0.05 * left / 12 for left in range(12, 0, -1)]
    assert found == pytest.approx(rising + falling, rel=1e-12)


def test_parameters_with_a_rate_of_their_own_learn_at_it(tmp_path: Path) -> None:
    trainee = Regression()
    before = {name: parameter.detach().clone() for name, parameter in trainee.model.named_parameters()}
    run(trainee, tmp_path, settings=replace(SETTINGS, lr_by_prefix={"0.": 1e-9}))
    moved = {
        name: float((parameter.detach() - before[name]).abs().max())
        for name, parameter in trainee.model.named_parameters()
    }
    assert max(moved["0.weight"], moved["0.bias"]) < 1e-6 < 1e-2 < min(moved["2.weight"], moved["2.bias"])


def test_processes_that_did_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError) as caught:
        make_accelerator("float32")
    assert caught.value.message == "this command runs in one process; it was started in 2"
    assert "torchrun" in caught.value.hint


def test_an_accelerator_refuses_a_precision_that_its_device_lacks() -> None:
    with pytest.raises(RecipeError, match="'fp16' needs a GPU"):
        make_accelerator("fp16")


def test_a_precision_that_the_device_lacks_is_refused_with_others() -> None:
    with pytest.raises(RecipeError) as caught:
        check_precision("fp16", torch.device("cpu"))
    assert caught.value.message == "precision 'fp16' needs a GPU; this machine trains on the CPU"
    assert caught.value.hint == "Use float32, or bf16."


@pytest.mark.parametrize("precision", ["float32", "bf16", "float32"])
def test_each_training_has_its_own_precision(precision: str) -> None:
    mixed = {"float32": "no", "bf16": "bf16"}[precision]
    assert make_accelerator(precision).mixed_precision == mixed


def test_lines_of_steps_become_durable_with_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", "toy")
    log({"event": "steps", "step": 1, "epoch": 1})
    monkeypatch.setattr("os.fsync", synced.append)
    for step in range(2, 40):
        log({"event": "steps", "step": step, "epoch": 1})
    assert not synced
    log({"event": "checkpoint", "step": 39, "epoch": 1})
    assert len(synced) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 39
