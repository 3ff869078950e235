"""Optimizer groups, schedule, generators, the metrics file, checkpoint directories."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache import files
from kdcache.errors import DamageError, MismatchError, StorageError
from kdcache.testing.faults import counting_disk, failing_disk
from kdcache.training import checkpoints
from kdcache.training.metrics_log import MetricsLog
from kdcache.training.optim import AveragedWeights, WarmupSchedule, adamw, schedule_factor
from kdcache.training.seeding import restore_rng_state, rng_state, seed_everything


def test_biases_and_norms_do_not_decay_and_the_frozen_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    model[2].requires_grad_(False)
    groups = adamw(model.named_parameters(), 0.1, 0.01).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.01), (3, 0.0)]


def test_parameters_named_apart_have_their_own_rate_and_follow_the_schedule() -> None:
    model = torch.nn.ModuleDict({"student": torch.nn.Linear(2, 3), "projections": torch.nn.Linear(3, 4, bias=False)})
    optimizer = adamw(model.named_parameters(), 0.1, 0.01, {"projections.": 1.0})
    schedule = WarmupSchedule(optimizer, 10, 0.0)
    schedule.step()
    found = {id(group["params"][0]): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found[id(model["projections"].weight)] == (pytest.approx(0.9), 0.0)
    assert found[id(model["student"].weight)] == (pytest.approx(0.09), 0.01)


def test_parameters_with_their_own_rate_decay_as_all_others_where_that_is_asked_for() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3) for name in ("a", "b")})
    groups = adamw(model.named_parameters(), 0.1, 0.01, {"b.": 1.0}, decay_by_prefix=True).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert [found[id(p)] for p in model["a"].parameters()] == [(0.1, 0.01), (0.1, 0.0)]
    assert [found[id(p)] for p in model["b"].parameters()] == [(1.0, 0.01), (1.0, 0.0)]


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [schedule_factor(step, 10, 0.2) for step in range(11)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[10] == 0.0
    assert min(factors[:10]) > 0.0  # no step is spent on nothing
    assert schedule_factor(0, 1, 0.0) == 1.0


def test_the_other_schedules_share_the_warm_up() -> None:
    """Against the formula of a cosine; constant stays at the peak."""
    for schedule in ("cosine", "constant"):
        factors = [schedule_factor(step, 10, 0.2, schedule) for step in range(11)]
        assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
        cosine = [0.5 * (1 + np.cos(np.pi * (step - 2) / 8)) for step in range(2, 11)]
        assert factors[2:] == pytest.approx(cosine if schedule == "cosine" else [1.0] * 9)


def test_averaged_weights_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average = AveragedWeights(model.named_parameters(), 0.9)
    expected = model.weight.detach().clone()
    for step in range(1, 101):
        with torch.no_grad():
            model.weight += torch.randn(2, 3)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    last = model.weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight.detach(), last)
    assert list(average.state_dict()) == ["weight"]
    other = AveragedWeights(torch.nn.Linear(3, 2).named_parameters(), 0.9)
    other.load_state_dict({"bias": torch.zeros(2), **average.state_dict()})
    torch.testing.assert_close(other.state_dict()["weight"], expected)


def test_the_schedule_resumes() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = WarmupSchedule(optimizer, 10, 0.0)
    for _ in range(4):
        schedule.step()
    other = WarmupSchedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), 10, 0.0)
    other.load_state_dict(schedule.state_dict())
    assert other.learning_rate == schedule.learning_rate == pytest.approx(0.3)


def test_all_generators_go_back_to_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))

    seed_everything(5)
    first = draw()
    checkpoints.save(tmp_path, {"rng": rng_state()}, step=1)
    following = [draw() for _ in range(3)]
    restore_rng_state((checkpoints.load_latest(tmp_path) or {})["rng"])
    assert [draw() for _ in range(3)] == following
    seed_everything(5)
    assert draw() == first


@pytest.mark.parametrize(("then", "now"), [(2, 1), (1, 2), (2, 2)])
def test_generators_of_gpus_go_back_where_others_are_visible_now(
    then: int, now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of one process uses the first GPU; how many more were visible must not matter to its resume."""
    restored: dict[int, int] = {}

    def set_rng_state(state: torch.Tensor, device: int) -> None:
        if device >= now:
            raise IndexError("tuple index out of range")  # as torch does
        restored[device] = int(state[0])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: now)
    for module in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(module, "set_rng_state", set_rng_state)
    restore_rng_state(rng_state_without_gpus() | {"cuda": [torch.tensor([10 + device]) for device in range(then)]})
    assert restored == {device: 10 + device for device in range(min(then, now))}


