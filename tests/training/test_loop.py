"""The loop: accumulation, exact resume in the middle of an epoch, refusals, the log."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache import files
from kdcache.errors import DamageError, MismatchError, NonFiniteError, RecipeError, StorageError
from kdcache.progress import SilentProgress
from kdcache.recipe import CofinetuneSection
from kdcache.training import checkpoints, device, loop
from kdcache.training.device import check_precision, make_accelerator
from kdcache.training.loop import Outcome, micro_batches, train
from kdcache.training.metrics_log import MetricsLog
from kdcache.training.settings import LoopSettings, check_evaluation

SETTINGS = LoopSettings(epochs=3, learning_rate=0.05, checkpoint_steps=2, log_steps=2, seed=3, identity={"data": "a"})


@dataclass
class Regression:
    """A network with dropout on fixed data; dies at an optimizer step if told to. All three generators are used."""

    die_at: int = -1
    micro: int = 1
    poison_at: int = -1
    scores: tuple[float, ...] = (0.5, 0.9, 0.7)
    steps_per_epoch: int = 5
    dropout: float = 0.5
    kept: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    seen: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(self.dropout), nn.Linear(8, 1))
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(20, 4, generator=generator)
        self.targets = self.inputs.sum(dim=1, keepdim=True)

    def batches(self, epoch: int, first_step: int) -> Iterator[Any]:
        order = np.random.default_rng(epoch).permutation(20)
        for step in range(first_step, self.steps_per_epoch):
            if self.die_at == epoch * self.steps_per_epoch + step:
                raise KeyboardInterrupt
            yield order[step * 4 : step * 4 + 4]

    def losses(self, batch: Any) -> Iterator[tuple[Tensor, Mapping[str, float | Tensor]]]:
        self.seen += 1
        device = next(self.model.parameters()).device
        inputs, targets = self.inputs.to(device), self.targets.to(device)
        jitter = random.random() + float(np.random.rand())
        for part in micro_batches(len(batch), self.micro):
            rows = batch[part]
            error = ((self.model(inputs[rows]) - targets[rows]) ** 2).mean() * (len(rows) / len(batch))
            poison = torch.nan if self.seen - 1 == self.poison_at else 1.0
            yield error * (1 + 0.01 * jitter) * poison, {"squares": error.detach() * poison, "one": 1.0 / self.micro}

    def evaluate(self, epoch: int) -> dict[str, float]:
        assert not self.model.training
        return {"score": self.scores[epoch], "validation": 1.0}

    def keep_best(self, epoch: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        self.kept.append(epoch)

    def settle_best(self, epoch: int) -> None:
        self.settled.append(epoch)


def run(task: Regression, directory: Path, settings: LoopSettings = SETTINGS) -> Outcome:
    log = MetricsLog(directory / "metrics.jsonl", "toy")
    return train(task, settings, checkpoints=directory / "checkpoints", progress=SilentProgress(), on_metrics=log)


def weights(task: Regression) -> bytes:
    return b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in task.model.parameters())


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    task = Regression()
    assert run(task, directory) == Outcome(best_epoch=1, steps=15, best_mark=1, best_score=0.9)
    assert task.kept == [0, 1]
    assert task.settled == [0, 1, 1]
    return weights(task), lines(directory)


@pytest.mark.parametrize("die_at", range(15))
def test_resume_is_bit_equal_wherever_it_stopped(
    die_at: int, undisturbed: tuple[bytes, list[dict[str, Any]]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Regression(die_at=die_at), tmp_path)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    resumed = Regression()
    assert run(resumed, tmp_path) == Outcome(best_epoch=1, steps=15, best_mark=1, best_score=0.9)
    assert weights(resumed) == undisturbed[0]
    assert lines(tmp_path) == undisturbed[1]  # no line doubled, none lost, the means of the log the same


@pytest.mark.parametrize("read_steps", [3, 100])
@pytest.mark.parametrize("die_at", [4, 7, 13])
def test_losses_that_are_read_later_are_the_same_and_no_checkpoint_is_ahead_of_them(
    die_at: int, read_steps: int, undisturbed: tuple[bytes, list[dict[str, Any]]], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, read_steps=read_steps)
    with pytest.raises(KeyboardInterrupt):
        run(Regression(die_at=die_at), tmp_path, settings)
    resumed = Regression()
    run(resumed, tmp_path, settings)
    assert weights(resumed) == undisturbed[0]
    assert lines(tmp_path) == undisturbed[1]
    poisoned = tmp_path / "poisoned"
    with pytest.raises(NonFiniteError, match=r"step 4 \(epoch 1\): squares = nan"):
        run(Regression(poison_at=3), poisoned, settings)
    assert [path.name for path in (poisoned / "checkpoints").glob("step-*")] == ["step-00000002"]


LONG = replace(SETTINGS, schedule="cosine", evaluate_steps=2, ema=0.6, checkpoint_steps=3)


@dataclass
class Held(Regression):
    """Scored by its own weights, on rows held out; keeps the best weights in memory as a directory would."""

    best: dict[int, bytes] = field(default_factory=dict)
    scored: list[float] = field(default_factory=list)

    def evaluate(self, epoch: int) -> dict[str, float]:  # noqa: ARG002
        assert not self.model.training
        device = next(self.model.parameters()).device
        error = ((self.model(self.inputs[:8].to(device)) - self.targets[:8].to(device)) ** 2).mean()
        self.scored.append(float(error))
        return {"score": -float(error)}

    def keep_best(self, mark: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        self.best[mark] = weights(self)

    def settle_best(self, mark: int) -> None:
        assert mark in self.best or not self.best
        self.best = {own: kept for own, kept in self.best.items() if own == mark}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Held, Outcome, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("long")
    task = Held()
    return task, run(task, directory, LONG), lines(directory)


@pytest.mark.parametrize("die_at", range(15))
def test_evaluations_within_epochs_and_averages_resume_exactly(
    die_at: int, long_run: tuple[Held, Outcome, list[dict[str, Any]]], tmp_path: Path
) -> None:
    whole, outcome, logged = long_run
    killed = Held(die_at=die_at)
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path, LONG)
    resumed = Held(best=killed.best)
    assert run(resumed, tmp_path, LONG) == outcome
    assert weights(resumed) == weights(whole)
    assert resumed.best == whole.best
    assert lines(tmp_path) == logged
    events = [(line["event"], line["step"]) for line in logged if line["event"] != "steps"]
    assert events == [
        *(("evaluation", 2), ("evaluation", 4), ("epoch", 5), ("evaluation", 6), ("evaluation", 8), ("epoch", 10)),
        *(("evaluation", 12), ("evaluation", 14), ("epoch", 15)),
    ]


def test_the_best_weights_are_averaged_ones_by_any_evaluation(
    long_run: tuple[Held, Outcome, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Averages of a plain loop over the weights after each step, which the average must not change."""
    trail: list[np.ndarray] = []

    class Watched(Held):
        def losses(self, batch: Any) -> Iterator[tuple[Tensor, Mapping[str, float | Tensor]]]:
            trail.append(np.frombuffer(weights(self), np.float32))
            yield from super().losses(batch)

    raw = Watched()
    run(raw, tmp_path, replace(LONG, ema=None, evaluate_steps=None))
    trail.append(np.frombuffer(weights(raw), np.float32))
    average, averages = trail[0], []
    for step, now in enumerate(trail[1:], start=1):
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * now
        averages.append(average)
    whole, outcome, _ = long_run
    np.testing.assert_allclose(np.frombuffer(weights(whole), np.float32), averages[-1], atol=1e-5)
    (mark,) = whole.best
    assert mark == outcome.best_mark
    np.testing.assert_allclose(np.frombuffer(whole.best[mark], np.float32), averages[mark], atol=1e-5)
    assert outcome.best_score == -min(whole.scored)


