"""Killed at any moment, the same command ends with the weights of an undisturbed run (CPU, float32)."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.distill import stage
from kdcache.distill.stage import DistillResult, distill
from kdcache.dump.stage import dump_teachers
from kdcache.errors import DamageError, MismatchError
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe
from kdcache.testing.tiny import wordpiece_tokenizer
from kdcache.training import checkpoints
from tests.conftest import TinyRun

OVERRIDES = [
    "distill.epochs=2",
    "distill.checkpoint_steps=3",
]  # 16 steps; a checkpoint in the middle of each epoch, and at its end
DRIVER = Path(__file__).with_name("killed.py")


@pytest.fixture(scope="module")
def undisturbed(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    root = tmp_path_factory.mktemp("undisturbed")
    return distill(tiny_run.recipe(*OVERRIDES), tiny_run.cache, root, progress=SilentProgress())


@dataclass(frozen=True)
class Attempts:
    """A run directory, and how each process that worked on it ended."""

    root: Path
    statuses: list[int]


@pytest.fixture(scope="module")
def killed(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Attempts]:
    """Every attempt of every test, made by one process that imports torch only once."""
    rng = random.Random(3)
    points = {
        "steps": [
            *(f"step:{rng.randint(2, 5)}" for _ in range(5)),
            "end",
        ],  # some get past a checkpoint, some start over
        "saves": ["save:1", "saved:1", "save:2", "saved:2", "save:3", "end"],  # of checkpoints and of the best epoch
        "disk": [*(f"disk:{rng.randint(3, 60)}" for _ in range(4)), "end"],
        "half": ["step:5"],
    }
    roots = {name: tmp_path_factory.mktemp(name) for name in points}
    attempts = json.dumps({str(roots[name]): found for name, found in points.items()})
    command = [
        sys.executable,
        str(DRIVER),
        str(tiny_run.recipe_file),
        str(tiny_run.cache),
        json.dumps(OVERRIDES),
        attempts,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=DRIVER.parent.parent.parent)
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    return {name: Attempts(root, statuses[str(root)]) for name, root in roots.items()}


def assert_same(root: Path, undisturbed: DistillResult) -> None:
    found, expected = (load_file(student / "model.safetensors") for student in (root / "student", undisturbed.student))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    results = json.loads((root / "results.json").read_text())
    assert results["scores"] == undisturbed.results["scores"]
    assert results["best_epoch"] == undisturbed.results["best_epoch"]
    assert metrics(root) == metrics(undisturbed.student.parent)


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def test_killed_at_five_random_steps(killed: dict[str, Attempts], undisturbed: DistillResult) -> None:
    assert killed["steps"].statuses == [signal.SIGKILL] * 5 + [0]
    assert_same(killed["steps"].root, undisturbed)


def test_killed_around_checkpoint_writes(killed: dict[str, Attempts], undisturbed: DistillResult) -> None:
    assert killed["saves"].statuses == [signal.SIGKILL] * 5 + [0]
    assert_same(killed["saves"].root, undisturbed)


def test_killed_at_system_steps_of_writing(killed: dict[str, Attempts], undisturbed: DistillResult) -> None:
    assert set(killed["disk"].statuses[:-1]) <= {signal.SIGKILL, 0}
    assert killed["disk"].statuses[-1] == 0
    found, expected = (
        load_file(place / "student" / "model.safetensors")
        for place in (killed["disk"].root, undisturbed.student.parent)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_training_does_not_go_on_from_here(tiny_run: TinyRun, killed: dict[str, Attempts]) -> None:
    root = killed["half"].root
    with pytest.raises(MismatchError, match=r"distill\.temperature: 1\.0 then, 2\.0 now") as caught:
        distill(tiny_run.recipe(*OVERRIDES, "distill.temperature=2.0"), tiny_run.cache, root, progress=SilentProgress())
    assert caught.value.exit_code == 4
    (state,) = (root / "checkpoints" / "distill").glob("step-*/model.pt")
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(DamageError, match=r"model\.pt"):
        distill(tiny_run.recipe(*OVERRIDES), tiny_run.cache, root, progress=SilentProgress())


def test_killed_while_checkpoints_of_a_finished_run_are_removed(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a checkpoint must not be taken for damage by the same command."""
    remove = shutil.rmtree

    def half(directory: Path, **options: Any) -> None:
        if any(Path(directory).rglob("checkpoint.json")):
            next(Path(directory).rglob("*.pt")).unlink()
            raise KeyboardInterrupt
        remove(directory, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", half)
        distill(tiny_run.recipe("distill.epochs=1"), tiny_run.cache, tmp_path, progress=SilentProgress())
    distill(tiny_run.recipe("distill.epochs=1"), tiny_run.cache, tmp_path, progress=SilentProgress())
    assert not list((tmp_path / "checkpoints").glob("*distill*"))


class Interrupting(SilentProgress):
    """Ctrl-C after so many optimizer steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:  # noqa: ARG002
        self.left -= 1 if "loss" in values else 0
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("targets", ["cache", "live"])
def test_what_a_killed_training_had_read_is_in_its_results(
    tiny_run: TinyRun, tmp_path: Path, targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a checkpoint in the epoch, then between the last checkpoint and the saved student."""
    recipe = tiny_run.recipe("distill.epochs=1", "distill.checkpoint_steps=3", "student.max_length=7")
    live = tiny_run.teachers if targets == "live" else None

    def run(name: str, progress: SilentProgress) -> Any:
        found = distill(recipe, tiny_run.cache, tmp_path / name, live_teachers=live, progress=progress).results
        return found["coverage"], found["truncated"]["student"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("killed", Interrupting(5))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "_save", killed)
        run("killed", SilentProgress())
    coverage, truncated = whole = run("whole", SilentProgress())
    assert run("killed", SilentProgress()) == whole
    assert coverage.keys() == {"bert", "roberta", "xlm"} and 0 < truncated["train"] < 1


# What a checkpoint of kdcache 0.1.0 says of its training besides the keys of [distill].
OLD_KEYS = {
    "epochs", "learning_rate", "warmup", "weight_decay", "max_grad_norm", "precision", "log_steps", "seed",
    "own_rates", "steps_per_epoch", "initial weights", "data", "text columns",
    "max_length", "cache", "targets", "teachers", "layers",
}  # fmt: skip


@dataclass(frozen=True)
class Begun:
    """A training of a student with a config and a tokenizer of its own, stopped after its first checkpoint."""

    run: TinyRun
    root: Path
    tokenizer: Path
    caches: dict[str, Path]

    def recipe(self, *overrides: str) -> Recipe:
        config = 'student={config={model_type="bert",hidden_size=16,num_hidden_layers=2,num_attention_heads=2'
        config += ",intermediate_size=32"
        config += f',max_position_embeddings=80}},tokenizer="{self.tokenizer}"}}'
        return self.run.recipe(*OVERRIDES, config, *overrides)

    def go_on(self, root: Path, *overrides: str, cache: str = "made") -> DistillResult:
        return distill(self.recipe(*overrides), self.caches[cache], root, progress=SilentProgress())

    def copy(self, tmp_path: Path, *, old: bool = False) -> Path:
        """The run directory at another place; ``old``: with a checkpoint that says what one of 0.1.0 would say."""
        root = Path(shutil.copytree(self.root, tmp_path / "copy"))
        (record,) = (root / "checkpoints" / "distill").glob("step-*/checkpoint.json")
        document = json.loads(record.read_text())
        if old:
            identity = document["identity"]
            document["identity"] = {
                key: identity[key] for key in identity if key in OLD_KEYS or key.startswith("distill.")
            }
            assert document["identity"].keys() >= OLD_KEYS
            state = checkpoints.load(record.parent)
            del state["rest"]["counts"]
            shutil.rmtree(record.parent)
            checkpoints.save(record.parent.parent, state, step=document["step"], identity=document["identity"])
        return root


@pytest.fixture(scope="module")
def begun(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    place = tmp_path_factory.mktemp("begun")
    wordpiece_tokenizer().save_pretrained(place / "tokenizer")
    half = dump_teachers(
        tiny_run.recipe("dump.dtype=float16"), tiny_run.teachers, place / "half", progress=SilentProgress()
    )
    caches = {"made": tiny_run.cache, "half": half.cache}
    found = Begun(tiny_run, place / "run", place / "tokenizer", caches)
    with pytest.raises(KeyboardInterrupt):
        distill(found.recipe(), tiny_run.cache, found.root, progress=Interrupting(5))
    return found


def uncased(directory: Path) -> None:
    """Another tokenizer of the same size: it no longer lowers the case of the text."""
    path = directory / "tokenizer.json"
    document = json.loads(path.read_text())
    document["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(document))


def without_types(directory: Path) -> None:
    """The tokenizer no longer gives token types."""
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]}))


