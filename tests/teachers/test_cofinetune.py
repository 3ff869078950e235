"""The stage: what it leaves, newcomers, teachers with their own head, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.data.encoding import encode, load_tokenizer, pad
from kdcache.errors import DamageError, MismatchError, ModelError, RecipeError
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe
from kdcache.teachers.bundle import load_shared_head, load_teacher, read_bundle, teacher_names
from kdcache.teachers.cofinetune import CofinetuneResult, add_teacher, cofinetune
from kdcache.teachers.joint import CofinetuneTask
from kdcache.teachers.teacher import load_encoder
from kdcache.testing.tiny import make_model

from .conftest import files_in

TEXT = ("the film is good and the plot moving",)


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def run(recipe: Recipe, root: Path, progress: SilentProgress | None = None) -> CofinetuneResult:
    return cofinetune(recipe, root / "teachers", root / "work", progress=progress or SilentProgress())


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    document = recipe.model_dump()
    for section, values in sections.items():
        document[section] |= values
    return Recipe.model_validate(document)


def with_teachers(recipe: Recipe, *teachers: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | {"teachers": list(teachers)})


def logits_of(directory: Path, name: str) -> torch.Tensor:
    teacher = load_teacher(directory, name)
    encoded = encode(teacher.tokenizer, [TEXT], teacher.max_length)
    with torch.no_grad():
        logits: torch.Tensor = teacher.model(pad(encoded, [0], teacher.tokenizer.pad_token_id)).logits
    return logits


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    return {}


@pytest.fixture
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory, made: dict[str, Path]) -> Path:
    """Two co-finetuned teachers, made once; tests that write work on a copy."""
    if "root" not in made:
        made["root"] = tmp_path_factory.mktemp("trained")
        run(recipe, made["root"])
    return made["root"]


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_bundle_says_how_its_pieces_belong_together(recipe: Recipe, trained: Path) -> None:
    bundle = read_bundle(trained / "teachers")
    assert teacher_names(trained / "teachers") == ["bert", "roberta"]
    assert not bundle.labels_declared
    assert (bundle.pooling, bundle.width, bundle.label_names, bundle.text_columns) == (
        "attention",
        24,
        ("0", "1"),
        ("sentence",),
    )
    bert, roberta = bundle.teachers["bert"], bundle.teachers["roberta"]
    assert (bert.adapter, bert.width, bert.depth, bert.max_length, bert.head) == (True, 16, 1, 32, "shared")
    assert (roberta.adapter, roberta.width) == (False, 24)
    assert set(bert.scores) == {"accuracy", "macro_f1", "matthews", "loss"} == set(bundle.mean_scores)
    assert bert.source == recipe.teacher("bert").model
    again = run(recipe, trained)
    assert again.reused
    assert again.scores["bert"] == bert.scores


def test_a_teacher_that_is_loaded_is_the_one_that_was_trained(trained: Path) -> None:
    """The recorded scores of the best epoch come out again from the files, also in the metrics of that epoch."""
    bundle = read_bundle(trained / "teachers")
    lines = [json.loads(line) for line in (trained / "work" / "metrics.jsonl").read_text().splitlines()]
    best = next(line for line in lines if line["event"] == "epoch" and line["epoch"] == bundle.training["best_epoch"])
    for name, record in bundle.teachers.items():
        assert record.scores["loss"] == pytest.approx(best[f"validation.{name}.loss"], rel=1e-5)
    assert best["score"] == pytest.approx(np.mean([record.scores["accuracy"] for record in bundle.teachers.values()]))
    steps = [line for line in lines if line["event"] == "steps"]
    assert all(line["loss"] == pytest.approx(line["ce.bert"] + line["ce.roberta"]) for line in steps)


def test_transformers_loads_a_teacher_without_kdcache(trained: Path) -> None:
    code = (
        "import sys, torch\n"
        "from transformers import AutoModel, AutoTokenizer\n"
        f"model = AutoModel.from_pretrained(r'{trained}/teachers/roberta', add_pooling_layer=False)\n"
        f"tokens = AutoTokenizer.from_pretrained(r'{trained}/teachers/roberta')({TEXT[0]!r}, return_tensors='pt')\n"
        "with torch.no_grad(): print(float(model(**tokens).last_hidden_state.double().sum()))\n"
        "assert 'kdcache' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=trained, env=os.environ
    )
    teacher = load_teacher(trained / "teachers", "roberta")
    inputs = teacher.tokenizer(TEXT[0], return_tensors="pt")
    with torch.no_grad():
        states = teacher.model(inputs, hidden_states=True).hidden_states
    assert states is not None
    assert float(done.stdout) == pytest.approx(float(states[-1].double().sum()), rel=1e-5)


def test_fingerprints_are_those_of_the_content(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    teachers = copied / "teachers"
    before = load_teacher(teachers, "bert").fingerprints
    config = json.loads((teachers / "bert" / "config.json").read_text())
    (teachers / "bert" / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9.9", "dtype": "float32"})
    )
    assert load_teacher(teachers, "bert").fingerprints == before  # not of the library that wrote it
    weights = load_file(teachers / "bert" / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][0] += 1e-3
    save_file(weights, teachers / "bert" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="weights"):
        load_teacher(teachers, "bert")
    assert load_teacher(teachers, "roberta").fingerprints == read_bundle(teachers).teachers["roberta"].fingerprints


@pytest.mark.parametrize(
    "name", ["shared_head.safetensors", "bert/model.safetensors", "bert/adapter.safetensors", "bert/config.json"]
)
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:40])])
def test_a_damaged_file_is_named(name: str, damage: Callable[[Path], Any], copied: Path) -> None:
    damage(copied / "teachers" / name)
    with pytest.raises(DamageError, match=name.split("/")[0]):
        load_teacher(copied / "teachers", "bert")


def test_a_newcomer_leaves_the_others_as_they_are(
    recipe: Recipe, copied: Path, shallow_models: dict[str, Path]
) -> None:
    larger = with_teachers(
        recipe,
        *(teacher.model_dump() for teacher in recipe.teachers),
        {"name": "new", "model": str(shallow_models["distilbert"])},
    )
    with pytest.raises(MismatchError, match="and not new") as caught:
        run(larger, copied)
    assert "--add new" in caught.value.hint
    before = files_in(copied / "teachers")
    result = add_teacher(larger, "new", copied / "teachers", copied / "work", progress=SilentProgress())
    after = files_in(copied / "teachers")
    assert set(result.scores) == {"bert", "roberta", "new"}
    assert {name for name in before if after[name] != before[name]} == {"teachers.json"}
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"new"}
    record = read_bundle(copied / "teachers").teachers["new"]
    assert record.adapter  # it has width 16
    source = load_tokenizer(str(shallow_models["distilbert"]))
    assert load_teacher(copied / "teachers", "new").tokenizer.get_vocab() == source.get_vocab()
    assert not torch.equal(logits_of(copied / "teachers", "new"), logits_of(copied / "teachers", "bert"))
    assert run(larger, copied).reused  # the recipe with all three finds them all made
    assert add_teacher(larger, "new", copied / "teachers", copied / "work", progress=SilentProgress()).reused
    other = changed(larger, cofinetune={"learning_rate": 1e-3})
    with pytest.raises(MismatchError, match=r"cofinetune\.learning_rate"):
        add_teacher(other, "new", copied / "teachers", copied / "work", progress=SilentProgress())


def test_a_newcomer_learns_though_the_head_is_frozen(
    recipe: Recipe, copied: Path, shallow_models: dict[str, Path]
) -> None:
    longer = changed(recipe, cofinetune={"epochs": 8, "learning_rate": 5e-3})
    longer = with_teachers(longer, {"name": "new", "model": str(shallow_models["bert"])})
    head = load_shared_head(copied / "teachers").state_dict()
    add_teacher(longer, "new", copied / "teachers", copied / "work", progress=SilentProgress())
    lines = [json.loads(line) for line in (copied / "work" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["ce.new"] for line in lines if line["stage"] == "add new" and line["event"] == "steps"]
    assert steps[-1] < 0.9 * steps[0]
    assert all(
        torch.equal(head[name], value) for name, value in load_shared_head(copied / "teachers").state_dict().items()
    )


def test_a_newcomer_must_be_of_the_same_task(recipe: Recipe, copied: Path, shallow_models: dict[str, Path]) -> None:
    other = changed(
        with_teachers(recipe, {"name": "new", "model": str(shallow_models["bert"])}), data={"labels": ["1", "0"]}
    )
    with pytest.raises(MismatchError, match=r"labels of the recipe's data are 1, 0; those of .* are 0, 1"):
        add_teacher(other, "new", copied / "teachers", copied / "work", progress=SilentProgress())
    with pytest.raises(RecipeError, match="no teacher 'newer'"):
        add_teacher(other, "newer", copied / "teachers", copied / "work", progress=SilentProgress())


def classifier(directory: Path, names: tuple[str, ...]) -> str:
    make_model(directory, "bert", depth=1, classes=len(names), seed=4)
    config = json.loads((directory / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def test_a_ready_classifier_is_taken_as_it_is(recipe: Recipe, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = classifier(tmp_path / "ready", ("negative", "positive"))
    named = changed(recipe, data={"train": _renamed(recipe.data.train, tmp_path), "validation": None})
    result = run(with_teachers(named, {"name": "ready", "model": model, "head": "own"}), tmp_path)
    assert (result.best_epoch, result.scores["ready"]) == (None, {})
    assert not (tmp_path / "teachers" / "shared_head.safetensors").exists()
    bundle = read_bundle(tmp_path / "teachers")
    assert (bundle.width, bundle.pooling, bundle.teachers["ready"].head) == (None, None, "own")
    with pytest.raises(ModelError, match="share no head"):
        load_shared_head(tmp_path / "teachers")
    original = AutoModelForSequenceClassification.from_pretrained(model).eval()
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teachers" / "ready")
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in original.state_dict().items())
    teacher = load_teacher(tmp_path / "teachers", "ready")
    inputs = teacher.tokenizer(TEXT[0], return_tensors="pt")
    with torch.no_grad():
        output, expected = teacher.model(inputs, hidden_states=True), original(**inputs)
    torch.testing.assert_close(output.logits, expected.logits)
    assert output.pooled.shape == (1, 16)
    assert len(output.hidden_states or ()) == 2


def _renamed(train: str, directory: Path) -> str:
    lines = Path(train).read_text().splitlines()
    names = {"0": "negative", "1": "positive"}
    renamed = [lines[0]] + ["\t".join((text, names[label])) for text, label in (line.split("\t") for line in lines[1:])]
    (directory / "named.tsv").write_text("\n".join(renamed) + "\n")
    return str(directory / "named.tsv")


def test_labels_in_another_order_are_put_right(recipe: Recipe, tmp_path: Path) -> None:
    logits = {}
    for order in (("0", "1"), ("1", "0")):
        name = "".join(order)
        model = classifier(tmp_path / f"model-{name}", order)
        run(with_teachers(recipe, {"name": "ready", "model": model, "head": "own"}), tmp_path / name)
        logits[name] = logits_of(tmp_path / name / "teachers", "ready")
    torch.testing.assert_close(logits["01"], logits["10"].flip(1))
    heads = [load_teacher(tmp_path / name / "teachers", "ready").fingerprints.head for name in logits]
    assert heads[0] != heads[1]


def test_ready_and_shared_teachers_go_together(recipe: Recipe, tmp_path: Path, shallow_models: dict[str, Path]) -> None:
    model = str(make_model(tmp_path / "ready", "bert", depth=1, classes=2))
    both = with_teachers(
        recipe,
        {"name": "trained", "model": str(shallow_models["roberta"])},
        {"name": "ready", "model": model, "head": "own"},
    )
    notes = Notes()
    result = run(both, tmp_path, notes)
    assert set(result.scores) == {"trained", "ready"}
    assert any("LABEL_0 …: taken in the order 0, 1" in line for line in notes.lines)
    assert read_bundle(tmp_path / "teachers").width == 24
    assert load_teacher(tmp_path / "teachers", "ready").head_kind == "own"
    other = str(make_model(tmp_path / "other", "bert", depth=1, classes=2, seed=9))
    with pytest.raises(MismatchError, match=r"teachers\.ready\.weights"):
        run(
            with_teachers(both, both.teachers[0].model_dump(), {"name": "ready", "model": other, "head": "own"}),
            tmp_path,
        )


def test_a_classifier_that_only_numbers_its_labels_needs_a_declared_order(recipe: Recipe, tmp_path: Path) -> None:
    model = str(make_model(tmp_path / "ready", "bert", depth=1, classes=2))
    named = changed(recipe, data={"train": _renamed(recipe.data.train, tmp_path), "validation": None})
    ready = with_teachers(named, {"name": "ready", "model": model, "head": "own"})
    with pytest.raises(
        ModelError, match=r"'ready' names its labels LABEL_0 .* which is LABEL_0 is not known"
    ) as caught:
        run(ready, tmp_path)
    assert "data.labels" in caught.value.hint
    run(changed(ready, data={"labels": ["positive", "negative"]}), tmp_path)
    bundle = read_bundle(tmp_path / "teachers")
    assert (bundle.label_names, bundle.labels_declared) == (("positive", "negative"), True)


def test_a_classifier_of_another_task_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    model = classifier(tmp_path / "ready", ("negative", "neutral", "positive"))
    with pytest.raises(ModelError, match="'ready' predicts negative, neutral, positive; the task's labels are 0, 1"):
        run(with_teachers(recipe, {"name": "ready", "model": model, "head": "own"}), tmp_path)


def test_without_validation_the_last_epoch_is_kept(recipe: Recipe, tmp_path: Path) -> None:
    notes = Notes()
    result = run(changed(recipe, data={"validation": None}), tmp_path, notes)
    assert (result.best_epoch, result.mean_scores) == (2, {})
    assert any("the last epoch is kept" in line for line in notes.lines)


def test_the_best_epoch_is_kept(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = CofinetuneTask.evaluate
    monkeypatch.setattr(
        CofinetuneTask, "evaluate", lambda self, epoch: {**evaluate(self, epoch), "score": [0.1, 0.9, 0.5][epoch]}
    )
    result = run(changed(recipe, cofinetune={"epochs": 3}), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation.bert.loss"] for line in lines if line["event"] == "epoch"]
    assert result.best_epoch == 2
    assert result.scores["bert"]["loss"] == pytest.approx(losses[1], rel=1e-6)
    assert result.scores["bert"]["loss"] != pytest.approx(losses[2], rel=1e-4)


def test_the_score_of_an_epoch_is_the_teachers_mean(recipe: Recipe, tmp_path: Path) -> None:
    result = run(changed(recipe, cofinetune={"epochs": 1, "select_by": "loss"}), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    expected = -np.mean([scores["loss"] for scores in result.scores.values()])
    assert lines[-1]["score"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_other_poolings_and_a_chosen_width(pooling: str, recipe: Recipe, tmp_path: Path) -> None:
    run(
        changed(recipe, cofinetune={"pooling": pooling, "width": 12, "epochs": 1, "gradient_checkpointing": True}),
        tmp_path,
    )
    bundle = read_bundle(tmp_path / "teachers")
    assert (bundle.pooling, bundle.width) == (pooling, 12)
    assert all(record.adapter for record in bundle.teachers.values())
    assert torch.isfinite(logits_of(tmp_path / "teachers", "bert")).all()


def test_gradient_checkpointing_changes_nothing_but_memory(recipe: Recipe, trained: Path, tmp_path: Path) -> None:
    run(changed(recipe, cofinetune={"gradient_checkpointing": True}), tmp_path)
    assert files_in(tmp_path / "teachers") == files_in(trained / "teachers")


def test_inputs_that_cannot_work(recipe: Recipe, tmp_path: Path, shallow_models: dict[str, Path]) -> None:
    bert = str(shallow_models["bert"])
    with pytest.raises(RecipeError, match="has no teachers"):
        run(with_teachers(recipe), tmp_path)
    with pytest.raises(ModelError, match="at most 80 tokens, max_length is 100"):
        run(with_teachers(recipe, {"name": "a", "model": bert, "max_length": 100}), tmp_path)
    with pytest.raises(ModelError, match="no model could be loaded from '/not/there'"):
        run(with_teachers(recipe, {"name": "a", "model": "/not/there"}), tmp_path)
    with pytest.raises(ModelError, match="holds no teachers"):
        add_teacher(recipe, "bert", tmp_path / "teachers", tmp_path / "work", progress=SilentProgress())
    assert not (tmp_path / "teachers").exists()


def with_rates(recipe: Recipe, **rates: float) -> Recipe:
    teachers = [teacher.model_dump(exclude_none=True) for teacher in recipe.teachers]
    for teacher in teachers:
        teacher |= {"learning_rate": rates[teacher["name"]]} if teacher["name"] in rates else {}
    return with_teachers(recipe, *teachers)


def furthest(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    """The largest change of any weight."""
    return max(float((after[key] - before[key]).abs().max()) for key in after)


def test_a_teacher_is_trained_at_the_rate_of_its_own(recipe: Recipe, trained: Path, tmp_path: Path) -> None:
    """The rate of all, said per teacher, changes nothing; a tiny one leaves that encoder as it was, and the shared head
    and the other teacher learn on.
    """
    from kdcache.teachers.head import SharedHead
    from kdcache.training.seeding import seed_everything

    rate = recipe.cofinetune.learning_rate
    run(with_rates(recipe, bert=rate, roberta=rate), tmp_path / "same")
    run(with_rates(recipe, bert=1e-12), tmp_path / "tiny")
    for name, moves in (("bert", False), ("roberta", True)):
        usual, same, tiny = (
            load_teacher(root / "teachers", name).model for root in (trained, tmp_path / "same", tmp_path / "tiny")
        )
        assert furthest(usual.state_dict(), same.state_dict()) == 0
        untrained = load_encoder(recipe.teacher(name).model).state_dict()
        assert (furthest(untrained, tiny.encoder.state_dict()) > 1e-3) == moves
        assert furthest(untrained, usual.encoder.state_dict()) > 1e-3
    seed_everything(recipe.cofinetune.seed)
    head = load_shared_head(tmp_path / "tiny" / "teachers").state_dict()
    assert furthest(SharedHead(24, 2, "attention").state_dict(), head) > 1e-3


def test_the_rates_are_part_of_what_teachers_were_made_with(recipe: Recipe, copied: Path) -> None:
    with pytest.raises(MismatchError, match=r"what differs: teachers\.bert\.learning_rate$"):
        run(with_rates(recipe, bert=1e-3), copied)
    with pytest.raises(ValueError, match=r"learning_rate = 0\.001 has no effect .*own"):
        with_teachers(recipe, {"name": "a", "model": "b", "head": "own", "learning_rate": 1e-3})


def test_the_scores_of_every_epoch_are_kept(recipe: Recipe, trained: Path) -> None:
    bundle = read_bundle(trained / "teachers")
    for name, record in bundle.teachers.items():
        epochs = bundle.training["epochs"][name]
        assert [scores["epoch"] for scores in epochs] == [1, 2]
        kept = epochs[bundle.training["best_epoch"] - 1]
        assert {key: value for key, value in kept.items() if key != "epoch"} == pytest.approx(record.scores, rel=1e-5)
    assert run(recipe, trained).epochs == bundle.training["epochs"]
