"""Bad input, one row each.

The exit code, what the message names, what the hint offers. Nothing is lost by any of them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache import files
from kdcache.cache.opening import hold_lock
from kdcache.cache.reader import open_cache
from kdcache.errors import LockedError
from kdcache.methods.registry import method_names
from kdcache.testing.architectures import ARCHITECTURES
from kdcache.testing.custom_model import make_custom_model
from kdcache.testing.faults import failing_disk
from kdcache.testing.tiny import make_model
from tests.cli.commands import Said, kdcache
from tests.cli.conftest import FinishedRun

TRAIN = "sentence\tlabel\n" + "".join(f"film number {row} is fine\t{row % 2}\n" for row in range(24))

NAMED = "sentence\tlabel\n" + "".join(f"film number {row} is fine\t{('bad', 'good')[row % 2]}\n" for row in range(24))


def _write(text: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "bad.tsv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


RECIPES = [
    pytest.param("", "there is no recipe", "pipelines ls", id="no recipe"),
    pytest.param("name = ", "TOML", "", id="not TOML"),
    pytest.param(
        'name = "x"\n[data]\ntrain = "t"\ntext = ["s"]\nlabel = "l"\nmaxlength = 3\n',
        "maxlength",
        "max_length",
        id="unknown key",
    ),
    pytest.param('name = "x"\n', "data", "", id="missing section"),
    pytest.param(
        'name = "x"\n[data]\ntrain = "t"\ntext = ["s"]\nlabel = "l"\nmax_length = "long"\n',
        "data.max_length",
        "",
        id="wrong type",
    ),
]


@pytest.mark.parametrize(("text", "named", "cure"), RECIPES)
def test_recipes(text: str, named: str, cure: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    if text:
        recipe.write_text(text)
    check(kdcache("pipelines", "validate", recipe), 2, named, cure)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("distill.epochs", "section.key=value"),
        ("distill.epoch=3", "distill.epoch"),
        ("teachers.nobody.model=x", "nobody"),
    ],
)
def test_overrides(setting: str, named: str, review_recipe: Path) -> None:
    check(kdcache("pipelines", "validate", review_recipe, "--set", setting), 2, named)


DATA = [
    pytest.param(None, (), "there is no data file", "", id="missing file"),
    pytest.param(_write("text\tlabel\na\t0\n"), (), "'text', 'label'", "", id="wrong text column"),
    pytest.param(_write("sentence\tclass\na\t0\n"), (), "'sentence', 'class'", "", id="wrong label column"),
    pytest.param(
        _write("sentence\tlabel\n \t1\n\t0\n"), (), "no text in any row of 'sentence'", "data.text", id="no text at all"
    ),
    pytest.param(_write(TRAIN.encode() + b"caf\xe9\t1\n"), (), "bad.tsv", "", id="not UTF-8"),
    pytest.param(_write(TRAIN + "one\ttwo\tthree\n"), (), "26", "", id="too many fields"),
    pytest.param(_write(TRAIN + "a film\t3.8\n"), (), "column 'label': 3.8 is no class", "data.labels", id="score"),
    pytest.param(
        _write(TRAIN + "a film\t-1\n"), (), "column 'label': the label -1", "data.labels", id="label that is withheld"
    ),
    pytest.param(_write(TRAIN + "a film\t0|1\n"), (), "'0|1' is several labels", "data.labels", id="several labels"),
    pytest.param(
        _write(NAMED), (), "dev.tsv, line 2, column 'label': the label is", "data.labels", id="names and numbers"
    ),
    pytest.param(
        _write(NAMED + "a film\t0\n"),
        (),
        "bad.tsv, line 26, column 'label': the label is '0'",
        "data.labels",
        id="both in a file",
    ),
    pytest.param(_write(TRAIN), ('data.labels=["0", "2"]',), "'1'", "", id="label that is not in data.labels"),
]


@pytest.mark.parametrize(("make", "settings", "named", "cure"), DATA)
def test_data_files(
    make: Callable[[Path], Path] | None,
    settings: tuple[str, ...],
    named: str,
    cure: str,
    review_recipe: Path,
    tmp_path: Path,
) -> None:
    path = make(tmp_path) if make else tmp_path / "nothing.tsv"
    flags = [word for setting in (f"data.train={path}", *settings) for word in ("--set", setting)]
    check(kdcache("cofinetune", review_recipe, "--output-dir", tmp_path, *flags), 2, named, cure)


def test_rows_without_text_stop_nothing_and_are_counted(review_recipe: Path, tmp_path: Path) -> None:
    folder = review_recipe.parent
    files = {"train": "train", "validation": "dev", "test": "test"}
    for key, name in files.items():
        (tmp_path / f"{key}.tsv").write_text((folder / f"{name}.tsv").read_text() + " \t1\n\t0\n")
    (tmp_path / "more.tsv").write_text("sentence\n\u2003\nthe film is good\n")
    flags = [word for key in files for word in ("--set", f"data.{key}={tmp_path / f'{key}.tsv'}")]
    flags += ["--set", f'data.transfer=["{tmp_path / "more.tsv"}"]', "--set", "distill.method=kd"]
    said = kdcache("run", review_recipe, "--output-dir", tmp_path, *flags)
    assert said.code == 0, said.err
    assert "train: 2 rows have no text and are left out" in said.err
    assert "test: 2 rows without text are left out." in said.out
    results = kdcache("report", tmp_path / "reviews", "--json").document["results"]
    assert results["empty_rows"] == {"train": 2, "validation": 2, "test": 2}
    assert results["rows"]["test"] == 32
    found = kdcache("evaluate", tmp_path / "reviews" / "student", "--data", tmp_path / "test.tsv", "--json").document
    assert (found["rows"], found["left_out"]) == (32, 2)
    assert found["accuracy"] == results["scores"]["test"]["accuracy"]


def test_a_label_that_training_never_saw(review_recipe: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.tsv"
    test.write_text("sentence\tlabel\na new film\tmaybe\n")
    check(kdcache("cofinetune", review_recipe, "--output-dir", tmp_path, "--set", f"data.test={test}"), 2, "maybe")


COMMANDS = [
    pytest.param(
        "cofinetune", ("--set", "teachers.bert.model=/nowhere/bert"), 1, "/nowhere/bert", id="no such teacher"
    ),
    pytest.param("cofinetune", ("--add", "nobody"), 2, "nobody", id="add a teacher that the recipe lacks"),
    pytest.param("cofinetune", ("--set", "teachers=[]"), 2, "no teachers", id="no teachers"),
    pytest.param("dump-teachers", ("--set", "dump.layers=[9]"), 1, "9", id="layer that does not exist"),
    pytest.param(
        "dump-teachers", ("--set", "dump.dim=64", "--cache", "new"), 1, "64", id="more dimensions than the teacher has"
    ),
    pytest.param("dump-teachers", ("--teachers", "nowhere"), 1, "nowhere", id="no teachers directory"),
    pytest.param("dump-teachers", ("--set", "data.max_length=4"), 4, "max_length", id="stale max_length"),
    pytest.param("distill", ("--cache", "nowhere"), 2, "nowhere", id="no such cache"),
    pytest.param("distill", ("--replace", "--set", "student.layers=9"), 1, "9", id="student deeper than its source"),
    pytest.param("distill", ("--replace", "--set", "distill.method=magic"), 2, "mt-bert", id="unknown method"),
    pytest.param(
        "distill", ("--replace", "--set", 'distill.teachers=["nobody"]'), 4, "nobody", id="teacher that the cache lacks"
    ),
    pytest.param("distill", ("--replace", "--set", 'data.labels=["1","0"]'), 4, "labels", id="another label set"),
    pytest.param(
        "distill", ("--replace", "--set", 'student.init_from="teacher:nobody"'), 2, "nobody", id="student of no teacher"
    ),
]


@pytest.mark.parametrize(("command", "arguments", "code", "named"), COMMANDS)
def test_commands(
    command: str,
    arguments: tuple[str, ...],
    code: int,
    named: str,
    copied: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    identity = open_cache(copied.root / "cache").identity
    check(copied.call(command, *arguments), code, named)
    assert open_cache(copied.root / "cache").identity == identity


STUDENTS = [
    pytest.param("BART", (), "encoder-decoder", "Choose an encoder", id="BART"),
    pytest.param("T5", (), "encoder-decoder", "Choose an encoder", id="T5"),
    pytest.param("Funnel", (), "change their length", "Choose an encoder", id="Funnel"),
    pytest.param("ALBERT", (), "share weights", "student.layers", id="layers of ALBERT"),
    pytest.param("GPT-2", ("student.layers=7",), "has 3", "at most 3", id="more layers than a decoder has"),
    pytest.param(
        "Llama",
        ("student.head=shared", "cofinetune.pooling=cls"),
        "first token",
        "pooling",
        id="first token of a decoder",
    ),
    pytest.param("custom", (), "Python code of its own", "trust_remote_code = true", id="code of its own"),
]


@pytest.mark.parametrize(("name", "settings", "named", "cure"), STUDENTS)
def test_models_that_cannot_be_students(
    name: str, settings: tuple[str, ...], named: str, cure: str, review_recipe: Path, tmp_path: Path
) -> None:
    """Said by the run before its first teacher is trained."""
    if name == "custom":
        model = make_custom_model(tmp_path / "model")
    else:
        model = ARCHITECTURES[name].save(tmp_path / "model", "classifier" if name == "Funnel" else "base")
    flags = [word for setting in (f"student.init_from={model}", *settings) for word in ("--set", setting)]
    check(kdcache("run", review_recipe, "--output-dir", tmp_path / "runs", *flags), 1, named, cure)
    assert not list((tmp_path / "runs").rglob("*"))


def test_a_saved_student_with_code_of_its_own(tmp_path: Path) -> None:
    data = tmp_path / "data.tsv"
    data.write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    model = make_custom_model(tmp_path / "model", classifier=True)
    arguments = ("evaluate", model, "--data", data, "--text", "sentence", "--label", "label")
    check(kdcache(*arguments), 1, "Python code of its own", "--trust-remote-code")
    assert kdcache(*arguments, "--trust-remote-code").code == 0


PATHS = [
    pytest.param(("evaluate", "nowhere", "--data", "x.tsv"), "nowhere", id="no model"),
    pytest.param(("report", "nowhere"), "results.json", id="no run"),
    pytest.param(("cache", "info", "nowhere"), "nowhere", id="no cache"),
    pytest.param(("cache", "verify", "nowhere"), "nowhere", id="no cache to verify"),
]


@pytest.mark.parametrize(("arguments", "named"), PATHS)
def test_paths(arguments: tuple[str, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(kdcache(*arguments), 2, named)


def test_evaluate_names_the_columns_there_are(finished: FinishedRun, tmp_path: Path) -> None:
    data = tmp_path / "data.tsv"
    data.write_text("review\tstars\ngood\t1\n")
    check(kdcache("evaluate", finished.root / "student", "--data", data), 2, "'review', 'stars'")
    check(kdcache("evaluate", finished.root / "student", "--data", data, "--text", "review"), 2, "label")


def test_evaluate_names_the_positions_there_are(finished: FinishedRun, tmp_path: Path) -> None:
    data = tmp_path / "data.tsv"
    data.write_text("sentence\tlabel\n" + "good " * 600 + "\t1\n")
    arguments = ("evaluate", finished.root / "student", "--data", data, "--max-length")
    check(kdcache(*arguments, 600), 1, "max_length is 600", "--max-length to at most 80")


def test_an_output_directory_that_is_a_file(review_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check(kdcache("cofinetune", review_recipe, "--output-dir", tmp_path / "file"), 1, "run directory", "--output-dir")


@pytest.mark.parametrize("command", ["distill", "run"])
@pytest.mark.parametrize("there", [True, False], ids=["a finished run", "no run"])
def test_a_method_that_there_is_not(command: str, there: bool, finished: FinishedRun, tmp_path: Path) -> None:
    """It is named before anything else is compared with it, and before anything is trained for it."""
    runs = finished.runs if there else tmp_path
    said = kdcache(command, finished.recipe, "--output-dir", runs, "--set", "distill.method=mtbert")
    assert said.code == 2
    assert f"no distillation method 'mtbert'; there are: {', '.join(method_names())}" in said.err
    assert "Did you mean distill.method = 'mt-bert'?" in said.err
    assert not list(tmp_path.iterdir())


def test_texts_that_the_cache_lacks(copied: FinishedRun, tmp_path: Path) -> None:
    train = tmp_path / "train.tsv"
    train.write_text((copied.recipe.parent / "train.tsv").read_text() + "a text of tomorrow\t1\n")
    change = ("--replace", "--set", f"data.train={train}")
    check(copied.call("distill", *change), 4, "lacks 1 of", "dump-teachers")
    skipped = copied.call("distill", *change, "--set", "distill.missing=skip", "--json")
    assert (skipped.code, skipped.document["skipped_rows"]) == (0, 1)


def test_teachers_with_other_weights(copied: FinishedRun) -> None:
    from safetensors.torch import load_file, save_file

    path = copied.root / "teachers" / "bert" / "model.safetensors"
    weights = load_file(path)
    weights["embeddings.LayerNorm.weight"] += 0.01
    save_file(weights, path, metadata={"format": "pt"})
    check(copied.call("dump-teachers"), 4, "weights")
    check(copied.call("distill", "--replace"), 4, "weights")


def test_a_teacher_whose_output_is_not_finite(review_recipe: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model(tmp_path / "broken", "bert", classes=2)
    weights = load_file(model / "model.safetensors")
    weights["bert.encoder.layer.2.output.LayerNorm.bias"][0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    recipe = tmp_path / "broken.toml"
    head, _, rest = review_recipe.read_text().partition("[[teachers]]")
    _, _, rest = rest.partition("[cofinetune]")
    folder = review_recipe.parent
    text = f'{head}[[teachers]]\nname = "broken"\nmodel = "{model}"\nhead = "own"\n[cofinetune]{rest}'
    for name in ("train", "dev", "test", "more"):
        text = text.replace(f'"{name}.tsv"', f'"{folder / name}.tsv"')
    recipe.write_text(text.replace("teacher:bert", "teacher:broken"))
    runs = ("--output-dir", tmp_path / "runs")
    first = kdcache("cofinetune", recipe, *runs)
    if first.code == 0:  # scored and registered; the dump refuses it
        first = kdcache("dump-teachers", recipe, *runs)
    check(first, 1, "broken")


MODELS = [
    pytest.param("BART", "own", {}, (), "encoder-decoder", "encoder or a decoder", id="BART, own head"),
    pytest.param("BART", "shared", {}, (), "encoder-decoder", "BERT", id="BART, shared head"),
    pytest.param("T5", "own", {}, (), "encoder-decoder", 'head = "shared"', id="T5, own head"),
    pytest.param("Funnel", "own", {}, (), "shorten the text", "BERT", id="Funnel, own head"),
    pytest.param("Funnel", "shared", {}, (), "shorten the text", "BERT", id="Funnel, shared head"),
    pytest.param(
        "BERT",
        "own",
        {"problem_type": "multi_label_classification"},
        (),
        "multi_label_classification",
        "single-label",
        id="multi-label",
    ),
    pytest.param("BERT", "own", {"problem_type": "regression"}, (), "regression", "single-label", id="regression"),
    pytest.param("BERT", "own", {"classes": 1}, (), "one output", "single-label", id="one output"),
    pytest.param(
        "Qwen2",
        "shared",
        {},
        ("cofinetune.pooling=cls",),
        "causal decoder",
        'cofinetune.pooling = "last"',
        id="decoder, first token",
    ),
]


@pytest.mark.parametrize(("architecture", "head", "changes", "settings", "named", "cure"), MODELS)
def test_models_that_cannot_teach(
    architecture: str,
    head: str,
    changes: dict[str, Any],
    settings: tuple[str, ...],
    named: str,
    cure: str,
    review_recipe: Path,
    tmp_path: Path,
) -> None:
    model = ARCHITECTURES[architecture].save(tmp_path / "model", "classifier" if head == "own" else "base", **changes)
    asked = (f"teachers.roberta.model={model}", f"teachers.roberta.head={head}", *settings)
    flags = [word for setting in asked for word in ("--set", setting)]
    said = kdcache("cofinetune", review_recipe, "--output-dir", tmp_path / "runs", *flags)
    check(said, 1, named, cure)
    assert "epoch" not in said.err  # nothing was trained before it was known
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_a_full_disk_loses_nothing(copied: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = open_cache(copied.root / "cache").identity
    cache = copied.runs / "cache-2"
    with monkeypatch.context() as patch:
        patch.setattr(files, "disk", failing_disk(40, errno.ENOSPC))
        check(copied.call("dump-teachers", "--cache", cache), 1, "full", "same command again")
    assert not (cache / "manifest.json").exists()
    again = copied.call("dump-teachers", "--cache", cache, "--json")
    assert (again.code, again.document["identity"]) == (0, identity)


def test_a_cache_that_another_process_writes(copied: FinishedRun) -> None:
    with hold_lock(copied.root / "cache"):
        check(copied.call("dump-teachers"), LockedError.exit_code, "cache")


def check(said: Said, code: int, named: str, cure: str = "") -> None:
    """One error line that names the thing, a hint, nothing on stdout, no traceback."""
    assert said.code == code, said.err
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said.err
    assert named in errors[0]
    assert not errors[0].startswith("error: unexpected")
    if cure:
        assert any(cure in line for line in said.err.splitlines() if line.startswith("hint: ")), said.err
    assert said.out == ""
    assert "Traceback" not in said.err