def with_one_label_changed(begun: Begun, tmp_path: Path) -> str:
    text = Path(begun.recipe().data.train).read_text()
    head, row, rest = text.split("\n", 2)
    changed = tmp_path / "train.tsv"
    changed.write_text("\n".join([head, row[:-1] + str(1 - int(row[-1])), rest]))
    return f'data.train="{changed}"'


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ('student.config.hidden_act="relu"', r"student\.config\.hidden_act: (null|\"gelu\") then, \"relu\" now"),
        (
            "student.config.attention_probs_dropout_prob=0.3",
            r"student\.config\.attention_probs_dropout_prob: .* 0\.3 now",
        ),
        ("student.config.layer_norm_eps=0.1", r"student\.config\.layer_norm_eps: .* 0\.1 now"),
        ("distill.precision=bf16", r"distill\.precision: \"float32\" then, \"bf16\" now; precision: .*"),
        ("distill.window=1", r"distill\.window: 2 then, 1 now"),
        ("distill.select_by=loss", r"distill\.select_by: \"accuracy\" then, \"loss\" now"),
    ],
)
def test_another_setting_does_not_go_on_from_here(begun: Begun, tmp_path: Path, override: str, named: str) -> None:
    root = begun.copy(tmp_path)
    with pytest.raises(MismatchError, match=f"belongs to another training: {named}$"):
        begun.go_on(root, override)


