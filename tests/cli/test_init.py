"""``kdcache init`` on files of several kinds, in a script and in a terminal; bad input, each with one clear line."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from kdcache.data.task import load_task
from kdcache.recipe import load_recipe
from kdcache.testing.tiny import reviews
from tests.cli.commands import Said, kdcache

ROWS = reviews(120, seed=3)


def pairs(folder: Path) -> list[Path]:
    path = folder / "rte.tsv"
    lines = [f"{text}\t{other}\t{'entailment' if label else 'not'}" for (text, label), (other, _) in pairwise(ROWS)]
    path.write_text("\n".join(["sentence1\tsentence2\tlabel", *lines]))
    return [path]


def quotes(folder: Path) -> list[Path]:
    path = folder / "train.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", 'the "text", said', "sentiment"])
        table.writerows([row, f'she said "{text}",\nand left', label] for row, (text, label) in enumerate(ROWS))
    return [path]


def classes(folder: Path) -> list[Path]:
    path = folder / "intents.jsonl"
    records = ({"utterance": text, "intent": f"intent {row % 30}"} for row, (text, _) in enumerate(ROWS))
    path.write_text("\n".join(map(json.dumps, records)))
    return [path]


def parquet(folder: Path) -> list[Path]:
    import pyarrow as pa
    from pyarrow import parquet as files

    paths = [folder / "train.parquet", folder / "test.parquet"]
    for path, rows in zip(paths, (ROWS[:90], ROWS[90:]), strict=True):
        files.write_table(pa.table({"review": [text for text, _ in rows], "stars": [label for _, label in rows]}), path)
    return paths


def unlabelled(folder: Path) -> list[Path]:
    """A file without labels beside one with labels: its texts are for distillation."""
    labelled, texts = folder / "a.tsv", folder / "b.tsv"
    labelled.write_text("\n".join(["sentence\tlabel", *(f"{text}\t{label}" for text, label in ROWS[:80])]))
    texts.write_text("\n".join(["sentence", *(text for text, _ in ROWS[80:])]))
    return [labelled, texts]


KINDS: dict[Callable[[Path], list[Path]], tuple[tuple[str, ...], str, int]] = {
    pairs: (("sentence1", "sentence2"), "label", 2),
    quotes: (('the "text", said',), "sentiment", 2),
    classes: (("utterance",), "intent", 30),
    parquet: (("review",), "stars", 2),
    unlabelled: (("sentence",), "label", 2),
}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_files_of_five_kinds(make: Callable[[Path], list[Path]], tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = tmp_path / "recipes" / "mine.toml"
    given = [word for name in ("bert", "roberta") for word in ("--teacher", tiny_models[name])]
    said = kdcache("init", *make(tmp_path), *given, "--output", recipe)
    assert (said.code, said.out) == (0, f"{recipe}\n"), said.err
    assert "label column" in said.err and "estimate: on " in said.err
    assert kdcache("pipelines", "validate", recipe).code == 0
    loaded = load_recipe(recipe)
    task = load_task(loaded.data)
    text, label, count = KINDS[make]
    assert (task.text_columns, loaded.data.label, len(task.label_names)) == (text, label, count)
    assert {"train", "validation"} <= task.splits.keys()
    assert ("test" in task.splits, "transfer" in task.splits) == (make is parquet, make is unlabelled)
    assert [teacher.model for teacher in loaded.teachers] == [str(tiny_models[name]) for name in ("bert", "roberta")]
    assert loaded.student is not None
    assert (loaded.student.init_from, loaded.student.layers) == ("teacher:bert", 2)
    assert loaded.data.max_length <= 72  # what the models have room for


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_written_recipe_runs_to_its_end(
    make: Callable[[Path], list[Path]], tmp_path: Path, tiny_models: dict[str, Path], _few_texts_are_timed: None
) -> None:
    recipe = tmp_path / "mine.toml"
    given = [word for name in ("bert", "xlm") for word in ("--teacher", tiny_models[name])]
    assert kdcache("init", *make(tmp_path), *given, "--output", recipe).code == 0
    short = ("--set", "cofinetune.epochs=1", "--set", "distill.epochs=1")
    said = kdcache("run", recipe, "--output-dir", tmp_path / "runs", *short)
    assert said.code == 0, said.err
    assert "student, mt-bert" in said.out
    results = json.loads((tmp_path / "runs" / "mine" / "results.json").read_text())
    assert len(results["label_names"]) == KINDS[make][2]
    assert results["rows"]["train"] > 0
    assert ("transfer" in results["rows"]) == (make is unlabelled)
    assert "accuracy" in results["scores"]["test" if make is parquet else "validation"]
    assert (tmp_path / "runs" / "mine" / "report.html").stat().st_size < 2_000_000


def test_models_are_proposed_and_flags_are_taken(tmp_path: Path) -> None:
    (file,) = classes(tmp_path)
    given = ("--text", "utterance", "--label", "intent", "--student", "org/student", "--output", tmp_path / "x.toml")
    said = kdcache("init", "--train", file, *given, "--json")
    assert said.code == 0, said.err
    recipe = load_recipe(tmp_path / "x.toml")
    assert len({teacher.model for teacher in recipe.teachers}) == 3
    assert recipe.student is not None
    assert (recipe.student.init_from, recipe.student.layers) == ("org/student", None)
    document = json.loads(said.out)
    assert document["path"] == str(tmp_path / "x.toml")
    assert document["estimate"]["cofinetune"] > 0
    assert any("hub" in line for line in document["remarks"])


def test_a_classifier_of_these_labels_keeps_its_head(tmp_path: Path) -> None:
    (file,) = pairs(tmp_path)
    model = tmp_path / "fine-tuned"
    model.mkdir()
    config: dict[str, object] = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 80,
    }
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "NOT", "1": "entailment"}}
    (model / "config.json").write_text(json.dumps(config))
    said = kdcache("init", file, "--teacher", model, "--output", tmp_path / "x.toml")
    assert said.code == 0, said.err
    (teacher,) = load_recipe(tmp_path / "x.toml").teachers
    assert (teacher.head, teacher.learning_rate, teacher.model) == ("own", None, str(model))
    assert 'model = "./fine-tuned"' in (tmp_path / "x.toml").read_text()


class _Terminal:
    def __init__(self, answers: list[str]) -> None:
        self._answers = [f"{answer}\n" for answer in answers]

    def isatty(self) -> bool:
        return True

    def readline(self, *_: object) -> str:
        return self._answers.pop(0)


def test_a_terminal_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = quotes(tmp_path)
    monkeypatch.setattr(sys, "stdin", _Terminal([]))
    answers = {"Recipe to write": str(tmp_path / "asked.toml"), "Teachers, hub names or directories": "org/a, org/b"}
    asked: list[str] = []

    def prompt(question: str, default: object = None, **_: object) -> object:
        asked.append(question)
        return answers.get(question, default)

    def confirm(question: str, **_: object) -> bool:
        asked.append(question)
        return False

    monkeypatch.setattr("typer.prompt", prompt)
    monkeypatch.setattr("typer.confirm", confirm)
    assert kdcache("init", file).out == ""
    assert not (tmp_path / "asked.toml").exists()  # not confirmed
    assert asked[0] == "Recipe to write" and asked[-1].startswith("Write ") and len(asked) == 7
    monkeypatch.setattr("typer.confirm", lambda *_, **__: True)
    assert kdcache("init", file).code == 0
    assert [teacher.model for teacher in load_recipe(tmp_path / "asked.toml").teachers] == ["org/a", "org/b"]
    asked.clear()
    assert kdcache("init", file, "--yes", "--output", tmp_path / "y.toml").code == 0
    assert asked == []


GOOD = "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS)
BAD = [
    pytest.param("", ["missing.tsv"], "there is no data file", "spelling", id="missing file"),
    pytest.param(GOOD, [], "no data file is given", "kdcache init FILE", id="no file"),
    pytest.param("", ["bad.tsv"], "is empty", "", id="empty"),
    pytest.param("sentence\tlabel\na b\t0\tx\n", ["bad.tsv"], "line 2 has 3 fields", "tabs", id="broken line"),
    pytest.param("sentence\na film\nb film\n", ["bad.tsv"], "looks like a label", "--label", id="no labels"),
    pytest.param(GOOD, ["bad.tsv", "--label", "y"], "no column of", "--label", id="wrong label"),
    pytest.param(GOOD, ["bad.tsv", "--text", "y"], "no column 'y'", "", id="wrong text"),
    pytest.param(GOOD, ["bad.tsv", "--text", "label"], "looks like a label", "--label", id="label as text"),
    pytest.param(GOOD.replace("\t1", "\t3.5"), ["bad.tsv"], "3.5 is no class", "classes", id="scores"),
    pytest.param(GOOD.replace("\t1", "\t0"), ["bad.tsv"], "only the label '0'", "", id="one class"),
    pytest.param(GOOD, ["bad.tsv", "bad.tsv"], "2 files would be train", "--validation", id="two files"),
    pytest.param(GOOD, ["bad.tsv", "--teacher", "./no/such"], "'./no/such' is neither", "config.json", id="no teacher"),
    pytest.param(GOOD, ["bad.tsv", "--teacher", "."], "has no config.json", "save_pretrained", id="no model"),
    pytest.param(GOOD, ["bad.tsv", "--student", "teacher:x"], "the teachers are", "", id="no such teacher"),
    pytest.param(GOOD, ["bad.tsv", "--output", "."], "is a directory", "--output", id="output is a directory"),
    pytest.param(
        GOOD, ["bad.tsv", "--text", "a", "--text", "b", "--text", "c"], "3 text columns", "", id="three texts"
    ),
]


@pytest.mark.parametrize(("content", "words", "named", "cure"), BAD)
def test_bad_input(
    content: str, words: list[str], named: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.tsv").write_text(content)
    said: Said = kdcache("init", *words)
    assert said.code == 2
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and named in errors[0], said.err
    assert cure in said.err
    assert "Traceback" not in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tsv"]


def test_a_recipe_in_a_directory_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("films.tsv").write_text(GOOD)
    assert kdcache("init", "films.tsv", "--output", "new/films.toml").code == 0
    assert load_recipe(Path("new/films.toml")).data.train == str(tmp_path / "films.tsv")


def test_half_an_emoji_is_named_with_its_line(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    rows = [{"text": f"film {row}", "label": row % 2} for row in range(9)] + [{"text": "half \ud83d", "label": 1}]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = kdcache("init", tmp_path / "films.jsonl", "--teacher", tiny_models["bert"], "--yes")
    assert said.code == 2 and "films.jsonl, line 10: text" in said.err and "not valid Unicode" in said.err


def test_a_recipe_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("films.tsv").write_text(GOOD)
    Path("films.toml").write_text("mine")
    said = kdcache("init", "films.tsv")
    assert (said.code, Path("films.toml").read_text()) == (2, "mine")
    assert "'films.toml' exists already" in said.err and "--replace" in said.err
    assert kdcache("init", "films.tsv", "--replace").code == 0
    assert load_recipe(Path("films.toml")).name == "films"


def test_a_name_that_no_recipe_can_hold(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    records = ({"text": text, "label": ["a", "\ud800"][label]} for text, label in ROWS)
    file.write_text("\n".join(map(json.dumps, records)))
    said = kdcache("init", file, "--output", tmp_path / "x.toml")
    assert said.code == 2
    assert "no Unicode" in said.err
    assert not (tmp_path / "x.toml").exists()