@pytest.mark.parametrize(("patience", "steps", "best"), [(1, 10, 0), (2, 25, 2), (3, 30, 5)])
def test_it_stops_after_evaluations_without_a_better_score(
    patience: int, steps: int, best: int, tmp_path: Path
) -> None:
    scores = (0.5, 0.4, 0.6, 0.55, 0.5, 0.9)
    settings = replace(SETTINGS, epochs=6, patience=patience)
    outcome = run(Regression(scores=scores), tmp_path, settings)
    assert (outcome.steps, outcome.best_epoch, outcome.stopped) == (steps, best, steps < 30)
    again = Regression(scores=scores)
    assert run(again, tmp_path, settings) == outcome
    assert again.seen == 0, "a training that stopped goes on as little as one that ended"


def test_it_stops_within_an_epoch_and_stays_stopped(tmp_path: Path) -> None:
    class Falling(Held):
        def evaluate(self, epoch: int) -> dict[str, float]:
            super().evaluate(epoch)
            return {"score": -float(len(self.scored))}

    settings = replace(LONG, evaluate_steps=1, patience=2)
    task = Falling()
    outcome = run(task, tmp_path, settings)
    assert (outcome.steps, outcome.best_epoch, outcome.best_mark, outcome.stopped) == (3, 0, 0, True)
    assert list(task.best) == [0]
    again = Falling(best=task.best)
    assert run(again, tmp_path, settings) == outcome
    assert (again.seen, weights(again)) == (0, weights(task))


