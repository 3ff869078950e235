"""Co-finetuning that is interrupted, by Ctrl-C and by SIGKILL, leaves byte for byte what an undisturbed run leaves."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcache import files
from kdcache.errors import DamageError, LockedError, MismatchError, StorageError
from kdcache.locks import attempt
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe, dump_toml
from kdcache.teachers import cofinetune as cofinetune_stage
from kdcache.teachers.bundle import read_bundle
from kdcache.teachers.cofinetune import cofinetune
from kdcache.teachers.joint import CofinetuneTask
from kdcache.testing.faults import failing_disk

from .conftest import files_in


class Interrupting(SilentProgress):
    """Ctrl-C after so many optimizer steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:  # noqa: ARG002
        self.left -= 1 if "loss" in values else 0
        if self.left == 0:
            raise KeyboardInterrupt


def run(recipe: Recipe, root: Path, progress: SilentProgress | None = None) -> bool:
    return cofinetune(recipe, root / "teachers", root / "work", progress=progress or SilentProgress()).reused


@pytest.fixture(scope="module")
def kept() -> dict[str, bytes]:
    """What the undisturbed run of this module left."""
    return {}


@pytest.fixture
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory, kept: dict[str, bytes]) -> dict[str, bytes]:
    if not kept:
        whole = tmp_path_factory.mktemp("whole")
        run(recipe, whole)
        kept.update(files_in(whole))
        assert {"teachers/teachers.json", "work/metrics.jsonl"} <= kept.keys()
        assert not [name for name in kept if "joint" in name or ".tmp" in name]  # nothing is left behind
    return kept


@pytest.mark.parametrize("after", range(1, 7))
def test_ctrl_c_loses_nothing(after: int, recipe: Recipe, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, Interrupting(after))
    assert not (tmp_path / "teachers" / "teachers.json").exists()
    assert not run(recipe, tmp_path)
    assert files_in(tmp_path) == undisturbed
    assert run(recipe, tmp_path)  # and once more: nothing to do
    assert files_in(tmp_path) == undisturbed


def test_kill_minus_nine_loses_nothing(recipe: Recipe, tmp_path: Path) -> None:
    rng = random.Random(0)
    plans = {
        "steps": ["step:1", "step:2", "step:3", "step:2", "step:1"],
        "around checkpoints": ["save:1", "saved:1", "save:1", "saved:2", "save:2", "saved:1"],
        "moments": [f"after:{rng.uniform(0.02, 0.5):.2f}" for _ in range(5)],
        "writes of the first checkpoint": [f"disk:{number}" for number in range(1, 13)],
        "writes anywhere": [f"disk:{rng.randint(2, 30)}" for _ in range(8)],
        "writes of the teachers": ["saved:5", *(f"disk:{number}" for number in range(1, 25, 2))],
    }
    (tmp_path / "recipe.toml").write_text(dump_toml(recipe))
    script = Path(__file__).with_name("killed.py")
    points = json.dumps({name: [*plan, "end"] for name, plan in plans.items()})
    command = [sys.executable, str(script), str(tmp_path / "recipe.toml"), str(tmp_path), points]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    undisturbed = files_in(tmp_path / "whole")
    for name, statuses in json.loads(done.stdout.splitlines()[-1]).items():
        assert statuses[-1] == 0, name
        assert statuses.count(signal.SIGKILL) >= (0 if name == "moments" else 5), (
            name
        )  # it may be done before the moment comes
        assert files_in(tmp_path / name) == undisturbed, name