def rng_state_without_gpus() -> dict[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return rng_state()


def test_lines_of_other_stages_stay_and_torn_ones_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    one, two = MetricsLog(path, "one"), MetricsLog(path, "two")
    one({"event": "start", "step": 0})
    for step in (1, 2, 3):
        one({"event": "steps", "step": step, "loss": 1.0})
    two({"event": "steps", "step": 9, "loss": float("inf")})
    with path.open("a") as file:
        file.write('{"stage": "one", "st')  # killed while writing
    MetricsLog(path, "one")({"event": "start", "step": 2})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("one", 1), ("one", 2), ("two", 9)]
    assert lines[-1]["loss"] is None


def test_the_newest_checkpoint_is_the_one_and_as_many_as_wanted_stay(tmp_path: Path) -> None:
    assert checkpoints.load_latest(tmp_path / "none") is None
    for step in (2, 10, 9):
        checkpoints.save(tmp_path, {"value": step}, step=step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]
    assert checkpoints.load_latest(tmp_path) == {"value": 10}
    assert checkpoints.load_step(tmp_path, 9) == {"value": 9}
    with pytest.raises(DamageError, match="step-00000002"):
        checkpoints.load_step(tmp_path, 2)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, {"value": 1}, step=3)
    checkpoints.save(tmp_path, {"value": 2}, step=3)
    assert checkpoints.load_latest(tmp_path) == {"value": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_save_that_fails_at_any_step_leaves_the_one_before(tmp_path: Path) -> None:
    with files.use_disk(disk := counting_disk()):
        checkpoints.save(tmp_path / "count", {"value": torch.zeros(3)}, step=1)
    steps = len(disk.steps) - 4  # making the directories, and what follows the rename that publishes
    assert steps >= 4
    for at in range(1, steps):
        place = tmp_path / str(at)
        checkpoints.save(place, {"value": torch.ones(3)}, step=1)
        with files.use_disk(failing_disk(at)), pytest.raises(StorageError, match="No space left"):
            checkpoints.save(place, {"value": torch.zeros(3)}, step=2)
        found = checkpoints.load_latest(place)
        assert found is not None
        assert torch.equal(found["value"], torch.ones(3))
        checkpoints.save(place, {"value": torch.zeros(3)}, step=2)
        assert [path.name for path in place.iterdir()] == ["step-00000002"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, {"value": 1}, step=1, identity={"data": "a", "classes": ("x", "y"), "long": "z" * 99})
    assert checkpoints.load_latest(tmp_path, identity={"data": "a", "classes": ("x", "y"), "long": "z" * 99}) == {
        "value": 1
    }
    with pytest.raises(MismatchError, match=r"classes: \[.*data: \"a\" then, null now"):
        checkpoints.load_latest(tmp_path, identity={"long": "z" * 99})


def test_no_code_runs_when_a_checkpoint_is_read(tmp_path: Path) -> None:
    import hashlib
    import pickle

    place = checkpoints.save(tmp_path, {"value": 1}, step=1)
    evil = pickle.dumps(print, protocol=2)
    (place / "value.pt").write_bytes(evil)
    record = json.loads((place / "checkpoint.json").read_text())
    record["files"]["value.pt"] = {"size": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}
    (place / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(DamageError, match="cannot be decoded"):
        checkpoints.load_latest(tmp_path)