@pytest.mark.parametrize(
    ("what", "old"),
    [*((what, False) for what in ("data", "cache", "tokenizer", "token types")), ("data", True), ("cache", True)],
)
def test_other_inputs_do_not_go_on_from_here(begun: Begun, tmp_path: Path, what: str, old: bool) -> None:
    """Each of them alone: nothing else that a checkpoint knows gives the change away."""
    root = begun.copy(tmp_path, old=old)
    if what in ("tokenizer", "token types"):
        tokenizer = Path(shutil.copytree(begun.tokenizer, tmp_path / "tokenizer"))
        (uncased if what == "tokenizer" else without_types)(tokenizer)
        overrides, cache = [f'student.tokenizer="{tokenizer}"'], "made"
    else:
        overrides = [with_one_label_changed(begun, tmp_path)] if what == "data" else []
        cache = "half" if what == "cache" else "made"
    named = {"tokenizer": r"student\.tokenizer", "token types": r"student\.token_types"}.get(what, what)
    with pytest.raises(MismatchError, match=rf"belongs to another training: {named}: \S+ then, \S+ now$"):
        begun.go_on(root, *overrides, cache=cache)


def test_a_checkpoint_of_the_first_version_goes_on(begun: Begun, tmp_path: Path) -> None:
    old, new = begun.go_on(begun.copy(tmp_path, old=True)), begun.go_on(tmp_path / "whole")
    found, expected = (load_file(result.student / "model.safetensors") for result in (old, new))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    root = begun.copy(tmp_path / "again", old=True)
    with pytest.raises(MismatchError, match=r"another training: distill\.temperature: 1\.0 then, 2\.0 now$"):
        begun.go_on(root, "distill.temperature=2.0")
