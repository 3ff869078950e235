"""Run directories: what a stage depends on, and what is said when it changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kdcache.errors import DamageError, StorageError
from kdcache.recipe import load_recipe
from kdcache.runs import RunDirectory, Stage, changes, file_identity, forget, mark_finished, read_record, stage_inputs

RECIPE = """\
name = "r"
[data]
train = "train.tsv"
transfer = ["more.tsv"]
text = ["sentence"]
label = "label"
[[teachers]]
name = "bert"
model = "bert"
[student]
init_from = "bert"
layers = 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\na\t0\nb\t1\n")
    (tmp_path / "more.tsv").write_text("sentence\nc\n")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    return path


STAGES: tuple[Stage, ...] = ("teachers", "cache", "student", "baseline")


@pytest.mark.parametrize(
    ("setting", "touched"),
    [
        ("cofinetune.epochs=7", {"teachers"}),
        ("dump.dtype=float16", {"cache"}),
        ("distill.temperature=2.0", {"student"}),
        ("distill.epochs=9", {"student", "baseline"}),
        ("student.layers=1", {"cache", "student", "baseline"}),  # even layers follow the student's depth
        ("data.transfer=[]", {"cache", "student"}),
        ("data.max_length=64", set(STAGES)),
        ("data.licence=MIT", set()),
        ("distill.checkpoint_steps=7", set()),
    ],
)
def test_a_stage_depends_on_its_own_keys_alone(recipe: Path, setting: str, touched: set[str]) -> None:
    before, after = load_recipe(recipe), load_recipe(recipe, [setting])
    assert {stage for stage in STAGES if stage_inputs(before, stage) != stage_inputs(after, stage)} == touched


def test_files_count_by_content(recipe: Path, tmp_path: Path) -> None:
    before = stage_inputs(load_recipe(recipe), "teachers")
    moved = shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    assert stage_inputs(load_recipe(moved / "r.toml"), "teachers") == before
    (moved / "train.tsv").write_text("sentence\tlabel\na\t1\nb\t0\n")
    (moved / "bert" / "config.json").write_text('{"a": 1}')
    after = stage_inputs(load_recipe(moved / "r.toml"), "teachers")
    assert {key for key in after if after[key] != before[key]} == {"data.train", "teachers.bert.model/config.json"}


def test_changes_are_named_by_key(recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    now = stage_inputs(load_recipe(recipe), "teachers")
    assert changes(run, "teachers", now) is None
    mark_finished(run, "teachers", now, 1.0)
    assert changes(run, "teachers", now) == []
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nz\t0\nb\t1\n")
    later = stage_inputs(load_recipe(recipe, ["cofinetune.epochs=7", "data.seed=3"]), "teachers")
    assert changes(run, "teachers", later) == [
        "cofinetune.epochs: 3 -> 7",
        "data.seed: 0 -> 3",
        "data.train: contents differ",
    ]
    forget(run, "teachers")
    assert changes(run, "teachers", now) is None


def test_an_added_teacher_is_named(recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    mark_finished(run, "teachers", stage_inputs(load_recipe(recipe), "teachers"), 1.0)
    recipe.write_text(RECIPE.replace("[student]", '[[teachers]]\nname = "new"\nmodel = "hub/new"\n[student]'))
    lines = changes(run, "teachers", stage_inputs(load_recipe(recipe), "teachers"))
    assert lines is not None
    assert 'teachers.new.model: none -> "hub/new"' in lines


def test_what_a_record_does_not_say_of_teachers_is_no_difference(recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    plain = stage_inputs(load_recipe(recipe), "baseline")
    started, other = ({**plain, "teachers/bert": f"sha256:{digit}"} for digit in "12")
    mark_finished(run, "baseline", plain, 1.0)  # as 0.1.0 did
    assert changes(run, "baseline", started) == []
    mark_finished(run, "baseline", started, 1.0)
    assert changes(run, "baseline", plain) == []  # the teachers' files are gone
    assert changes(run, "baseline", other) == ["teachers/bert: contents differ"]


def test_what_the_stage_before_made_is_an_input(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert stage_inputs(loaded, "student", upstream="a") != stage_inputs(loaded, "student", upstream="b")


def test_file_identity(tmp_path: Path) -> None:
    assert file_identity(tmp_path / "missing") == ""
    (tmp_path / "a").write_bytes(b"")
    assert file_identity(tmp_path / "a") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    run = RunDirectory(tmp_path)
    run.record.write_text(text)
    with pytest.raises(DamageError, match=r"run\.json"):
        read_record(run)


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make the run directory"):
        RunDirectory(tmp_path / "file" / "run").create()


def test_the_baseline_is_a_run_inside_the_run(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).baseline.results == tmp_path / "baseline" / "results.json"


def test_allowing_a_model_its_own_code_makes_no_other_run(review_recipe: Path) -> None:
    """A record that 0.1.0 made knows nothing of the key; the stages that it names as finished stay finished."""
    plain = load_recipe(review_recipe)
    allowed = load_recipe(review_recipe, ["teachers.bert.trust_remote_code=true", "student.trust_remote_code=true"])
    for stage in ("teachers", "cache", "student", "baseline"):
        inputs = stage_inputs(plain, stage)
        assert not [key for key in inputs if "trust" in key]
        assert stage_inputs(allowed, stage) == inputs