def test_validation_rows_are_needed_to_stop_by_them() -> None:
    section = CofinetuneSection(patience=2)
    check_evaluation(section, "cofinetune", validation=True)
    with pytest.raises(RecipeError, match=r"cofinetune\.patience = 2 needs labelled validation rows"):
        check_evaluation(section, "cofinetune", validation=False)


@pytest.mark.parametrize("changed", [{"schedule": "cosine"}, {"patience": 3}, {"evaluate_steps": 2}, {"ema": 0.5}])
def test_the_newer_settings_are_compared_with_a_checkpoint_of_0_1_0(changed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Regression(die_at=7), tmp_path)
    (record,) = (tmp_path / "checkpoints").glob("*/checkpoint.json")
    document = json.loads(record.read_text())
    for key in ("schedule", "patience", "evaluate_steps", "ema"):
        assert document["identity"].pop(key) is None
    record.write_text(json.dumps(document))
    (key,) = changed
    with pytest.raises(MismatchError, match=f"{key}: null then"):
        run(Regression(), tmp_path, replace(SETTINGS, **changed))
    assert run(Regression(), tmp_path).steps == 15


def test_a_finished_training_is_not_run_again(undisturbed: tuple[bytes, list[dict[str, Any]]], tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    again = Regression()
    assert run(again, tmp_path).best_epoch == 1
    assert again.seen == 0
    assert weights(again) == undisturbed[0]
    assert lines(tmp_path) == undisturbed[1]


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    outcomes = []
    for micro in (1, 3):
        task = Regression(micro=micro, dropout=0.0)
        run(task, tmp_path / str(micro))
        outcomes.append(torch.cat([parameter.detach().cpu().flatten() for parameter in task.model.parameters()]))
    torch.testing.assert_close(*outcomes)
    one, three = (lines(tmp_path / name) for name in ("1", "3"))
    assert [line.keys() for line in one] == [line.keys() for line in three]
    assert one[0]["squares"] == pytest.approx(three[0]["squares"])
    assert one[0]["one"] == pytest.approx(three[0]["one"])


def test_lines_say_what_a_step_was_made_of(undisturbed: tuple[bytes, list[dict[str, Any]]]) -> None:
    steps = [line for line in undisturbed[1] if line["event"] == "steps"]
    epochs = [line for line in undisturbed[1] if line["event"] == "epoch"]
    assert [line["step"] for line in steps] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert {"stage", "loss", "squares", "grad_norm", "learning_rate", "epoch"} <= steps[0].keys()
    assert [(line["epoch"], line["score"]) for line in epochs] == [(1, 0.5), (2, 0.9), (3, 0.7)]


def test_without_a_score_the_last_epoch_is_kept(tmp_path: Path) -> None:
    task = Regression(scores=(float("nan"),) * 3)
    assert run(task, tmp_path).best_epoch == 2
    assert task.kept == [0, 1, 2]


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Regression(die_at=7), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MismatchError, match=r"data: \"a\" then, \"b\" now") as caught:
        run(Regression(), tmp_path, replace(SETTINGS, identity={"data": "b"}))
    assert "start again" in caught.value.hint
    with pytest.raises(MismatchError, match=r"learning_rate: 0\.05 then, 0\.1 now"):
        run(Regression(), tmp_path, replace(SETTINGS, learning_rate=0.1))
    assert sorted(tmp_path.rglob("*")) == before
    run(Regression(), tmp_path, replace(SETTINGS, checkpoint_steps=3))  # how often they are written is free


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "rest.pt", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_named(name: str, damage: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Regression(die_at=7), tmp_path)
    (path,) = (tmp_path / "checkpoints").glob(f"*/{name}")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x80
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.raises(DamageError, match=name):
        run(Regression(), tmp_path)