def test_the_best_epoch_outlives_kills_after_which_epochs_score_differently(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice between keeping a better epoch and the checkpoint that names it.

    Run again, those epochs score worse.
    """
    changed = recipe.model_copy(update={"cofinetune": recipe.cofinetune.model_copy(update={"epochs": 4})})
    evaluate, keep_best = CofinetuneTask.evaluate, CofinetuneTask.keep_best
    weights: dict[int, bytes] = {}

    def run_with(scores: dict[int, float], interrupted_at: int | None = None) -> None:
        def scored(self: CofinetuneTask, epoch: int) -> dict[str, float]:
            weights[epoch] = b"".join(tensor.numpy().tobytes() for tensor in self.model.state_dict().values())
            return {**evaluate(self, epoch), "score": scores[epoch]}

        def kept(self: CofinetuneTask, epoch: int, metrics: dict[str, float]) -> None:
            keep_best(self, epoch, metrics)
            if epoch == interrupted_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(CofinetuneTask, "evaluate", scored)
        monkeypatch.setattr(CofinetuneTask, "keep_best", kept)
        run(changed, tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run_with({0: 0.5, 1: 0.6}, interrupted_at=1)
    with pytest.raises(KeyboardInterrupt):
        run_with({1: 0.1, 2: 0.7}, interrupted_at=2)
    saved: list[bytes] = []
    save = cofinetune_stage.save_teachers
    monkeypatch.setattr(
        cofinetune_stage,
        "save_teachers",
        lambda directory, bundle, head, sources, models: (
            saved.append(
                b"".join(t.numpy().tobytes() for t in torch.nn.ModuleList(models.values()).state_dict().values())
            ),
            save(directory, bundle, head, sources, models),
        )[1],
    )
    run_with({2: 0.1, 3: 0.1})
    assert read_bundle(tmp_path / "teachers").training["best_epoch"] == 1
    assert saved == [weights[0]]


@pytest.mark.parametrize("step", [1, 9, 10, 14, 33, 58, 62, 67, 76, 78])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(
    step: int, recipe: Recipe, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    with files.use_disk(failing_disk(step)), pytest.raises(StorageError, match="No space left") as caught:
        run(recipe, tmp_path)
    assert "run the same command again" in caught.value.hint
    run(recipe, tmp_path)
    assert files_in(tmp_path) == undisturbed


def test_another_recipe_does_not_continue_it(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, Interrupting(3))
    changed = recipe.cofinetune.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(MismatchError, match=r"cofinetune\.learning_rate"):
        run(recipe.model_copy(update={"cofinetune": changed}), tmp_path)
    free = recipe.cofinetune.model_copy(update={"checkpoint_steps": 1, "trackers": ["tensorboard"]})
    run(recipe.model_copy(update={"cofinetune": free}), tmp_path)
    assert [path.name for path in (tmp_path / "work" / "tensorboard").iterdir()] == ["cofinetune"]


def test_what_the_first_version_left_goes_on(recipe: Recipe, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """0.1.0 did not record token types: a checkpoint and a bundle without them are compared on the rest."""

    def without_token_types(path: Path) -> None:
        text = path.read_text()
        kept = "\n".join(line for line in text.splitlines() if ".token_types" not in line)
        assert len(kept) < len(text) - 1
        path.write_text(kept + "\n")

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, Interrupting(3))
    (record,) = (tmp_path / "work" / "joint" / "checkpoints").glob("*/checkpoint.json")
    without_token_types(record)
    assert not run(recipe, tmp_path)
    assert files_in(tmp_path) == undisturbed
    without_token_types(tmp_path / "teachers" / "teachers.json")
    assert run(recipe, tmp_path)
    changed = recipe.cofinetune.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(MismatchError, match=r"what differs: cofinetune\.learning_rate$"):
        run(recipe.model_copy(update={"cofinetune": changed}), tmp_path)


def test_a_damaged_checkpoint_is_found(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, Interrupting(3))
    (weights,) = (tmp_path / "work" / "joint" / "checkpoints").glob("*/model.pt")
    content = bytearray(weights.read_bytes())
    content[-2000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamageError, match=r"model\.pt"):
        run(recipe, tmp_path)


def test_two_processes_do_not_write_the_same_teachers(recipe: Recipe, tmp_path: Path) -> None:
    with attempt(tmp_path / "work/.lock"), pytest.raises(LockedError, match="another process"):
        run(recipe, tmp_path)