def test_a_loss_that_is_not_finite_names_step_and_term(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 4 \(epoch 1\): squares = nan"):
        run(Regression(poison_at=3), tmp_path)
    resumed = Regression()
    run(resumed, tmp_path)  # the checkpoint before it is still good
    assert resumed.seen == 13


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path) -> None:
    task = Regression()
    calls = 0

    def poison(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gradient * torch.inf if calls == 3 else gradient

    next(task.model.parameters()).register_hook(poison)
    with pytest.raises(NonFiniteError, match=r"step 3 \(epoch 1\): gradient norm = (inf|nan)"):
        run(task, tmp_path)
    assert all(torch.isfinite(parameter).all() for parameter in task.model.parameters())


@contextlib.contextmanager
def gradients_as_applied() -> Iterator[list[Tensor]]:
    """All gradients in a row, at every step of any optimizer, as the optimizer gets them."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        seen.append(
            torch.cat([parameter.grad.flatten().clone() for parameter in parameters if parameter.grad is not None])
        )

    hook = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("micro", [1, 2])
def test_the_gradient_that_is_applied_is_no_longer_than_allowed(micro: int, tmp_path: Path) -> None:
    """The whole gradient of a step is shortened, all micro-batches and parameters together, and keeps its direction."""
    one_step = replace(SETTINGS, epochs=1, log_steps=1)
    applied: dict[float, Tensor] = {}
    for limit in (1e9, 0.25):
        with gradients_as_applied() as seen:
            run(
                Regression(micro=micro, steps_per_epoch=1),
                tmp_path / str(limit),
                replace(one_step, max_grad_norm=limit),
            )
        (applied[limit],) = seen
        assert lines(tmp_path / str(limit))[0]["grad_norm"] == pytest.approx(
            float(applied[1e9].norm())
        )  # before the cut
    assert float(applied[1e9].norm()) > 0.25
    assert float(applied[0.25].norm()) == pytest.approx(0.25, rel=1e-4)
    torch.testing.assert_close(applied[0.25] / applied[0.25].norm(), applied[1e9] / applied[1e9].norm())


def test_the_scale_of_losses_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16's gradient scaler finds its scale by trial.

    A resumed training that started again at the first one would skip steps.
    """
    made: list[Any] = []

    def scaled(precision: str) -> Any:
        accelerator = make_accelerator(precision)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)
        made.append(accelerator)
        return accelerator

    monkeypatch.setattr("kdcache.training.loop.make_accelerator", scaled)
    run(Regression(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Regression(die_at=8), tmp_path / "resumed")
    run(Regression(), tmp_path / "resumed")
    whole, _, resumed = (accelerator.scaler.state_dict() for accelerator in made)
    assert whole["scale"] == 2.0 * 2**5  # 15 steps, none of them skipped
    assert resumed == whole


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(RecipeError, match="fp16"):
        check_precision("fp16", torch.device("cpu"))
    check_precision("fp16", torch.device("cuda"))
    check_precision("bf16", torch.device("cpu"))


def test_bf16_trains(tmp_path: Path) -> None:
    task = Regression()
    run(task, tmp_path, replace(SETTINGS, precision="bf16"))
    assert all(parameter.dtype == torch.float32 for parameter in task.model.parameters())
    full = Regression()
    run(full, tmp_path / "float32")  # in one process with the other precision
    assert weights(full) != weights(task)


@pytest.mark.parametrize(
    ("rows", "count", "sizes"), [(8, 4, [2, 2, 2, 2]), (3, 4, [1, 1, 1]), (7, 2, [4, 3]), (1, 1, [1])]
)
def test_micro_batches_cover_the_rows_once(rows: int, count: int, sizes: list[int]) -> None:
    parts = micro_batches(rows, count)
    assert [part.stop - part.start for part in parts] == sizes
    assert parts[0].start == 0
    assert parts[-1].stop == rows


class Beside:
    """Holds the thread that writes a checkpoint at its first durable step until ``go`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.writing = threading.Event(), threading.Event()
        save = checkpoints.save

        def held(*args: Any, **options: Any) -> Path:
            self.writing.set()
            assert self.go.wait(30)
            return save(*args, **options)

        monkeypatch.setattr(checkpoints, "save", held)


IN_THREAD = replace(SETTINGS, write_in_thread=True)


@pytest.mark.parametrize("die_at", range(15))
def test_resume_is_bit_equal_where_checkpoints_are_written_in_a_thread(
    die_at: int, undisturbed: tuple[bytes, list[dict[str, Any]]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Regression(die_at=die_at), tmp_path, IN_THREAD)
    assert sorted((tmp_path / "checkpoints").glob("step-*")) == (  # the interrupt waited for the write
        [tmp_path / "checkpoints" / f"step-{newest:08d}"] if (newest := last_checkpoint(die_at)) else []
    )
    resumed = Regression()
    run(resumed, tmp_path, IN_THREAD)
    assert weights(resumed) == undisturbed[0]
    assert lines(tmp_path) == undisturbed[1]
    assert resumed.settled[-1] == 1


def last_checkpoint(done: int) -> int:
    """The step of the newest checkpoint after ``done`` steps: every two steps, and after each epoch of five."""
    return max(step for step in range(done + 1) if step % 2 == 0 or step % 5 == 0)


def test_the_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(monkeypatch)

    class Watched(Regression):
        def losses(self, batch: Any) -> Iterator[tuple[Tensor, Mapping[str, float | Tensor]]]:
            if self.seen == 4:  # the fifth step, beside the write of the checkpoint after the third
                assert beside.writing.wait(30)
                assert not list((tmp_path / "checkpoints").glob("step-*"))
                beside.go.set()
            return super().losses(batch)

    settings = replace(IN_THREAD, checkpoint_steps=3)
    with pytest.raises(KeyboardInterrupt):
        run(Watched(die_at=5), tmp_path, settings)
    assert not checkpoints.load_step(tmp_path / "checkpoints", 5)["rest"]["place"]["step_in_epoch"]
    undisturbed, resumed = Regression(), Regression()
    run(undisturbed, tmp_path / "other", replace(settings, write_in_thread=False))
    run(resumed, tmp_path, settings)
    assert weights(resumed) == weights(undisturbed)


def test_an_error_of_the_writing_thread_stops_the_training_as_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.Disk, "fsync", full)
    raised = []
    for in_thread in (False, True):
        with pytest.raises(StorageError, match="No space left on device") as caught:
            run(task := Regression(), tmp_path / str(in_thread), replace(SETTINGS, write_in_thread=in_thread))
        raised.append((caught.value.exit_code, caught.value.hint, caught.value.message.split("'")[0]))
        assert task.seen < 5
    assert raised[0] == raised[1]


def test_products_are_in_tf32_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "default_device", lambda: torch.device("cuda"))
    before, inside = torch.get_float32_matmul_precision(), set()

    class Watched(Regression):
        def losses(self, batch: Any) -> Iterator[tuple[Tensor, Mapping[str, float | Tensor]]]:
            inside.add(torch.get_float32_matmul_precision())
            return super().losses(batch)

    run(Watched(), tmp_path, replace(SETTINGS, tf32=True))
    assert inside == {"high"} != {before}
    assert torch.get_float32_matmul_precision() == before


def test_checkpoints_are_written_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], []
    save = checkpoints.save

    def saved(*args: Any, **options: Any) -> Path:
        written.append(options["step"])
        return save(*args, **options)

    class Slow(Regression):
        def losses(self, batch: Any) -> Iterator[tuple[Tensor, Mapping[str, float | Tensor]]]:
            now[0] += 60.0
            return super().losses(batch)

    monkeypatch.setattr(checkpoints, "save", saved)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    free = replace(SETTINGS, checkpoint_steps=None)
    cases: list[tuple[LoopSettings, list[int]]] = [
        (free, [5, 10, 15]),  # each epoch; five minutes are never over before
        (replace(free, checkpoint_minutes=2), [2, 4, 5, 7, 9, 10, 12, 14, 15]),
        (replace(SETTINGS, checkpoint_minutes=3), [2, 4, 5, 6, 8, 10, 12, 14, 15]),  # whatever is due first
        (SETTINGS, [2, 4, 5, 6, 8, 10, 12, 14, 15]),
    ]
    for number, (settings, expected) in enumerate(cases):
        written.clear()
        run(Slow(), tmp_path / str(number), settings)
        assert written == expected
